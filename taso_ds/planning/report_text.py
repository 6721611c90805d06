"""A forecast as text, as flags and as files: what the plan says."""

import dataclasses
import shlex
from collections.abc import Collection
from pathlib import Path

from taso_ds.config import RunConfig
from taso_ds.errors import UserError
from taso_ds.files.atomic import replacing, write_json
from taso_ds.flags.flag import CALL, flags_of
from taso_ds.flags.verbs import command, launched
from taso_ds.planning.arguments import PlanArguments
from taso_ds.planning.forecast import Forecast, make_forecast
from taso_ds.planning.numbers import report
from taso_ds.planning.numbers.advice import advice
from taso_ds.planning.numbers.command import command_line, decided_flags
from taso_ds.planning.numbers.devices import GB
from taso_ds.planning.numbers.plan import scaling

_NODES = (1, 2, 4, 8, 16, 32)


def describe_forecast(forecast: Forecast) -> str:
    """Return a plan as text: counts, every strategy, the proposal with its phases, scaling, the command line."""
    shape, work, hardware, best = forecast.shape, forecast.work, forecast.hardware, forecast.best
    device = hardware.device
    lines = [
        f"model: {shape.frozen:,} frozen parameters, {shape.trainable:,} trainable"
        f"{'' if shape.trains_base else f' in {shape.num_targets} matrices'}",
        f"hardware: {work.nodes} × {work.gpus_per_node} {device.name} with {device.memory_gb:g} GB,"
        f" {hardware.host_memory_gb:g} GB per node, {hardware.network.name} between nodes",
        f"work: {work.micro_batch_size} rows × {work.max_seq_length} tokens per rank and micro-batch,"
        f" {work.grad_accum_steps} micro-batches per step; {work.scoring_batches} scoring micro-batches per rank",
        *_limits_in_words(forecast),
        "",
        *report.candidate_table(forecast.candidates),
        "",
    ]
    shown = best or min(forecast.choices, key=lambda candidate: candidate.device_bytes)
    title = "fastest that fits" if best else "smallest (nothing fits)"
    lines += [f"{title}: {report.describe_strategy(shown)}", *report.phase_table(shown), ""]
    points = scaling(shape, shown.strategy, work, hardware, _NODES)
    lines += ["time per step at this micro-batch per rank:", *report.scaling_table(points), ""]
    if shown.misfit is not None:
        return "\n".join([*lines, f"does not fit: {shown.misfit.reason}, {advice(shown.misfit)}"])
    flags = [*decided_flags(shown, given=forecast.kept, stored_bits=forecast.stored_bits), *_own_flags(forecast)]
    fits = "fits" if forecast.config.data.task is not None else "fits, and needs a --task"
    return "\n".join([*lines, f"{fits}: {command_line(work, launched('train'), flags)}"])


def _limits_in_words(forecast: Forecast) -> list[str]:
    """Return what counts as fitting, and what the plan does not choose."""
    device = forecast.hardware.device
    lines = []
    if not device.is_host:
        lines.append(
            f"room: {device.usable_bytes / GB:.1f} GB of a device, {device.reserve:.0%} of it is left to its allocator"
            " (--reserve)"
        )
    kept = [f"--{name}" for name in sorted(forecast.kept)]
    if forecast.stored_bits < 16:
        kept.append(f"the checkpoint's {forecast.stored_bits} bits")
    return [*lines, f"kept as given: {', '.join(kept)}"] if kept else lines


def _own_flags(forecast: Forecast) -> list[str]:
    """Return the run's flags that differ from the defaults, quoted for a shell; those the plan decides left out."""
    config, words = forecast.config, list[str]()
    for group in (config.model, config.data, config.calibration, config.adapter, config.training, config.run):
        for entry in dataclasses.fields(group):
            name, value = entry.name, getattr(group, entry.name)
            if flags_of([group])[name].effect == CALL or (value == entry.default and name not in forecast.kept):
                continue
            if isinstance(value, bool):
                words += [f"--{name}"] if value else [f"--no_{name}"] if entry.default else [f"--{name}", "False"]
            else:
                values = value if isinstance(value, list) else [value]
                words += [f"--{name}", *(shlex.quote(str(one)) for one in values)]
    return words


def planned_flags(config: RunConfig, plan: PlanArguments, given: Collection[str] = ()) -> list[str]:
    """Return the flags that the fastest strategy that fits adds to those of the run.

    Raises:
        UserError: nothing fits.
    """
    forecast = make_forecast(config, plan, given)
    best = forecast.best
    if best is None:
        raise UserError(
            f"plan_for: nothing fits {plan.nodes} × {plan.gpus_per_node} {plan.device}; see {command('plan')}"
        )
    return decided_flags(best, given=forecast.kept, stored_bits=forecast.stored_bits)


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
        strategy = (best or forecast.choices[0]).strategy
        points = scaling(forecast.shape, strategy, forecast.work, forecast.hardware, _NODES)
        name = str(forecast.config.model.model_name_or_path)
        title = f"{Path(name).name} on {forecast.hardware.device.name}, {forecast.hardware.network.name}"
        with replacing(Path(plan.plot)) as temporary:
            report.draw_scaling(temporary, points, title=title)
