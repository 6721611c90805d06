"""Bytes one rank holds at the peak of each phase of a run, by cause.

Symbols: ``N`` ranks, ``t`` trainable parameters, ``l`` blocks, ``V`` vocabulary, ``K`` supervised positions of a
micro-batch, and the widths ``h a v f`` of ``ModelShape``. The base itself is ``weights.py``.

- **Activations** per token and block, saved for backward with adapters on every linear, ``e`` bytes per element: norm
  inputs ``2·4·h`` (RMSNorm works in fp32; else ``2·e·h``), norm outputs ``2·e·h``, queries, keys, values and attention
  output ``e·(2a+2v)``, its log-sum-exp ``4·heads``, gate, activation, up and product ``4·e·f`` (ungated: ``2·e·f``). A
  test counts what autograd saves. Checkpointing keeps ``e·h`` per block instead, and one block whole.
- **Loss.** The output layer runs on chunks of positions whose fp32 logits take 64 MB, inside the forward, when all
  activations are there. Of ``c`` positions at a time there are bf16 logits, fp32 log-probabilities that become their
  gradient in place, and it in bf16: ``(2e + 4)·c·V``; hidden states of the ``K`` supervised positions and their
  gradient stay: ``2·e·K·h``. A classification head has none.
- **Accumulators** (scoring). One fp32 number per target parameter, divided over the ranks and the passes (on the host
  with ``--calibration_offload cpu``); none where each rank has a single micro-batch. Each gradient and its travelling
  copy, two largest matrices.
- **Trained state**, ``t`` over ``N`` ranks at stages 1-3: fp32 master and two moments ``12·t``, gradients ``4·t``; an
  adapter's parameter and its expanded form, ``w·(t + dense)``, are whole on every rank. With ``--method full`` the
  parameters are the weights, spread as they are; stages 0 and 1 have whole gradients, ``w·t``. The reduction bucket is
  reserved.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from taso_ds.planning.numbers.devices import GB, Device
from taso_ds.planning.numbers.model_shape import ModelShape
from taso_ds.planning.numbers.strategy import Strategy, Workload
from taso_ds.planning.numbers.weights import (
    dequantized_bytes,
    gathered_bytes,
    nvme_buffer_bytes,
    partition_bytes,
    resident_weights,
    weight_bytes,
)

# As ``objectives.chunked_loss`` cuts its logits; a test compares the two.
LOSS_CHUNK_BYTES = 64 << 20
# ``models.quantized_linear`` quantizes this many weights at once, which a test compares; each needs up to so many bytes
# meanwhile.
QUANTIZING_CHUNK, _QUANTIZING_BYTES = 1 << 22, 20.0


@dataclass(frozen=True)
class Usage:
    """Peak bytes of one phase on one rank's device, and on its node's host, by cause.

    Attributes:
        mapped: bytes of the host's page cache besides, of files that are mapped: the system drops them when in need.
    """

    device: Mapping[str, float]
    host: Mapping[str, float]
    mapped: float = 0.0

    @property
    def device_bytes(self) -> float:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> float:
        return sum(self.host.values())


def saved_per_token(shape: ModelShape, element: int) -> float:
    """Bytes that one block saves for backward per token."""
    norms = 2 * (4 if shape.upcasts_norms else element) * shape.hidden + 2 * element * shape.hidden
    attention = element * (2 * shape.attention + 2 * shape.key_value) + 4 * shape.num_heads
    feed_forward = element * shape.feed_forward * (4 if shape.gated else 2)
    return float(norms + attention + feed_forward)


def activation_bytes(shape: ModelShape, strategy: Strategy, work: Workload, *, rows: int) -> float:
    """Bytes saved for backward by all blocks for one micro-batch."""
    tokens = rows * work.max_seq_length
    whole = saved_per_token(shape, work.element) * tokens
    if not strategy.gradient_checkpointing:
        return whole * len(shape.blocks)
    return whole + float(work.element * shape.hidden * tokens * len(shape.blocks))


def loss_bytes(shape: ModelShape, work: Workload, *, rows: int) -> float:
    """Bytes of one chunk's logits and gradients, and of the supervised hidden states."""
    if not shape.output:
        return 0.0
    positions = rows * work.max_seq_length * work.supervised_share
    chunk = min(positions, max(1, LOSS_CHUNK_BYTES // (4 * shape.vocabulary)))
    kept = 2 * work.element * positions * shape.hidden
    return chunk * shape.vocabulary * (2.0 * work.element + 4.0) + kept


def _spread(
    shape: ModelShape, strategy: Strategy, work: Workload, device: Device
) -> tuple[dict[str, float], dict[str, float]]:
    """Place the resident weights: what one rank has on its device, and on its host."""
    weights = resident_weights(shape, strategy, work)
    if not strategy.offloads or (device.is_host and strategy.place == "cpu"):
        return {"weights": weights}, {}
    away = partition_bytes(shape, strategy, work)
    on_host = {"weights": away} if strategy.place == "cpu" else {"nvme buffers": nvme_buffer_bytes(strategy, work)}
    return {"weights": weights - away}, on_host


def _finish(
    device: Device,
    work: Workload,
    on_device: dict[str, float],
    per_rank: dict[str, float],
    *,
    once: dict[str, float] | None = None,
    mapped: float = 0.0,
) -> Usage:
    """Add the runtime; a host's share is that of all its ranks, and what one of them has ``once``."""
    if device.runtime_gb:
        on_device = {**on_device, "runtime": device.runtime_gb * GB}
    host: dict[str, float] = {}
    for part in (per_rank, on_device) if device.is_host else (per_rank,):
        for name, value in part.items():
            host[name] = host.get(name, 0.0) + value * work.gpus_per_node
    for name, value in (once or {}).items():
        host[name] = host.get(name, 0.0) + value
    return Usage({k: v for k, v in on_device.items() if v}, {k: v for k, v in host.items() if v}, mapped)


def load_usage(shape: ModelShape, strategy: Strategy, work: Workload, device: Device) -> Usage:
    """Loading: ZeRO-3 reads partitions in place; other stages map the files, or convert them whole in host memory.

    With a quantized base every rank quantizes the range it keeps, a chunk at a time. A checkpoint whose tensors
    transformers merges or splits is loaded by it: rank 0 maps the files and the ranks gather one parameter after the
    other; a quantized one every rank has whole on its device before it is partitioned.
    """
    on_device, host = _spread(shape, strategy, work, device)
    element, once, mapped = work.element, {}, 0.0
    if strategy.quantized:
        on_device["quantizing"] = _QUANTIZING_BYTES * min(QUANTIZING_CHUNK, shape.largest_quantized)
        if strategy.stage == 3 and shape.reads_whole:
            on_device.pop("weights")
            on_device["whole model"] = weight_bytes(shape, strategy, element).total
        if strategy.stage < 3 or shape.reads_whole:
            on_device["merging"] = float(element * shape.largest_merged)
    elif strategy.stage < 3:
        if shape.is_stored_in(element):
            mapped = float(shape.stored_bytes)
        copied = shape.merged if shape.is_stored_in(element) else shape.parameters
        if not device.is_host:
            host["checkpoint"] = float(element * copied)
        host["merging"] = float(element * shape.largest_merged)
    elif shape.reads_whole:
        on_device["gathered"] = float(element * shape.largest_tensor)
        once["merging"] = float(element * shape.largest_merged)
        mapped = float(shape.stored_bytes)
    return _finish(device, work, on_device, host, once=once, mapped=mapped)


def score_usage(shape: ModelShape, strategy: Strategy, work: Workload, device: Device) -> Usage:
    """Scoring: accumulators beside a forward and backward of the frozen base."""
    on_device, host = _spread(shape, strategy, work, device)
    rows = work.calibration_batch_size
    travelling = 0 if work.world_size == 1 else work.element if work.world_size == 2 else 4
    share = shape.targets / work.world_size / work.calibration_passes
    sums = 4.0 * (share if work.has_accumulators else shape.largest_target)
    offloaded = work.calibration_offload and not device.is_host
    if offloaded:
        host["accumulators"] = sums
    on_device |= {
        "gathered": gathered_bytes(
            shape, strategy, work, recorded=work.has_accumulators or work.calibration_passes > 1
        ),
        "dequantized": dequantized_bytes(shape, strategy, work),
        "activations": activation_bytes(shape, strategy, work, rows=rows),
        "loss": loss_bytes(shape, work, rows=rows),
        "accumulators": 4.0 * shape.largest_target if offloaded else sums,
        "gradients": float((work.element + travelling) * shape.largest_target),
    }
    return _finish(device, work, on_device, host)


def trained_bytes(shape: ModelShape, strategy: Strategy, work: Workload) -> float:
    """Bytes of what is trained on one rank's device, the base's own weights not counted."""
    ranks = work.world_size if strategy.stage else 1
    state = 16.0 * shape.trainable / ranks
    if not shape.trains_base:
        return work.element * float(shape.trainable + shape.adapter_dense) + state
    return state + (work.element * float(shape.trainable) if strategy.stage < 2 else 0.0)  # whole gradients


def train_usage(shape: ModelShape, strategy: Strategy, work: Workload, device: Device) -> Usage:
    """Training: what the adapter adds is small, what the base needs to run backward is not."""
    on_device, host = _spread(shape, strategy, work, device)
    on_device |= {
        "gathered": gathered_bytes(shape, strategy, work, recorded=True),
        "dequantized": dequantized_bytes(shape, strategy, work),
        "activations": activation_bytes(shape, strategy, work, rows=work.micro_batch_size),
        "loss": loss_bytes(shape, work, rows=work.micro_batch_size),
        "trained": trained_bytes(shape, strategy, work),
        "buckets": 4.0 * (strategy.limits.reduce_bucket if strategy.stage else shape.trainable),
    }
    return _finish(device, work, on_device, host)


def checkpoint_usage(shape: ModelShape, strategy: Strategy, work: Workload, device: Device) -> Usage:
    """A checkpoint holds trained state only: each rank copies its part to the host."""
    on_device, host = _spread(shape, strategy, work, device)
    on_device["trained"] = trained_bytes(shape, strategy, work)
    host["state"] = 16.0 * shape.trainable / work.world_size
    return _finish(device, work, on_device, host)


def export_usage(shape: ModelShape, strategy: Strategy, work: Workload, device: Device) -> Usage:
    """What was trained is gathered to rank 0, and its proof opens the whole base once more on that host.

    A base in the checkpoint's own dtype is mapped from its files there, which the system can drop from memory.
    """
    on_device, host = _spread(shape, strategy, work, device)
    on_device["trained"] = trained_bytes(shape, strategy, work)
    once = {"adapter": 4.0 * (shape.trainable + shape.adapter_dense)}
    proof, mapped = weight_bytes(shape, strategy, work.element).total, 0.0
    if not strategy.quantized and shape.stored_dtype == ("bfloat16" if work.bf16 else "float32"):
        proof, mapped = float(work.element * shape.merged), float(work.element * (shape.parameters - shape.merged))
    if work.proves:
        once["proof"] = proof
    return _finish(device, work, on_device, host, once=once, mapped=mapped if work.proves else 0.0)


def phase_usage(shape: ModelShape, strategy: Strategy, work: Workload, device: Device) -> dict[str, Usage]:
    """Return the peak of every phase of a run."""
    usage = {"load": load_usage(shape, strategy, work, device)}
    if work.scores:
        usage["score"] = score_usage(shape, strategy, work, device)
    usage["train"] = train_usage(shape, strategy, work, device)
    usage["checkpoint"] = checkpoint_usage(shape, strategy, work, device)
    usage["export"] = export_usage(shape, strategy, work, device)
    return usage
