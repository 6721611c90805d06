"""Time of a step from its operations, the bytes it moves and the speeds of device and network.

Operations per token, ``A`` the parameters a token is multiplied with, ``L`` the tokens of a row, ``l`` the number of
blocks, ``a`` the attention width (2 per multiply-add; a backward through frozen weights computes input gradients only):

    forward 2A + 2·l·a·L      backward 2A + 5·l·a·L      recomputation: the forward again
    scoring adds 2·(target parameters), --method full 2A + 2·O at supervised positions: the weights' gradients

(causal attention: half of the ``4·l·a·L`` of full attention; its backward recomputes the scores, as flash attention
does). The output layer ``O`` is a forward and a backward at supervised positions: 4·O each. In fp32 the device's fp32
peak counts. Each use of a quantized weight expands it first, which no product overlaps with; 8 bits are charged like 4.

One of ``n`` scoring passes ends its backward at the lowest matrix of its group: ``(n + 1) / 2n`` of it on average. With
``--calibration_offload cpu`` the owner of a matrix moves its gradient over the host link, and the host adds it up.

Bytes into one rank per step, ``N`` ranks, ``G`` per node, ``P`` base parameters at ``w`` bytes, ``t`` trainable ones:

    stages 0-2:  gradient all-reduce in fp32, 2·(N−1)/N · 4·t; at stages 1-2 also the updated parameters, 2·t
    stage 3:     2 gathers of the base per micro-batch, 2·(N−1)/N · w·P, less what stayed gathered in between
    stage 3 hpZ: the same bytes inside each node. ZeRO++ keeps a second partition per node, and DeepSpeed expires it
                 only when weights change: a frozen base is never fetched across nodes, in forward or in backward.

A ring passes those bytes once through each node's adapters, so gathering takes ``max(bytes / link, bytes / node
network)``. Gathers overlap with compute on an accelerator (prefetch) and not on a CPU. Offloaded shares come over the
host link before, from NVMe through the node's disks; of their copies no overlap is assumed. What is not modelled:
stragglers, switch contention, data loading, the optimizer (microseconds for a few million parameters), evaluation.
"""

from dataclasses import dataclass

from taso_ds.planning.numbers.devices import GB, Device, Network
from taso_ds.planning.numbers.model_shape import ModelShape
from taso_ds.planning.numbers.strategy import Strategy, Workload
from taso_ds.planning.numbers.weights import kept_gathered, weight_bytes

# One collective of ZeRO-3 fetches about a prefetch bucket; launching it costs this on top of the network's latency.
_LAUNCH_S = 3e-5
# Where nothing is fetched ahead, every module fetches its own weights: about so many.
_ONE_MODULE = 20_000_000
# Adding a number to an fp32 sum in host memory touches this many bytes, of so many per second that a rank gets there.
_HOST_SUM_BYTES, _HOST_GB_PER_S = 12.0, 20.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by cause; ``total`` knows what overlaps."""

    compute: float
    dequantize: float
    gather: float
    reduce: float
    host: float
    total: float


def forward_flops(shape: ModelShape, work: Workload, tokens: float) -> float:
    """Operations of one forward through the blocks."""
    return tokens * (2.0 * shape.active + 2.0 * len(shape.blocks) * shape.attention * work.max_seq_length)


def backward_flops(shape: ModelShape, work: Workload, tokens: float) -> float:
    """Operations of one backward through frozen blocks: gradients of inputs, not of weights."""
    return tokens * (2.0 * shape.active + 5.0 * len(shape.blocks) * shape.attention * work.max_seq_length)


def step_flops(shape: ModelShape, work: Workload, *, checkpointing: bool, scored: bool = False) -> float:
    """Operations of one micro-batch on one rank."""
    rows = work.calibration_batch_size if scored else work.micro_batch_size
    tokens = float(rows * work.max_seq_length)
    passes = work.calibration_passes if scored else 1
    forward, backward = forward_flops(shape, work, tokens), backward_flops(shape, work, tokens)
    if checkpointing:
        backward += forward
    supervised = tokens * work.supervised_share
    total = forward + backward * (passes + 1) / (2 * passes) + 4.0 * shape.output * supervised
    if scored:
        total += 2.0 * shape.targets / passes * tokens
    elif shape.trains_base:
        total += 2.0 * shape.active * tokens + 2.0 * shape.output * supervised
    return total


def compute_seconds(flops: float, device: Device, *, bf16: bool = True) -> float:
    return flops / ((device.tflops if bf16 else device.fp32_tflops) * 1e12 * device.efficiency)


def dequantize_seconds(shape: ModelShape, strategy: Strategy, device: Device) -> float:
    """Seconds that one micro-batch spends on expanding quantized weights."""
    return strategy.uses * shape.quantized / (device.dequantized_per_s * 1e9) if strategy.quantized else 0.0


def fetched_bytes(shape: ModelShape, strategy: Strategy, element: int = 2) -> float:
    """Bytes of base weights that one micro-batch gathers on a rank at stage 3, the rank's own share included."""
    return 2.0 * weight_bytes(shape, strategy, element).partitioned - kept_gathered(shape, strategy, element)


