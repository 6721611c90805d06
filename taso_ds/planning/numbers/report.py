"""A plan as lines of text, as a JSON object and as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from taso_ds.planning.numbers.command import ds_config_name
from taso_ds.planning.numbers.devices import GB
from taso_ds.planning.numbers.plan import Candidate, ScalingPoint

_SMALL = 5e6  # bytes that a table leaves out


def describe_strategy(candidate: Candidate) -> str:
    """Return a strategy, and how it scores, in a few words."""
    strategy, work = candidate.strategy, candidate.work
    words = [f"zero{strategy.stage}"]
    words += {"cpu": ["offload"], "nvme": ["nvme"]}.get(strategy.place, ["hpZ"] * strategy.hpz)
    words += {4: ["nf4"], 8: ["int8"]}.get(strategy.bits, [])
    words += ["checkpointing"] * strategy.gradient_checkpointing
    words += [f"{work.calibration_passes}-passes"] * (work.calibration_passes > 1)
    words += ["sums-on-host"] * work.calibration_offload
    words += [f"({strategy.ds_config})"] * (strategy.ds_config is not None)
    return " ".join(words)


def candidate_table(candidates: Sequence[Candidate]) -> list[str]:
    """Return one line per strategy: peaks, times, and whether it fits."""
    named = [describe_strategy(candidate) for candidate in candidates]
    width = max(28, *(len(name) + 2 for name in named))
    header = ("strategy", "device GB", "host GB", "load", "score", "step", "fits")
    lines = ["{:<{width}}{:>10}{:>9}{:>10}{:>10}{:>10}  {}".format(*header, width=width)]
    for name, candidate in zip(named, candidates, strict=True):
        seconds = candidate.seconds
        lines.append(
            f"{name:<{width}}{candidate.device_bytes / GB:>10.1f}"
            f"{candidate.host_bytes / GB:>9.1f}{_time(seconds['load']):>10}{_time(seconds.get('score', 0.0)):>10}"
            f"{_time(seconds['train']):>10}  {'yes' if candidate.why_not is None else candidate.why_not}"
        )
    return lines


def phase_table(candidate: Candidate) -> list[str]:
    """Return one line per phase of a strategy: what takes the memory of a rank, and of its node's host."""
    lines = []
    for phase, usage in candidate.usage.items():
        lines.append(f"{phase:<12}{usage.device_bytes / GB:>8.2f} GB  {_parts(usage.device)}")
        host = _parts(usage.host)
        mapped = f", {usage.mapped / GB:.2f} of files mapped besides" if usage.mapped >= _SMALL else ""
        lines.append(
            f"{'':<12}{usage.host_bytes / GB:>8.2f} GB on each host{f' ({host})' if host else ''}{mapped};"
            f" {_time(candidate.seconds[phase])}"
        )
    return lines


def _parts(terms: Mapping[str, float]) -> str:
    return " + ".join(f"{name} {value / GB:.2f}" for name, value in terms.items() if value >= _SMALL)


def _time(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds < 1 else f"{seconds:.1f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def scaling_table(points: Sequence[ScalingPoint]) -> list[str]:
    """Return step time against nodes; efficiency is the time on one node over the time on many."""
    lines = [f"{'nodes':>6}{'ZeRO-3':>12}{'efficiency':>12}{'with hpZ':>12}{'efficiency':>12}"]
    first = points[0]
    for point in points:
        lines.append(
            f"{point.nodes:>6}{_time(point.zero3_s):>12}{first.zero3_s / point.zero3_s:>12.0%}"
            f"{_time(point.hpz_s):>12}{first.hpz_s / point.hpz_s:>12.0%}"
        )
    return lines


def as_json(candidate: Candidate) -> dict[str, object]:
    """Return one strategy as numbers: bytes and seconds."""
    strategy = candidate.strategy
    return {
        "stage": strategy.stage,
        "place": strategy.place,
        "hpz": strategy.hpz,
        "bits": strategy.bits,
        "gradient_checkpointing": strategy.gradient_checkpointing,
        "ds_config": ds_config_name(strategy),
        "calibration_passes": candidate.work.calibration_passes,
        "calibration_offload": candidate.work.calibration_offload,
        "fits": candidate.why_not is None,
        "why_not": candidate.why_not,
        "seconds": candidate.seconds,
        "phases": {
            phase: {"device_bytes": dict(usage.device), "host_bytes": dict(usage.host), "mapped_bytes": usage.mapped}
            for phase, usage in candidate.usage.items()
        },
    }


def draw_scaling(path: Path, points: Sequence[ScalingPoint], *, title: str) -> None:
    """Draw step time against the number of nodes, with and without hpZ."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    nodes = [point.nodes for point in points]
    zero3, hpz = [point.zero3_s for point in points], [point.hpz_s for point in points]
    # Where the lines coincide, the ring and the dashes of the one show around and behind the other.
    axes.plot(nodes, zero3, marker="o", markersize=10, fillstyle="none", linewidth=3, alpha=0.6, label="ZeRO-3")
    axes.plot(nodes, hpz, marker="s", markersize=4, linestyle="--", label="ZeRO-3 with hpZ")
    axes.set(xlabel="nodes", ylabel="seconds per step", title=title, xscale="log", ylim=(0, 1.15 * max(zero3 + hpz)))
    axes.set_xticks(nodes, [str(number) for number in nodes])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, format="png")
