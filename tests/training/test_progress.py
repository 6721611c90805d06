"""What a run that goes on compares with: the record of its checkpoint, and the flags."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from configs import config_of

from taso_ds.errors import UserError
from taso_ds.runs.resume import Start
from taso_ds.training.arguments import batch_sizes
from taso_ds.training.checkpoint import PROGRESS
from taso_ds.training.progress import Progress, read_progress


def recorded(*flags: str) -> dict[str, Any]:
    """Flags as a JSON file holds them."""
    values: dict[str, Any] = json.loads(json.dumps(config_of(*flags).flags()))
    return values


PROGRESS_NOW = Progress(
    step=4, total_steps=9, optimizer_steps=4, config=recorded(), world_size=2, zero_stage=3, global_batch_size=8,
    base="b", data="d", before={"loss": 1.5}, recent_losses=[1.0, 0.5], rollbacks=0,
)  # fmt: skip


LATER = ("schema_version", "started_in")  # than the first schema


def write(folder: Path, **changes: Any) -> Path:
    (folder / PROGRESS).write_text(json.dumps(dataclasses.asdict(PROGRESS_NOW) | changes))
    return folder


def test_a_record_of_the_first_schema_is_read(tmp_path: Path) -> None:
    first = {name: value for name, value in dataclasses.asdict(PROGRESS_NOW).items() if name not in LATER}
    (tmp_path / PROGRESS).write_text(json.dumps(first))
    assert read_progress(tmp_path) == PROGRESS_NOW


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_progress(write(tmp_path)) == PROGRESS_NOW


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"step": "4"}, "step is not of type"),
        ({"config": []}, "config is not of type"),
        ({"before": 3}, "before is not of type"),
        ({"more": 1}, "not the record of a checkpoint"),
        ({"more": 1, "schema_version": 3}, "written by a newer taso_ds .schema_version 3, this one reads up to 2."),
        ({"schema_version": "2"}, "written by a newer"),
    ],
)
def test_anything_else_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_progress(write(tmp_path, **changes))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"step": 1}', "\x00"])
def test_damaged_records_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / PROGRESS).write_text(content)
    with pytest.raises(UserError, match="not the record of a checkpoint"):
        read_progress(tmp_path)


def test_a_run_that_goes_on_keeps_its_global_batch() -> None:
    adapted = Start(global_batch_size=8).adapt(config_of(), 1)
    assert adapted.training.global_batch_size == 8
    assert Start().adapt(config_of(), 3) == config_of()


@pytest.mark.parametrize(
    ("flags", "ranks", "sizes"),
    [
        ("", 1, (4, 2)), ("", 2, (4, 1)), ("", 4, (2, 1)), ("--gradient_accumulation_steps 2", 2, (4, 1)),
        ("--global_batch_size 8 --per_device_train_batch_size 3", 2, (2, 2)),
    ],
    ids=str,
)  # fmt: skip
def test_the_same_command_fits_its_batches_to_other_ranks(flags: str, ranks: int, sizes: tuple[int, int]) -> None:
    adapted = Start(global_batch_size=8).adapt(config_of(*flags.split()), ranks)
    found = batch_sizes(adapted.training, ranks)
    assert (found.micro_batch_size, found.grad_accum_steps) == sizes
    assert found.global_batch_size == 8


def test_ranks_that_cannot_share_a_global_batch_are_refused() -> None:
    with pytest.raises(UserError, match="resume: 3 ranks cannot share the 8 rows of each step of this run"):
        Start(global_batch_size=8).adapt(config_of(), 3)
