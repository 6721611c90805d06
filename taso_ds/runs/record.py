"""What ``run.json`` says of a run, and the same in words."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from taso_ds.config import RunConfig
from taso_ds.distributed import comm, zero
from taso_ds.distributed.ds_config import without_secrets
from taso_ds.files.schema import SCHEMA
from taso_ds.job import Job
from taso_ds.models.quantization import num_parameters
from taso_ds.runs.folder import versions
from taso_ds.training.optim import Group, Schedule, describe_groups, learning_rate_table
from taso_ds.training.progress import Progress
from taso_ds.training.recoverable import ROLLBACK_FACTOR


def record_start(asked: RunConfig, job: Job) -> dict[str, Any]:
    """Return what every ``run.json`` begins with: what was asked for, and where."""
    return {
        "schema_version": SCHEMA,
        "config": asked.flags(),
        "started_in": str(Path.cwd()),
        "deepspeed": without_secrets(job.zero.raw),
        "world_size": comm.world_size(),
        "versions": versions(),
    }


def run_record(
    asked: RunConfig, job: Job, model: nn.Module, groups: Sequence[Group], schedule: Schedule
) -> dict[str, Any]:
    """Return the content of a training run's ``run.json``."""
    trainable = sum(zero.full_numel(value) for group in groups for value in group.parameters)
    total = num_parameters(model)
    return record_start(asked, job) | {
        "parameters": {"trainable": trainable, "total": total, "share": trainable / total},
        "batch": dataclasses.asdict(job.sizes) | {"global_batch_size": job.sizes.global_batch_size},
        "steps": schedule.total_steps,
        "learning_rates": learning_rate_table(groups, schedule),
        "data": {"train": job.examples.train_source, "evaluation": job.examples.eval_source},
    }


def describe_record(record: dict[str, Any]) -> str:
    """Return counts and learning rates as lines."""
    parameters = record["parameters"]
    return "\n".join(
        [
            f"parameters: {parameters['trainable']:,} trainable of {parameters['total']:,} ({parameters['share']:.3%});"
            f" {record['steps']} steps",
            *describe_groups(record["learning_rates"]),
        ]
    )


def describe_extension(progress: Progress, group: Group, schedule: Schedule) -> str:
    """Return one line about the schedule of a run that is to be longer than it was."""
    peak = group.peak * ROLLBACK_FACTOR**progress.rollbacks
    next_rate, last_rate = peak * schedule(progress.step), peak * schedule(schedule.total_steps - 1)
    return (
        f"extended: {schedule.total_steps} steps in place of {progress.total_steps}; the {schedule.kind} schedule is"
        f" now that of {schedule.total_steps} steps: learning rate {next_rate:.3e} at step {progress.step + 1},"
        f" {last_rate:.3e} at the last"
    )


def describe_scores(scores: Mapping[str, float]) -> str:
    """Return an evaluation in one line."""
    return ", ".join(
        f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}" for name, value in scores.items()
    )