def gather_seconds(strategy: Strategy, work: Workload, device: Device, network: Network, *, fetched: float) -> float:
    """Seconds to gather ``fetched`` bytes on every rank of the partition group."""
    group = work.gpus_per_node if strategy.hpz else work.world_size
    if group == 1:
        return 0.0
    moved = fetched * (group - 1) / group
    seconds = moved / (device.link_gb_per_s * GB) if work.gpus_per_node > 1 else 0.0
    crosses = work.nodes > 1 and not strategy.hpz
    if crosses:
        seconds = max(seconds, moved / (network.gb_per_s * GB))
    bucket = strategy.limits.prefetch_bucket or _ONE_MODULE
    buckets = max(1.0, fetched / (work.element * bucket))
    return seconds + buckets * (_LAUNCH_S + (network.latency_s * work.nodes if crosses else 0.0))


def host_seconds(strategy: Strategy, work: Workload, device: Device, *, fetched: float) -> float:
    """Seconds until ``fetched`` bytes have come from where offloaded partitions are."""
    if not strategy.offloads or (device.is_host and strategy.place == "cpu"):
        return 0.0
    share = fetched / work.world_size
    seconds = 0.0 if device.is_host else share / (device.host_link_gb_per_s * GB)
    if strategy.place == "nvme":
        seconds += share * work.gpus_per_node / (device.nvme_gb_per_s * GB)
    return seconds


def reduce_seconds(shape: ModelShape, strategy: Strategy, work: Workload, device: Device, network: Network) -> float:
    """Seconds to exchange the gradients of the trainable parameters and, where partitioned, their new values."""
    ranks = work.world_size
    if ranks == 1:
        return 0.0
    each = 8.0 + (work.element if strategy.stage else 0.0)
    if shape.trains_base and strategy.stage == 3:  # reduced to their owners, and gathered when they are used
        each = 4.0
    moved = (ranks - 1) / ranks * each * shape.trainable
    return moved / _slowest_link(work, device, network) + 2.0 * (
        _LAUNCH_S + (network.latency_s * work.nodes if work.nodes > 1 else 0.0)
    )


def sum_seconds(shape: ModelShape, work: Workload, device: Device, network: Network) -> float:
    """Seconds that the gradients of one scoring micro-batch travel: to their owners, and to the host's sums."""
    numbers = shape.targets / work.calibration_passes
    # in fp32 when more than two ranks add it up
    bytes_each = 4.0 if work.world_size > 2 else float(work.element)
    seconds = numbers * bytes_each / _slowest_link(work, device, network) if work.world_size > 1 else 0.0
    if work.calibration_offload and work.has_accumulators and not device.is_host:
        arriving = numbers / work.world_size * (2 if work.world_size == 2 else 1)
        seconds += arriving * (bytes_each / (device.host_link_gb_per_s * GB) + _HOST_SUM_BYTES / (_HOST_GB_PER_S * GB))
    return seconds


def _slowest_link(work: Workload, device: Device, network: Network) -> float:
    """Bytes per second between any two ranks."""
    return GB * (device.link_gb_per_s if work.nodes == 1 else min(device.link_gb_per_s, network.gb_per_s))


def step_seconds(
    shape: ModelShape, strategy: Strategy, work: Workload, device: Device, network: Network, *, scored: bool = False
) -> StepTime:
    """Seconds of one optimizer step, or with ``scored`` of one scoring micro-batch of one pass."""
    micro_batches = 1 if scored else work.grad_accum_steps
    flops = step_flops(shape, work, checkpointing=strategy.gradient_checkpointing, scored=scored)
    compute = micro_batches * compute_seconds(flops, device, bf16=work.bf16)
    dequantize = micro_batches * dequantize_seconds(shape, strategy, device)
    gather = host = 0.0
    if strategy.stage == 3:
        fetched = micro_batches * fetched_bytes(shape, strategy, work.element)
        gather = gather_seconds(strategy, work, device, network, fetched=fetched)
        host = host_seconds(strategy, work, device, fetched=fetched)
    if scored:
        reduce = sum_seconds(shape, work, device, network)
    else:
        reduce = reduce_seconds(shape, strategy, work, device, network)
    busy = compute + dequantize
    total = (busy + gather if device.is_host else max(busy, gather)) + host + reduce
    return StepTime(compute, dequantize, gather, reduce, host, total)


def scoring_seconds(shape: ModelShape, strategy: Strategy, work: Workload, device: Device, network: Network) -> float:
    """Seconds of scoring, all passes over the calibration rows."""
    batch = step_seconds(shape, strategy, work, device, network, scored=True)
    return work.calibration_passes * work.scoring_batches * batch.total
