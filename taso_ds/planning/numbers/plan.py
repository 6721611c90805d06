"""One way to run a model on given hardware: its peaks, its times, whether it fits, and how it scales over nodes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from taso_ds.planning.numbers.devices import GB, Device, Network
from taso_ds.planning.numbers.memory import Usage, phase_usage
from taso_ds.planning.numbers.model_shape import ModelShape
from taso_ds.planning.numbers.speed import StepTime, scoring_seconds, step_seconds
from taso_ds.planning.numbers.strategy import Strategy, Workload

# Reading a checkpoint: one node's share of a shared file system, or its own disk.
READ_GB_PER_S = 2.0


@dataclass(frozen=True)
class Hardware:
    """What the run gets. ``host_memory_gb`` is one node's."""

    device: Device
    network: Network
    host_memory_gb: float


@dataclass(frozen=True)
class Misfit:
    """The first phase that does not fit.

    Attributes:
        on_host: whether it is the node's memory that is too small.
        largest: the term that takes most of it.
    """

    phase: str
    on_host: bool
    largest: str
    reason: str


@dataclass(frozen=True)
class Candidate:
    """One strategy with its peaks and times.

    Attributes:
        work: with the scoring flags that go with the strategy.
        usage: peaks by phase.
        seconds: of each phase; ``train`` is one optimizer step.
        misfit: what does not fit; None when everything does.
    """

    strategy: Strategy
    work: Workload
    usage: dict[str, Usage]
    step: StepTime
    seconds: dict[str, float]
    misfit: Misfit | None

    @property
    def why_not(self) -> str | None:
        """What does not fit, in words."""
        return None if self.misfit is None else self.misfit.reason

    @property
    def step_and_scoring(self) -> float:
        """Seconds of a step, with its share of the time that scoring takes."""
        return self.step.total + self.seconds.get("score", 0.0) / self.work.steps

    @property
    def device_bytes(self) -> float:
        return max(usage.device_bytes for usage in self.usage.values())

    @property
    def host_bytes(self) -> float:
        return max(usage.host_bytes for usage in self.usage.values())


def assess(shape: ModelShape, strategy: Strategy, work: Workload, hardware: Hardware) -> Candidate:
    """Return peaks and times of one strategy, and whether it fits."""
    device, network = hardware.device, hardware.network
    usage = phase_usage(shape, strategy, work, device)
    step = step_seconds(shape, strategy, work, device, network)
    weights = float(shape.stored_bytes)
    seconds = {"load": _read_by_a_node(shape, strategy, work) / (READ_GB_PER_S * GB)}
    if work.scores:
        seconds["score"] = scoring_seconds(shape, strategy, work, device, network)
    seconds["train"] = step.total
    seconds["checkpoint"] = 16.0 * shape.trainable / work.world_size / (READ_GB_PER_S * GB)
    seconds["export"] = weights / (READ_GB_PER_S * GB)  # its proof reads the base once more
    return Candidate(strategy, work, usage, step, seconds, _misfit(shape, strategy, work, usage, hardware))


def _read_by_a_node(shape: ModelShape, strategy: Strategy, work: Workload) -> float:
    """Bytes of the checkpoint that cross the file system into the busiest node."""
    if strategy.stage == 3 and not shape.reads_whole:
        return shape.stored_bytes / (1 if strategy.hpz else work.nodes)  # the second copy is read, not sent
    readers = 1 if strategy.stage == 3 and not strategy.quantized else work.gpus_per_node
    return float(readers * shape.stored_bytes)


def _misfit(
    shape: ModelShape, strategy: Strategy, work: Workload, usage: dict[str, Usage], hardware: Hardware
) -> Misfit | None:
    device = hardware.device
    share = -(-shape.largest_tensor // work.world_size)
    if strategy.place == "nvme" and share > strategy.limits.nvme_buffer:
        reason = f"load: a partition has {share:,} numbers, buffer_size is {strategy.limits.nvme_buffer:,}"
        return Misfit("load", True, "partition", reason)
    for phase, peak in usage.items():
        if not device.is_host and peak.device_bytes > device.usable_bytes:
            largest = max(peak.device, key=peak.device.__getitem__)
            return Misfit(phase, False, largest, f"{phase} needs {peak.device_bytes / GB:.1f} GB on the device")
        if peak.host_bytes > hardware.host_memory_gb * GB:
            largest = max(peak.host, key=peak.host.__getitem__)
            return Misfit(phase, True, largest, f"{phase} needs {peak.host_bytes / GB:.1f} GB on the host")
    return None


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
    plain = replace(strategy, stage=3, hpz=False, place="device")
    points = []
    for number in nodes:
        larger = replace(work, nodes=number)
        zero3, hpz = (
            step_seconds(shape, one, larger, hardware.device, hardware.network).total
            for one in (plain, replace(plain, hpz=number > 1))
        )
        points.append(ScalingPoint(number, zero3, hpz))
    return points
