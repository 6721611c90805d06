"""``--dry_run``: what a run would do, without weights, DeepSpeed or a GPU. Rows are only counted."""

import json

from taso_ds.config import RunConfig
from taso_ds.distributed.ds_config import without_secrets
from taso_ds.job import preflight
from taso_ds.runs.output_folder import choose_folder
from taso_ds.training.optim import describe_groups, learning_rate_table, make_schedule, total_steps


def describe(config: RunConfig, world_size: int, *, goes_on: bool) -> str:
    """Return the resolved configuration, DeepSpeed JSON, counts, learning rates and batch numbers as text.

    Args:
        goes_on: whether the run folder, if none is named, may be that of an unfinished run.

    Raises:
        UserError: for everything that a run would refuse before it loads weights, except what it refuses of the
            machine and of the rows as tokens. Rows of the Hub are not fetched where ``max_steps`` is set.
    """
    folder = choose_folder(config, goes_on=goes_on)
    has_length, reads_files = (
        config.training.max_steps > 0,
        (config.data.train_file or config.data.data_dir) is not None,
    )
    job = preflight(config, world_size, read_rows=reads_files or not has_length)
    groups = config.method.count(job.base, job.targets).groups
    total = sum(parameter.numel() for parameter in job.base.meta.parameters())
    steps, rows_in_words = config.training.max_steps, "rows not counted: max_steps is set"
    if job.data is not None:
        steps = total_steps(config.training, job.plan.steps_per_epoch)
        rows_in_words = f"{len(job.data.train)} rows, {job.plan.steps_per_epoch} steps per epoch"
    table = learning_rate_table(groups, make_schedule(config.training, steps))
    trainable = sum(row["parameters"] for row in table)
    known = {id(parameter) for parameter in job.base.meta.parameters()}
    added = (value for group in groups for value in group.parameters if id(value) not in known)
    everything = total + sum(value.numel() for value in added)
    lines = [
        "configuration:",
        json.dumps(config.flags(), indent=2),
        "deepspeed:",
        json.dumps(without_secrets(job.zero.raw), indent=2),
        f"run folder: {folder}",
        f"batch: {job.sizes.in_words()}",
        f"steps: {steps} ({rows_in_words})",
        f"targets: {len(job.targets)} matrices",
        *job.base_in_words(),
        f"parameters: {trainable:,} trainable of {everything:,} ({trainable / everything:.3%})",
        *describe_groups(table),
    ]
    return "\n".join(lines)
