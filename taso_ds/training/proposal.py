"""A forecast as text, as flags and as files: what ``launch/plan.py`` says."""

import dataclasses
import shlex
from pathlib import Path

from taso_ds.adapters.files import replacing, write_json
from taso_ds.config import GROUPS, RunConfig
from taso_ds.errors import UserError
from taso_ds.planning import report
from taso_ds.planning.command import DECIDED_FLAGS, command_line, strategy_flags
from taso_ds.planning.plan import scaling
from taso_ds.training.forecast import Forecast, make_forecast
from taso_ds.training.plan_arguments import PlanArguments

_NODES = (1, 2, 4, 8, 16, 32)


def describe_forecast(forecast: Forecast) -> str:
    """Return a plan as text: counts, every strategy, the proposal with its phases, scaling, the command line."""
    shape, work, hardware = forecast.shape, forecast.work, forecast.hardware
    best = forecast.best
    lines = [
        f"model: {shape.parameters:,} frozen parameters, {shape.trainable:,} trainable in {shape.num_targets} matrices",
        f"hardware: {work.nodes} × {work.gpus_per_node} {hardware.device.name} with {hardware.device.memory_gb:g} GB,"
        f" {hardware.host_memory_gb:g} GB per node, {hardware.network.name} between nodes",
        f"work: {work.micro_batch_size} rows × {work.max_seq_length} tokens per rank and micro-batch,"
        f" {work.grad_accum_steps} micro-batches per step; {work.scoring_batches} scoring micro-batches per rank",
        "",
        *report.candidate_table(forecast.candidates),
        "",
    ]
    shown = best or min(forecast.candidates, key=lambda candidate: candidate.device_bytes)
    title = "fastest that fits" if best else "smallest (nothing fits)"
    lines += [f"{title}: {report.describe_strategy(shown.strategy)}", *report.phase_table(shown), ""]
    points = scaling(shape, shown.strategy, work, hardware, _NODES)
    lines += ["time per step at this micro-batch per rank:", *report.scaling_table(points), ""]
    if best is None:
        lines.append(f"does not fit: {shown.why_not}; use more or larger devices, or a shorter --max_seq_length")
        return "\n".join(lines)
    return "\n".join([*lines, f"fits: {command_line(best.strategy, work, run_flags(forecast.config))}"])


def run_flags(config: RunConfig) -> list[str]:
    """Return the run's flags that differ from the defaults, quoted for a shell; those the plan decides left out."""
    defaults = {entry.name: entry.default for group in GROUPS for entry in dataclasses.fields(group)}
    words: list[str] = []
    for name, value in config.flags().items():
        if name in DECIDED_FLAGS or value == defaults[name]:
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        else:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(shlex.quote(str(one)) for one in values)]
    return words


def planned_flags(config: RunConfig, plan: PlanArguments) -> list[str]:
    """Return the flags of the fastest strategy that fits.

    Raises:
        UserError: nothing fits.
    """
    best = make_forecast(config, plan).best
    if best is None:
        raise UserError(f"plan_for: nothing fits {plan.nodes} × {plan.gpus_per_node} {plan.device}; see launch/plan.py")
    return strategy_flags(best.strategy)


def write_forecast(forecast: Forecast, plan: PlanArguments) -> None:
    """Write what ``--json`` and ``--plot`` ask for."""
    best = forecast.best
    if plan.json is not None:
        content = {
            "model": dataclasses.asdict(forecast.shape),
            "work": dataclasses.asdict(forecast.work),
            "hardware": dataclasses.asdict(forecast.hardware),
            "strategies": [report.as_json(candidate) for candidate in forecast.candidates],
            "fastest": None if best is None else report.as_json(best),
        }
        write_json(Path(plan.json), content)
    if plan.plot is not None:
        strategy = (best or forecast.candidates[0]).strategy
        points = scaling(forecast.shape, strategy, forecast.work, forecast.hardware, _NODES)
        name = str(forecast.config.model.model_name_or_path)
        title = f"{Path(name).name} on {forecast.hardware.device.name}, {forecast.hardware.network.name}"
        with replacing(Path(plan.plot)) as temporary:
            report.draw_scaling(temporary, points, title=title)
