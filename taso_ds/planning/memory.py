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
- **Trained state**, ``t`` over ``N`` ranks at stages 1-3: fp32 master and two moments ``12·t``, gradients ``4·t``; the
  bf16 parameter and its expanded form ``2·(t + dense)`` are whole on every rank. The reduction bucket is reserved.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from taso_ds.planning.devices import GB, Device
from taso_ds.planning.model_shape import ModelShape
from taso_ds.planning.strategy import Strategy, Workload
from taso_ds.planning.weights import dequantized_bytes, gathered_bytes, resident_weights, weight_bytes

_LOSS_CHUNK_BYTES = 64 << 20
# bitsandbytes quantizes this many weights at once, and needs up to so many bytes for each meanwhile.
_QUANTIZING_CHUNK, _QUANTIZING_BYTES = 1 << 22, 20.0


@dataclass(frozen=True)
class Usage:
    """Peak bytes of one phase on one rank's device, and on its node's host, by cause."""

    device: Mapping[str, float]
    host: Mapping[str, float]

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
    chunk = min(positions, max(1, _LOSS_CHUNK_BYTES // (4 * shape.vocabulary)))
    kept = 2 * work.element * positions * shape.hidden
    return chunk * shape.vocabulary * (2.0 * work.element + 4.0) + kept


def _spread(strategy: Strategy, device: Device, weights: float) -> tuple[dict[str, float], dict[str, float]]:
    """Place the resident weights on the device or, offloaded, on the host."""
    if strategy.offload and not device.is_host:
        return {}, {"weights": weights}
    return {"weights": weights}, {}


def _finish(device: Device, work: Workload, on_device: dict[str, float], per_rank_host: dict[str, float]) -> Usage:
    """Add the runtime; a host's share is that of all its ranks."""
    if device.runtime_gb:
        on_device = {**on_device, "runtime": device.runtime_gb * GB}
    host = {name: value * work.gpus_per_node for name, value in per_rank_host.items()}
    if device.is_host:
        host = {name: value * work.gpus_per_node for name, value in on_device.items()}
    return Usage({k: v for k, v in on_device.items() if v}, {k: v for k, v in host.items() if v})


def load_usage(shape: ModelShape, strategy: Strategy, work: Workload, device: Device) -> Usage:
    """Loading: ZeRO-3 reads partitions in place, other stages read the whole base into host memory, then move it.

    With NF4 every rank quantizes the range it keeps, a chunk at a time.
    """
    weights = resident_weights(shape, strategy, work)
    on_device, host = _spread(strategy, device, weights)
    if strategy.load_in_4bit:
        on_device["quantizing"] = _QUANTIZING_BYTES * min(_QUANTIZING_CHUNK, shape.largest_block_linear)
    elif strategy.stage < 3 and not device.is_host:
        host["checkpoint"] = float(work.element * shape.parameters)
    return _finish(device, work, on_device, host)


def score_usage(shape: ModelShape, strategy: Strategy, work: Workload, device: Device) -> Usage:
    """Scoring: accumulators beside a forward and backward of the frozen base."""
    on_device, host = _spread(strategy, device, resident_weights(shape, strategy, work))
    rows = work.calibration_batch_size
    travelling = 0 if work.world_size == 1 else work.element if work.world_size == 2 else 4
    at_once = work.scoring_batches == 1  # each gradient is selected from as it arrives
    sums = 4.0 * (shape.largest_target if at_once else shape.targets / work.world_size / work.calibration_passes)
    offloaded = work.calibration_offload and not device.is_host
    if offloaded:
        host["accumulators"] = sums
    on_device |= {
        "gathered": gathered_bytes(
            shape, strategy, work, recorded=work.scoring_batches > 1 or work.calibration_passes > 1
        ),
        "dequantized": dequantized_bytes(shape, strategy, work),
        "activations": activation_bytes(shape, strategy, work, rows=rows),
        "loss": loss_bytes(shape, work, rows=rows),
        "accumulators": 4.0 * shape.largest_target if offloaded else sums,
        "gradients": float((work.element + travelling) * shape.largest_target),
    }
    return _finish(device, work, on_device, host)


def train_usage(shape: ModelShape, strategy: Strategy, work: Workload, device: Device) -> Usage:
    """Training: what the adapter adds is small, what the base needs to run backward is not."""
    on_device, host = _spread(strategy, device, resident_weights(shape, strategy, work))
    partitions = work.world_size if strategy.stage else 1
    on_device |= {
        "gathered": gathered_bytes(shape, strategy, work, recorded=True),
        "dequantized": dequantized_bytes(shape, strategy, work),
        "activations": activation_bytes(shape, strategy, work, rows=work.micro_batch_size),
        "loss": loss_bytes(shape, work, rows=work.micro_batch_size),
        "trained": 2.0 * (shape.trainable + shape.adapter_dense) + 16.0 * shape.trainable / partitions,
        "buckets": 4.0 * (strategy.limits.reduce_bucket if strategy.stage else shape.trainable),
    }
    return _finish(device, work, on_device, host)


def checkpoint_usage(shape: ModelShape, strategy: Strategy, work: Workload, device: Device) -> Usage:
    """A checkpoint holds trained state only: each rank copies its part to the host."""
    on_device, host = _spread(strategy, device, resident_weights(shape, strategy, work))
    on_device["trained"] = 2.0 * (shape.trainable + shape.adapter_dense) + 16.0 * shape.trainable / work.world_size
    host["state"] = 16.0 * shape.trainable / work.world_size
    return _finish(device, work, on_device, host)


def export_usage(shape: ModelShape, strategy: Strategy, work: Workload, device: Device) -> Usage:
    """The exported adapter is gathered to rank 0, and its proof opens the whole base once more on the host.

    A base in the checkpoint's own dtype is mapped from its files there, which the system can drop from memory.
    """
    on_device, host = _spread(strategy, device, resident_weights(shape, strategy, work))
    on_device["trained"] = 2.0 * (shape.trainable + shape.adapter_dense) + 16.0 * shape.trainable / work.world_size
    host["adapter"] = 4.0 * (shape.trainable + shape.adapter_dense)
    usage = _finish(device, work, on_device, host)
    mapped = not strategy.load_in_4bit and shape.stored_dtype == ("bfloat16" if work.bf16 else "float32")
    proof = 0.0 if mapped else weight_bytes(shape, strategy, work.element).total
    return Usage(usage.device, {**usage.host, "proof": proof})


def phase_usage(shape: ModelShape, strategy: Strategy, work: Workload, device: Device) -> dict[str, Usage]:
    """Return the peak of every phase of a run."""
    usage = {"load": load_usage(shape, strategy, work, device)}
    if work.scores:
        usage["score"] = score_usage(shape, strategy, work, device)
    usage["train"] = train_usage(shape, strategy, work, device)
    usage["checkpoint"] = checkpoint_usage(shape, strategy, work, device)
    usage["export"] = export_usage(shape, strategy, work, device)
    return usage
