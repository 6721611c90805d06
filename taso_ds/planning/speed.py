"""Time of a step from its operations, the bytes it moves and the speeds of device and network.

Operations per token, ``A`` the parameters a token is multiplied with, ``L`` the tokens of a row, ``l`` the number of
blocks, ``a`` the attention width (2 per multiply-add; a backward through frozen weights computes input gradients only):

    forward 2A + 2·l·a·L      backward 2A + 5·l·a·L      recomputation: the forward again
    scoring adds 2·(target parameters): every weight's gradient

(causal attention: half of the ``4·l·a·L`` of full attention; its backward recomputes the scores, as flash attention
does). The output layer ``O`` is a forward and a backward at supervised positions: 4·O each.

Bytes into one rank per step, ``N`` ranks, ``G`` per node, ``P`` base parameters at ``w`` bytes, ``t`` trainable ones:

    stages 0-2:  gradient all-reduce in fp32, 2·(N−1)/N · 4·t; at stages 1-2 also the updated parameters, 2·t
    stage 3:     2 gathers of the base per micro-batch, 2·(N−1)/N · w·P, less what stayed gathered in between
    stage 3 hpZ: the same bytes inside each node. ZeRO++ keeps a second partition per node, and DeepSpeed expires it
                 only when weights change: a frozen base is never fetched across nodes, in forward or in backward.

A ring passes those bytes once through each node's adapters, so gathering takes ``max(bytes / link, bytes / node
network)``. Gathers overlap with compute on an accelerator (prefetch) and not on a CPU. What is not modelled:
stragglers, switch contention, data loading, the optimizer (microseconds for a few million parameters), evaluation.
"""

from dataclasses import dataclass

from taso_ds.planning.devices import GB, Device, Network
from taso_ds.planning.model_shape import ModelShape
from taso_ds.planning.strategy import Strategy, Workload
from taso_ds.planning.weights import kept_gathered, weight_bytes

# One collective of ZeRO-3 fetches about a prefetch bucket; launching it costs this on top of the network's latency.
_LAUNCH_S = 3e-5


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by cause; ``total`` knows what overlaps."""

    compute: float
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
    total = forward_flops(shape, work, tokens) * (2.0 if checkpointing else 1.0) + backward_flops(shape, work, tokens)
    total += 4.0 * shape.output * tokens * work.supervised_share
    if scored:
        total += 2.0 * shape.targets * tokens
    return total


def compute_seconds(flops: float, device: Device) -> float:
    return flops / (device.tflops * 1e12 * device.efficiency)


def fetched_bytes(shape: ModelShape, strategy: Strategy) -> float:
    """Bytes of base weights that one micro-batch gathers on a rank at stage 3, the rank's own share included."""
    return 2.0 * weight_bytes(shape, strategy).partitioned - kept_gathered(shape, strategy)


def gather_seconds(
    shape: ModelShape, strategy: Strategy, work: Workload, device: Device, network: Network, *, fetched: float
) -> float:
    """Seconds to gather ``fetched`` bytes on every rank of the partition group."""
    group = work.gpus_per_node if strategy.hpz else work.world_size
    if group == 1:
        return 0.0
    moved = fetched * (group - 1) / group
    seconds = moved / (device.link_gb_per_s * GB) if work.gpus_per_node > 1 else 0.0
    crosses = work.nodes > 1 and not strategy.hpz
    if crosses:
        seconds = max(seconds, moved / (network.gb_per_s * GB))
    buckets = max(1.0, fetched / (2.0 * strategy.limits.prefetch_bucket))
    return seconds + buckets * (_LAUNCH_S + (network.latency_s * work.nodes if crosses else 0.0))


def reduce_seconds(shape: ModelShape, strategy: Strategy, work: Workload, device: Device, network: Network) -> float:
    """Seconds to exchange the gradients of the trainable parameters and, where partitioned, their new values."""
    ranks = work.world_size
    if ranks == 1:
        return 0.0
    moved = (ranks - 1) / ranks * (8.0 * shape.trainable + (2.0 * shape.trainable if strategy.stage else 0.0))
    speed = device.link_gb_per_s if work.nodes == 1 else min(device.link_gb_per_s, network.gb_per_s)
    return moved / (speed * GB) + 2.0 * (_LAUNCH_S + (network.latency_s * work.nodes if work.nodes > 1 else 0.0))


def step_seconds(
    shape: ModelShape, strategy: Strategy, work: Workload, device: Device, network: Network, *, scored: bool = False
) -> StepTime:
    """Seconds of one optimizer step, or with ``scored`` of one scoring micro-batch."""
    micro_batches = 1 if scored else work.grad_accum_steps
    checkpointing = strategy.gradient_checkpointing
    flops = step_flops(shape, work, checkpointing=checkpointing, scored=scored)
    compute = micro_batches * compute_seconds(flops, device)
    gather = host = 0.0
    if strategy.stage == 3:
        fetched = fetched_bytes(shape, strategy)
        gather = micro_batches * gather_seconds(shape, strategy, work, device, network, fetched=fetched)
        if strategy.offload and not device.is_host:
            share = fetched / (work.gpus_per_node if strategy.hpz else work.world_size)
            host = micro_batches * share / (device.host_link_gb_per_s * GB)
    if scored:  # every matrix travels to its owner, in fp32 when more than two ranks add it up
        moved = shape.targets * (2.0 if work.world_size == 2 else 4.0) * (work.world_size > 1)
        speed = device.link_gb_per_s if work.nodes == 1 else min(device.link_gb_per_s, network.gb_per_s)
        reduce = moved / (speed * GB)
    else:
        reduce = reduce_seconds(shape, strategy, work, device, network)
    fetching = gather + host
    total = (compute + fetching if device.is_host else max(compute, fetching)) + reduce
    return StepTime(compute, gather, reduce, host, total)
