"""Every way to run a model on given hardware: what fits, and what is fastest."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from taso_ds.planning.devices import GB, Device, Network
from taso_ds.planning.memory import Usage, phase_usage
from taso_ds.planning.model_shape import ModelShape
from taso_ds.planning.speed import StepTime, step_seconds
from taso_ds.planning.strategy import Limits, Strategy, Workload
from taso_ds.planning.weights import weight_bytes

# Reading a checkpoint: one node's share of a shared file system, or its own disk.
READ_GB_PER_S = 2.0


@dataclass(frozen=True)
class Hardware:
    """What the run gets. ``host_memory_gb`` is one node's."""

    device: Device
    network: Network
    host_memory_gb: float


@dataclass(frozen=True)
class Candidate:
    """One strategy with its peaks and times.

    Attributes:
        usage: peaks by phase.
        seconds: of each phase; ``train`` is one optimizer step.
        why_not: what does not fit; None when everything does.
    """

    strategy: Strategy
    usage: dict[str, Usage]
    step: StepTime
    seconds: dict[str, float]
    why_not: str | None

    @property
    def device_bytes(self) -> float:
        return max(usage.device_bytes for usage in self.usage.values())

    @property
    def host_bytes(self) -> float:
        return max(usage.host_bytes for usage in self.usage.values())


def strategies(
    work: Workload, *, limits: Limits, quantized: Sequence[bool] = (False, True), offloads: bool = True
) -> list[Strategy]:
    """Return all combinations that are different: offload and hpZ exist at stage 3, hpZ on more than one node."""
    found = []
    for load_in_4bit in quantized:
        for checkpointing in (False, True):
            base = Strategy(0, load_in_4bit=load_in_4bit, gradient_checkpointing=checkpointing, limits=limits)
            found += [replace(base, stage=stage) for stage in (0, 1, 2)]
            found.append(replace(base, stage=3, limits=limits.packed() if load_in_4bit else limits))
            if offloads:
                found.append(replace(base, stage=3, offload=True))
            if work.nodes > 1 and work.gpus_per_node > 1:
                found.append(replace(base, stage=3, hpz=True))
    return found


def assess(shape: ModelShape, strategy: Strategy, work: Workload, hardware: Hardware) -> Candidate:
    """Return peaks and times of one strategy, and whether it fits."""
    device, network = hardware.device, hardware.network
    usage = phase_usage(shape, strategy, work, device)
    step = step_seconds(shape, strategy, work, device, network)
    weights = weight_bytes(shape, replace(strategy, load_in_4bit=False), work.element).total
    readers = 1 if strategy.stage == 3 else work.gpus_per_node
    seconds = {"load": readers * weights / (work.nodes if readers == 1 else 1) / (READ_GB_PER_S * GB)}
    if work.scores:
        batch = step_seconds(shape, strategy, work, device, network, scored=True)
        seconds["score"] = work.calibration_passes * work.scoring_batches * batch.total
    seconds["train"] = step.total
    seconds["checkpoint"] = 16.0 * shape.trainable / work.world_size / (READ_GB_PER_S * GB)
    seconds["export"] = weights / (READ_GB_PER_S * GB)  # its proof reads the base once more
    return Candidate(strategy, usage, step, seconds, _why_not(usage, hardware))


def _why_not(usage: dict[str, Usage], hardware: Hardware) -> str | None:
    for phase, peak in usage.items():
        if not hardware.device.is_host and peak.device_bytes > hardware.device.memory_gb * GB:
            return f"{phase} needs {peak.device_bytes / GB:.1f} GB on the device"
        if peak.host_bytes > hardware.host_memory_gb * GB:
            return f"{phase} needs {peak.host_bytes / GB:.1f} GB on the host"
    return None


def fastest(candidates: Sequence[Candidate]) -> Candidate | None:
    """Return the fastest that fits; of equals the lowest stage, unquantized: nothing is spread without need.

    Within 2 % two predictions are equal.
    """
    fitting = [candidate for candidate in candidates if candidate.why_not is None]
    if not fitting:
        return None
    best = min(candidate.step.total for candidate in fitting)
    close = [candidate for candidate in fitting if candidate.step.total <= 1.02 * best]

    def order(candidate: Candidate) -> tuple[object, ...]:
        strategy = candidate.strategy
        lowest = 1 if strategy.stage == 0 else 0  # stage 0 sums micro-batches in bf16
        return (
            strategy.load_in_4bit,
            strategy.gradient_checkpointing,
            strategy.offload,
            lowest,
            strategy.stage,
            candidate.step.total,
        )

    return min(close, key=order)


@dataclass(frozen=True)
class ScalingPoint:
    """Step time on a number of nodes, at a fixed micro-batch per rank: more nodes are more rows per step."""

    nodes: int
    zero3_s: float
    hpz_s: float


def scaling(
    shape: ModelShape, strategy: Strategy, work: Workload, hardware: Hardware, nodes: Sequence[int]
) -> list[ScalingPoint]:
    """Return the time per step of ZeRO-3 against the number of nodes, with and without hpZ."""
    plain = replace(strategy, stage=3, hpz=False, offload=False)
    points = []
    for number in nodes:
        larger = replace(work, nodes=number)
        zero3, hpz = (
            step_seconds(shape, one, larger, hardware.device, hardware.network).total
            for one in (plain, replace(plain, hpz=number > 1))
        )
        points.append(ScalingPoint(number, zero3, hpz))
    return points
