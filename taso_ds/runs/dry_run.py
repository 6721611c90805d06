"""``--dry_run``: what a run would do, without weights, DeepSpeed or a GPU; data is read only to count its rows."""

import json

from taso_ds.config import RunConfig
from taso_ds.data.batch_plan import BatchPlan
from taso_ds.data.task_data import check_held_out, load_task_data
from taso_ds.data.tasks import get_task
from taso_ds.distributed.ds_config import without_secrets
from taso_ds.models.spec import read_spec
from taso_ds.runs import prepare
from taso_ds.runs.output_folder import choose_folder
from taso_ds.scoring.regions import read_regions
from taso_ds.training.optim import describe_groups, learning_rate_table, make_schedule, total_steps


def describe(config: RunConfig, world_size: int, *, goes_on: bool) -> str:
    """Return the resolved configuration, DeepSpeed JSON, counts, learning rates and batch numbers as text.

    Args:
        goes_on: without a name, the run folder may be that of an unfinished run.

    Raises:
        UserError: for everything a run would refuse before loading weights, data apart when ``max_steps`` is set.
    """
    assert config.data.task is not None
    task = get_task(config.data.task)
    check_held_out(config.data)
    folder = choose_folder(config, goes_on=goes_on)
    zero, sizes = prepare.resolve_deepspeed(config, world_size)
    base = read_spec(config.model, num_labels=task.num_labels)
    prepare.check_length(config, base)
    prepare.check_labels(task, head=base.head)
    targets = prepare.targets_of(config, base)
    prepare.check_base(config, base, zero, targets)
    read_regions(config, targets.shapes)
    groups = config.method.count(base, targets).groups
    total = sum(parameter.numel() for parameter in base.meta.parameters())
    steps, rows_in_words = config.training.max_steps, "rows not counted: max_steps is set"
    if steps <= 0:
        data = load_task_data(config.data, seed=config.run.seed)
        plan = BatchPlan(len(data.train), sizes.global_batch_size, seed=config.run.seed)
        steps = total_steps(config.training, plan.steps_per_epoch)
        rows_in_words = f"{len(data.train)} rows, {plan.steps_per_epoch} steps per epoch"
    schedule = make_schedule(config.training, steps)
    table = learning_rate_table(groups, schedule)
    trainable = sum(row["parameters"] for row in table)
    known = {id(parameter) for parameter in base.meta.parameters()}
    added = (value for group in groups for value in group.parameters if id(value) not in known)
    everything = total + sum(value.numel() for value in added)
    lines = [
        "configuration:",
        json.dumps(config.flags(), indent=2),
        "deepspeed:",
        json.dumps(without_secrets(zero.raw), indent=2),
        f"run folder: {folder}",
        f"batch: {sizes.in_words()}",
        f"steps: {steps} ({rows_in_words})",
        f"targets: {len(targets)} matrices",
        *prepare.base_in_words(config, base, targets),
        f"parameters: {trainable:,} trainable of {everything:,} ({trainable / everything:.3%})",
        *describe_groups(table),
    ]
    return "\n".join(lines)
