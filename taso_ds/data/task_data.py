"""The rows of a run's task: those to train on, those to evaluate on, and where they come from in words."""

import dataclasses
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from taso_ds.data.arguments import DataArguments
from taso_ds.data.embedded import EMBEDDED_DATA, embedded_records
from taso_ds.data.records import Records, build_examples, load_records, read_jsonl
from taso_ds.data.tasks import Example, Task, get_task
from taso_ds.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TaskData:
    """Examples of both splits, and where they come from in words."""

    task: Task
    train: list[Example]
    evaluation: list[Example]
    train_source: str
    eval_source: str


def load_task_data(arguments: DataArguments, *, seed: int) -> TaskData:
    """Read both splits. Calibration rows are taken from the training split later.

    Args:
        seed: chooses the rows that ``eval_fraction`` holds out.

    Raises:
        UserError: missing, unreadable or ill-formed data, with file and line.
    """
    assert arguments.task is not None
    task = get_task(arguments.task)
    if arguments.eval_metric != "none":
        task = dataclasses.replace(task, metrics=(arguments.eval_metric,))
    train, evaluation = _read_both(arguments, task, seed)
    if arguments.max_train_samples is not None:
        train = train.first(arguments.max_train_samples)
    if arguments.max_eval_samples is not None:
        evaluation = evaluation.first(arguments.max_eval_samples)
    for name, records in (("train", train), ("evaluation", evaluation)):
        if not records.rows:
            raise UserError(f"{name} data: {records.source} has no rows")
    data = TaskData(
        task, build_examples(task, train), build_examples(task, evaluation), train.source, evaluation.source
    )
    if arguments.eval_fraction is not None:
        _warn_of_shared_prompts(data)
    return data


def check_held_out(arguments: DataArguments) -> None:
    """Refuse to evaluate on the file that is trained on, by whatever names; UserError."""
    train, evaluation = arguments.train_file, arguments.eval_file
    if train is not None and evaluation is not None and os.path.realpath(train) == os.path.realpath(evaluation):
        raise UserError(
            f"eval_file: {evaluation} is train_file: the run would be judged on rows that it has seen; name other rows,"
            " or hold some out with --eval_fraction 0.05 in place of --eval_file"
        )


def _read_both(arguments: DataArguments, task: Task, seed: int) -> tuple[Records, Records]:
    """Return the records to train on and those to evaluate on."""
    if arguments.data_dir == EMBEDDED_DATA:
        train = _embedded_part(task, 0, arguments.train_file)
    else:
        train = load_records(task, "train", data_dir=arguments.data_dir, file=arguments.train_file)
    if arguments.eval_fraction is not None:
        return train.hold_out(arguments.eval_fraction, seed=seed)
    if arguments.data_dir == EMBEDDED_DATA:
        return train, _embedded_part(task, 1, arguments.eval_file)
    if arguments.train_file is not None and arguments.eval_file is None and arguments.data_dir is None:
        raise UserError(
            "eval_file: --train_file needs rows to evaluate on: name them with --eval_file, or hold some of its own out"
            " with --eval_fraction 0.05"
        )
    return train, load_records(task, task.eval_split, data_dir=arguments.data_dir, file=arguments.eval_file)


def _embedded_part(task: Task, part: int, file: str | None) -> Records:
    if file is not None:
        return Records(read_jsonl(Path(file)), file)
    return embedded_records(task)[part]


def _warn_of_shared_prompts(data: TaskData) -> None:
    trained = {example.prompt for example in data.train}
    shared = sum(example.prompt in trained for example in data.evaluation)
    if shared:
        log.warning("%d of the %d held-out prompts are asked in the training rows too", shared, len(data.evaluation))
