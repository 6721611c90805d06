"""What ``run.json`` says of a run, and the same in words."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from torch import nn

from taso_ds.config import RunConfig
from taso_ds.distributed import comm, zero
from taso_ds.distributed.ds_config import without_secrets
from taso_ds.files.schema import SCHEMA
from taso_ds.job import Job
from taso_ds.models.quantization import num_parameters
from taso_ds.runs.folder import versions
from taso_ds.training.optim import Group, GroupRow, Schedule, describe_groups
from taso_ds.training.progress import Progress
from taso_ds.training.recoverable import ROLLBACK_FACTOR


class Counts(TypedDict):
    """Numbers of parameters; ``share`` is trainable / total."""

    trainable: int
    total: int
    share: float


def count_parameters(model: nn.Module, groups: Sequence[Group]) -> Counts:
    """Count what is trained, and the whole model with it."""
    trainable = sum(zero.full_numel(value) for group in groups for value in group.parameters)
    total = num_parameters(model)
    return {"trainable": trainable, "total": total, "share": trainable / total}


def record_start(asked: RunConfig, job: Job) -> dict[str, object]:
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
    asked: RunConfig, job: Job, counts: Counts, schedule: Schedule, rates: Sequence[GroupRow]
) -> dict[str, object]:
    """Return the content of a training run's ``run.json``.

    Args:
        asked: the configuration as the user gave it.
        job: what is run, which may have the batches of an earlier run.
        rates: of every group.
    """
    return record_start(asked, job) | {
        "parameters": counts,
        "batch": dataclasses.asdict(job.sizes) | {"global_batch_size": job.sizes.global_batch_size},
        "steps": schedule.total_steps,
        "learning_rates": rates,
        "data": {"train": job.examples.train_source, "evaluation": job.examples.eval_source},
    }


def describe_record(counts: Counts, schedule: Schedule, rates: Sequence[GroupRow]) -> str:
    """Return counts and learning rates as lines."""
    return "\n".join(
        [
            f"parameters: {counts['trainable']:,} trainable of {counts['total']:,} ({counts['share']:.3%});"
            f" {schedule.total_steps} steps",
            *describe_groups(rates),
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
