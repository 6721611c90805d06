"""Every way to run a model on given hardware, the cheapest way to score in each, and the fastest of those that fit.

Where scoring is what does not fit, its sums are to blame or can make room: they go to the host, or are made in several
passes, whichever takes less time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from taso_ds.planning.numbers.model_shape import ModelShape
from taso_ds.planning.numbers.plan import Candidate, Hardware, assess
from taso_ds.planning.numbers.strategy import Limits, Strategy, Workload

_PASSES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True)
class Freedom:
    """What a search may choose from; the rest the user or the model has decided.

    Attributes:
        passes: whether scoring may be cut into passes.
        sums_on_host: whether the sums of scoring may be kept on the host.
        nvme: whether there is a disk to offload to.
        hpz: whether a second partition pays: of a base that is trained it does not.
    """

    bits: tuple[int, ...] = (16, 4)
    checkpointing: tuple[bool, ...] = (False, True)
    passes: bool = True
    sums_on_host: bool = True
    nvme: bool = False
    hpz: bool = True


def strategies(
    work: Workload, *, limits: Limits, freedom: Freedom | None = None, is_host: bool = False
) -> list[Strategy]:
    """Return all combinations that are different: offload and hpZ exist at stage 3, hpZ on more than one node."""
    free = freedom or Freedom()
    found = []
    for bits in free.bits:
        for recomputes in free.checkpointing:
            base = Strategy(0, bits=bits, gradient_checkpointing=recomputes, limits=limits)
            found += [replace(base, stage=stage) for stage in (0, 1, 2)]
            found.append(replace(base, stage=3, limits=limits.packed() if bits == 4 else limits))
            if not is_host:
                found.append(replace(base, stage=3, place="cpu"))
            if free.nvme:
                found.append(replace(base, stage=3, place="nvme", limits=replace(limits, prefetch_bucket=0)))
            if free.hpz and work.nodes > 1 and work.gpus_per_node > 1:
                found.append(replace(base, stage=3, hpz=True))
    return found


def variants(given: Strategy, freedom: Freedom) -> list[Strategy]:
    """Return what is left to choose once the DeepSpeed JSON is given."""
    return [
        replace(given, bits=bits, gradient_checkpointing=recomputes)
        for bits in freedom.bits
        for recomputes in freedom.checkpointing
    ]


def assess_scoring(
    shape: ModelShape, strategy: Strategy, work: Workload, hardware: Hardware, freedom: Freedom
) -> Candidate:
    """Assess a strategy; where its scoring does not fit, with the fastest way to score that does.

    When none does, with the one that needs least.
    """
    plain = assess(shape, strategy, work, hardware)
    if plain.misfit is None or plain.misfit.phase != "score" or not work.has_accumulators:
        return plain
    offloads = (False, True) if freedom.sums_on_host and not hardware.device.is_host else (work.calibration_offload,)
    passes = [work.calibration_passes]
    if freedom.passes:
        passes = [1, *(number for number in _PASSES if number <= shape.num_targets)]
    others = [
        assess(shape, strategy, replace(work, calibration_passes=number, calibration_offload=offload), hardware)
        for number in passes
        for offload in offloads
    ]
    fitting = [other for other in others if other.misfit is None]
    if fitting:
        return min(fitting, key=lambda other: other.seconds["score"])
    return min([plain, *others], key=lambda other: (other.device_bytes, other.seconds["score"]))


def fastest(candidates: Sequence[Candidate]) -> Candidate | None:
    """Return the fastest that fits; of equals the lowest stage, unquantized: nothing is spread without need.

    Within 2 % two predictions are equal.
    """
    fitting = [candidate for candidate in candidates if candidate.misfit is None]
    if not fitting:
        return None
    best = min(candidate.step_and_scoring for candidate in fitting)
    close = [candidate for candidate in fitting if candidate.step_and_scoring <= 1.02 * best]

    def order(candidate: Candidate) -> tuple[object, ...]:
        strategy, work = candidate.strategy, candidate.work
        lowest = 1 if strategy.stage == 0 else 0  # stage 0 sums micro-batches in bf16
        return (
            strategy.quantized,
            strategy.gradient_checkpointing,
            strategy.offloads,
            work.calibration_offload or work.calibration_passes > 1,
            lowest,
            strategy.stage,
            candidate.step_and_scoring,
        )

    return min(close, key=order)
