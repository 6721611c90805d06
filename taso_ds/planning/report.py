"""A plan as lines of text, as a JSON object and as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from taso_ds.planning.devices import GB
from taso_ds.planning.memory import Usage
from taso_ds.planning.plan import Candidate, ScalingPoint
from taso_ds.planning.strategy import Strategy


def describe_strategy(strategy: Strategy) -> str:
    """Return a strategy in a few words."""
    words = [f"zero{strategy.stage}"]
    words += ["offload"] * strategy.offload + ["hpZ"] * strategy.hpz
    words += ["nf4"] * strategy.load_in_4bit + ["checkpointing"] * strategy.gradient_checkpointing
    return " ".join(words)


def candidate_table(candidates: Sequence[Candidate]) -> list[str]:
    """Return one line per strategy: peaks, times, and whether it fits."""
    header = ("strategy", "device GB", "host GB", "load", "score", "step", "fits")
    lines = ["{:<28}{:>10}{:>9}{:>10}{:>10}{:>10}  {}".format(*header)]
    for candidate in candidates:
        seconds = candidate.seconds
        lines.append(
            f"{describe_strategy(candidate.strategy):<28}{candidate.device_bytes / GB:>10.1f}"
            f"{candidate.host_bytes / GB:>9.1f}{_time(seconds['load']):>10}{_time(seconds.get('score', 0.0)):>10}"
            f"{_time(seconds['train']):>10}  {'yes' if candidate.why_not is None else candidate.why_not}"
        )
    return lines


def phase_table(candidate: Candidate) -> list[str]:
    """Return one line per phase of a strategy: what takes the memory of a rank, and of its node's host."""
    lines = []
    for phase, usage in candidate.usage.items():
        lines.append(f"{phase:<12}{usage.device_bytes / GB:>8.2f} GB  {_parts(usage)}")
        lines.append(f"{'':<12}{usage.host_bytes / GB:>8.2f} GB on each host; {_time(candidate.seconds[phase])}")
    return lines


def _parts(usage: Usage) -> str:
    return " + ".join(f"{name} {value / GB:.2f}" for name, value in usage.device.items() if value >= 5e6)


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


def as_json(candidate: Candidate) -> dict[str, Any]:
    """Return one strategy as numbers: bytes and seconds."""
    strategy = candidate.strategy
    return {
        "stage": strategy.stage,
        "offload": strategy.offload,
        "hpz": strategy.hpz,
        "load_in_4bit": strategy.load_in_4bit,
        "gradient_checkpointing": strategy.gradient_checkpointing,
        "fits": candidate.why_not is None,
        "why_not": candidate.why_not,
        "seconds": candidate.seconds,
        "phases": {
            phase: {"device_bytes": dict(usage.device), "host_bytes": dict(usage.host)}
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
    axes.plot(nodes, [point.zero3_s for point in points], marker="o", label="ZeRO-3")
    axes.plot(nodes, [point.hpz_s for point in points], marker="s", label="ZeRO-3 with hpZ")
    axes.set(xlabel="nodes", ylabel="seconds per step", title=title, xscale="log", ylim=(0, None))
    axes.set_xticks(nodes, [str(number) for number in nodes])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, format="png")
