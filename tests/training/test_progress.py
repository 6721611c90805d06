"""What a run that goes on compares with: the record of its checkpoint, and the flags."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from taso_ds.config import RunConfig, parse_run_config
from taso_ds.errors import UserError
from taso_ds.training.checkpoint import PROGRESS
from taso_ds.training.resume import HARMLESS, Progress, Start, differences, read_progress


def config_of(*flags: str) -> RunConfig:
    return parse_run_config(["--model_name_or_path", "base", "--task", "rte", *flags])


def recorded(*flags: str) -> dict[str, Any]:
    """Flags as a JSON file holds them."""
    values: dict[str, Any] = json.loads(json.dumps(config_of(*flags).flags()))
    return values


PROGRESS_NOW = Progress(
    step=4, total_steps=9, optimizer_steps=4, config=recorded(), world_size=2, zero_stage=3, global_batch_size=8,
    base="b", data="d", before={"loss": 1.5}, recent_losses=[1.0, 0.5], rollbacks=0,
)  # fmt: skip


def write(folder: Path, **changes: Any) -> Path:
    (folder / PROGRESS).write_text(json.dumps(dataclasses.asdict(PROGRESS_NOW) | changes))
    return folder


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_progress(write(tmp_path)) == PROGRESS_NOW


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"step": "4"}, "step is not of type"),
        ({"config": []}, "config is not of type"),
        ({"before": 3}, "before is not of type"),
        ({"more": 1}, "not the record of a checkpoint"),
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


def test_equal_flags_do_not_differ() -> None:
    assert differences(recorded("--seed", "3"), config_of("--seed", "3", "--output_dir", "x", "--debug")) == []


def test_differences_are_marked_and_those_that_count_come_first() -> None:
    found = differences(recorded(), config_of("--seed", "3", "--logging_steps", "5", "--ds_config", "zero2.json"))
    assert [(entry.name, entry.is_harmless) for entry in found] == [
        ("seed", False),
        ("ds_config", True),
        ("logging_steps", True),
    ]
    assert str(found[0]) == "seed: 0 there, 3 here (changes the run)"


def test_a_global_batch_that_is_not_asked_for_is_kept() -> None:
    assert differences(recorded("--global_batch_size", "8"), config_of()) == []
    (other,) = differences(recorded("--global_batch_size", "8"), config_of("--global_batch_size", "16"))
    assert not other.is_harmless
    adapted = Start(global_batch_size=8).adapt(config_of())
    assert adapted.training.global_batch_size == 8
    assert Start().adapt(config_of()) == config_of()


def test_every_harmless_flag_exists() -> None:
    assert recorded().keys() >= HARMLESS
