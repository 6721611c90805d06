"""Bytes of the frozen base on one rank: between uses, gathered for use, and expanded from 4 or 8 bits.

Symbols: ``P`` base parameters, ``w`` bytes of each (bf16 2, fp32 4), ``N`` ranks, ``n`` ranks of a node.

- **Weights.** ``w·P``; stage 3 ``w·P/N``; hpZ adds a second partition, ``w·P/n`` (ZeRO++, arXiv 2306.10209).
- **Quantized.** What ``training/quantized_base.py`` quantizes, or a checkpoint of bitsandbytes says it has quantized;
  the rest at ``w``. NF4 (QLoRA, arXiv 2305.14314): 1/2 byte, an 8-bit scale per 64 and an fp32 one per 64·256 (an fp32
  one per 64 without double quantization). LLM.int8: 1 byte, and an fp32 scale per row. ZeRO-3 partitions the values,
  every rank keeps all scales on its device. Experts in fused parameters are no linears: they are not quantized.
- **Elsewhere** (stage 3). With CPU offload the partitions are in host memory, with NVMe on neither: the host has the
  swapper's buffers. What is in use is gathered to the device either way, on a single rank too.
- **Gathered** (stage 3; DeepSpeed ``partitioned_param_coordinator.py``). Once a forward and backward have been
  recorded, a parameter stays gathered after use if its next use is less than ``max_reuse_distance`` parameters away.
  Behind the last ``d`` parameters of the model lie ``d`` of forward and ``d`` of backward, so the last ``reuse/2`` are
  still there when backward starts (``reuse/3`` with checkpointing: the recomputation lies in between). Beside those,
  every module that runs fetches another prefetch bucket ahead of need, which fills up ``max_live_parameters`` within a
  few layers and keeps them full. The input embedding is not used in backward. On top lies one prefetch bucket twice,
  as it arrived and cut into parameters. Before the recording is complete only the largest tensor is there, or the
  largest mixture of experts, which is gathered as a whole: twice, as it arrived and cut into parameters.
"""

from dataclasses import dataclass

from taso_ds.planning.numbers.model_shape import ModelShape
from taso_ds.planning.numbers.strategy import Strategy, Workload

_NF4_VALUE, _NF4_SCALES = 0.5, 1.0 / 64 + 4.0 / (64 * 256)
_NF4_PLAIN_SCALES = 4.0 / 64  # of a checkpoint without double quantization
_INT8_ROW = 4.0


@dataclass(frozen=True)
class Weights:
    """Bytes of the base: what ZeRO-3 partitions, and what every rank keeps."""

    partitioned: float
    replicated: float

    @property
    def total(self) -> float:
        return self.partitioned + self.replicated


def weight_bytes(shape: ModelShape, strategy: Strategy, element: int = 2) -> Weights:
    """Return the bytes of the base."""
    if not strategy.quantized:
        return Weights(float(element) * shape.parameters, 0.0)
    rest = float(element) * (shape.parameters - shape.quantized)
    if strategy.bits == 8:
        return Weights(shape.quantized + rest, _INT8_ROW * shape.quantized_rows)
    scales = _NF4_SCALES if shape.double_quantized else _NF4_PLAIN_SCALES
    return Weights(_NF4_VALUE * shape.quantized + rest, scales * shape.quantized)


def partition_bytes(shape: ModelShape, strategy: Strategy, work: Workload) -> float:
    """Bytes of the base that ZeRO-3 keeps for one rank, wherever it puts them."""
    return weight_bytes(shape, strategy, work.element).partitioned / work.world_size


def resident_weights(shape: ModelShape, strategy: Strategy, work: Workload) -> float:
    """Bytes of the base that one rank's device holds between uses, unless its partitions are elsewhere."""
    weights = weight_bytes(shape, strategy, work.element)
    if strategy.stage < 3:
        return weights.total
    held = partition_bytes(shape, strategy, work)
    if strategy.hpz:
        held += weights.partitioned / work.gpus_per_node
    return held + weights.replicated


def nvme_buffer_bytes(strategy: Strategy, work: Workload) -> float:
    """Bytes of host memory that one rank's swapper reserves."""
    return float(work.element * strategy.limits.nvme_buffer * strategy.limits.nvme_buffers)


def kept_gathered(shape: ModelShape, strategy: Strategy, element: int = 2) -> float:
    """Bytes of base weights that are still gathered from forward when backward needs them.

    DeepSpeed counts elements as stored: four NF4 weights are one element of bf16.
    """
    if strategy.stage < 3:
        return 0.0
    reuse = element * strategy.limits.max_reuse_distance / strategy.uses
    return min(_used_in_backward(shape, strategy, element), reuse)


def _used_in_backward(shape: ModelShape, strategy: Strategy, element: int) -> float:
    idle = 0 if shape.is_tied else shape.embedding
    return weight_bytes(shape, strategy, element).partitioned - element * idle


def gathered_bytes(shape: ModelShape, strategy: Strategy, work: Workload, *, recorded: bool) -> float:
    """Bytes of gathered base weights at the peak, the rank's own partitions not counted."""
    if strategy.stage < 3 or (work.world_size == 1 and not strategy.offloads):
        return 0.0
    element = work.element
    largest = float(element * max(shape.largest_tensor, 2 * shape.largest_block))
    if not recorded:
        return largest
    partitioned = weight_bytes(shape, strategy, element).partitioned
    bucket = min(float(element * strategy.limits.prefetch_bucket), partitioned)
    kept = kept_gathered(shape, strategy, element)
    if not bucket:  # nothing is fetched ahead
        return min(partitioned, kept + largest)
    ahead = min(_used_in_backward(shape, strategy, element), float(element * strategy.limits.max_live_parameters))
    whole = min(partitioned, max(kept, ahead) + bucket)
    return max(largest, whole + bucket)


def dequantized_bytes(shape: ModelShape, strategy: Strategy, work: Workload) -> float:
    """Bytes of the one matrix that is expanded for its product, and of its gradient's copy in backward."""
    return float(work.element * shape.largest_quantized) if strategy.quantized else 0.0
