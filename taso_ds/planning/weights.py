"""Bytes of the frozen base on one rank: between uses, gathered for use, and expanded from 4 bits.

Symbols: ``P`` base parameters, ``w`` bytes of each (bf16 2, fp32 4), ``N`` ranks, ``n`` ranks of a node.

- **Weights.** ``w·P``; stage 3 ``w·P/N``; hpZ adds a second partition, ``w·P/n`` (ZeRO++, arXiv 2306.10209). NF4
  (QLoRA, arXiv 2305.14314): the linears of the blocks at 1/2 byte, an 8-bit scale per 64 and an fp32 one per 64·256 of
  them, the rest at ``w``; ZeRO-3 partitions the half bytes, every rank keeps all scales.
- **Gathered** (stage 3; DeepSpeed ``partitioned_param_coordinator.py``). Once a forward and backward have been
  recorded, a parameter stays gathered after use if its next use is less than ``max_reuse_distance`` parameters away.
  Behind the last ``d`` parameters of the model lie ``d`` of forward and ``d`` of backward, so the last ``reuse/2`` are
  still there when backward starts (``reuse/3`` with checkpointing: the recomputation lies in between). Beside those,
  every module that runs fetches another prefetch bucket ahead of need, which fills up ``max_live_parameters`` within a
  few layers and keeps them full. The input embedding is not used in backward. On top lies one prefetch bucket twice,
  as it arrived and cut into parameters. Before the recording is complete only the largest tensor is there.
"""

from dataclasses import dataclass

from taso_ds.planning.model_shape import ModelShape
from taso_ds.planning.strategy import Strategy, Workload

_NF4_VALUE = 0.5
_NF4_SCALES = 1.0 / 64 + 4.0 / (64 * 256)


@dataclass(frozen=True)
class Weights:
    """Bytes of the base: what ZeRO-3 partitions, and what every rank keeps."""

    partitioned: float
    replicated: float

    @property
    def total(self) -> float:
        return self.partitioned + self.replicated


def weight_bytes(shape: ModelShape, strategy: Strategy, element: int = 2) -> Weights:
    """Return the bytes of the frozen base."""
    if not strategy.load_in_4bit:
        return Weights(float(element) * shape.parameters, 0.0)
    rest = shape.parameters - shape.block_linears
    return Weights(_NF4_VALUE * shape.block_linears + element * rest, _NF4_SCALES * shape.block_linears)


def resident_weights(shape: ModelShape, strategy: Strategy, work: Workload) -> float:
    """Bytes of the base that one rank holds between uses."""
    weights = weight_bytes(shape, strategy, work.element)
    if strategy.stage < 3:
        return weights.total
    held = weights.partitioned / work.world_size
    if strategy.hpz:
        held += weights.partitioned / work.gpus_per_node
    return held + weights.replicated


def kept_gathered(shape: ModelShape, strategy: Strategy, element: int = 2) -> float:
    """Bytes of base weights that are still gathered from forward when backward needs them.

    DeepSpeed counts elements as stored: four NF4 weights are one element of bf16.
    """
    if strategy.stage < 3:
        return 0.0
    uses = 3.0 if strategy.gradient_checkpointing else 2.0
    return min(_used_in_backward(shape, strategy, element), element * strategy.limits.max_reuse_distance / uses)


def _used_in_backward(shape: ModelShape, strategy: Strategy, element: int) -> float:
    idle = 0 if shape.is_tied else shape.embedding
    return weight_bytes(shape, strategy, element).partitioned - element * idle


def gathered_bytes(shape: ModelShape, strategy: Strategy, work: Workload, *, recorded: bool) -> float:
    """Bytes of gathered base weights at the peak, the rank's own partitions not counted."""
    if strategy.stage < 3 or work.world_size == 1:
        return 0.0
    element = work.element
    largest = float(element * shape.largest_tensor)
    if not recorded:
        return largest
    partitioned = weight_bytes(shape, strategy, element).partitioned
    bucket = min(float(element * strategy.limits.prefetch_bucket), partitioned)
    ahead = min(_used_in_backward(shape, strategy, element), float(element * strategy.limits.max_live_parameters))
    whole = min(partitioned, max(kept_gathered(shape, strategy, element), ahead) + bucket)
    return max(largest, whole + bucket)


def dequantized_bytes(shape: ModelShape, strategy: Strategy, work: Workload) -> float:
    """Bytes of the one matrix that is expanded for its product, and of its gradient's copy in backward."""
    return float(work.element * shape.largest_block_linear) if strategy.load_in_4bit else 0.0
