"""The record of a run, whichever version wrote it: flags that came later, paths, and what a configuration changes."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from configs import config_of

from taso_ds.config import GROUPS, RunConfig
from taso_ds.errors import UserError
from taso_ds.flags.flag import arg
from taso_ds.methods.folders import ADAPTER
from taso_ds.runs import recorded
from taso_ds.runs.finished_arguments import EVALUATE, parse_over_run
from taso_ds.runs.folder import RUN
from taso_ds.runs.recorded import RunRecord, differences, read_run, recorded_flags
from taso_ds.training.arguments import TrainArguments

FILE = Path("run.json")


def record_of(*flags: str, **more: object) -> RunRecord:
    """A record as a JSON file holds it."""
    record: RunRecord = json.loads(json.dumps({"config": config_of(*flags).flags(), **more}))
    return record


def write(folder: Path, record: RunRecord) -> Path:
    (folder / ADAPTER).mkdir(parents=True, exist_ok=True)  # as a run that has finished
    (folder / RUN).write_text(json.dumps(record))
    return folder


# What differs ---------------------------------------------------------------------------------------------------------


def test_equal_flags_do_not_differ() -> None:
    again = config_of("--seed", "3", "--output_dir", "x", "--debug")
    assert differences(record_of("--seed", "3"), again, FILE) == []


def test_differences_are_marked_and_those_that_count_come_first() -> None:
    here = config_of("--seed", "3", "--logging_steps", "5", "--ds_config", "zero2.json", "--max_steps", "9")
    found = differences(record_of(), here, FILE)
    assert [(entry.name, entry.is_harmless, entry.is_length) for entry in found] == [
        ("max_steps", False, True),
        ("seed", False, False),
        ("ds_config", True, False),
        ("logging_steps", True, False),
    ]
    assert str(found[1]) == "seed: 0 there, 3 here (changes the run)"


def test_a_global_batch_that_is_not_asked_for_is_kept() -> None:
    record = record_of("--global_batch_size", "8")
    assert differences(record, config_of(), FILE) == []
    (other,) = differences(record, config_of("--global_batch_size", "16"), FILE)
    assert not other.is_harmless


# Other versions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Later(TrainArguments):
    """The loop of a later version."""

    packing: bool = arg(False, "Came later; as before by default.")
    clip: float = arg(2.0, "Came later, and is better; before it was 1.", before=1.0)


def later(config: RunConfig, **flags: Any) -> RunConfig:
    return dataclasses.replace(config, training=Later(**dataclasses.asdict(config.training), **flags))


@pytest.fixture
def _later_version(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = tuple(Later if group is TrainArguments else group for group in GROUPS)
    monkeypatch.setattr(recorded, "GROUPS", groups)


@pytest.mark.usefixtures("_later_version")
def test_a_run_that_is_older_than_a_flag_had_what_was_usual_then() -> None:
    older = record_of("--seed", "3")
    assert differences(older, later(config_of("--seed", "3"), clip=1.0), FILE) == []
    found = differences(older, later(config_of("--seed", "3"), packing=True), FILE)
    assert [(entry.name, entry.there, entry.here) for entry in found] == [("clip", 1.0, 2.0), ("packing", False, True)]
    values = recorded_flags(older, FILE)
    assert (values["packing"], values["clip"], values["seed"]) == (False, 1.0, 3)


def test_a_flag_of_a_newer_version_is_named(tmp_path: Path) -> None:
    record = record_of()
    record["config"]["telepathy"] = True
    run = write(tmp_path / "run", record)
    with pytest.raises(UserError, match=r"run\.json: was written by a newer taso_ds: .* its flag 'telepathy'"):
        differences(record, config_of(), run / RUN)
    with pytest.raises(UserError, match="'telepathy'"):
        parse_over_run(["--run", str(run)], verb=EVALUATE)


def test_a_schema_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    run = write(tmp_path / "run", record_of(schema_version=3))
    with pytest.raises(UserError, match=r"newer taso_ds \(schema_version 3, this one reads up to 2\): install"):
        read_run(run)
    assert read_run(write(tmp_path / "first", record_of()))["config"]["task"] == "completion"


@pytest.mark.parametrize("content", ["{", "[]", '{"config": 3}', ""])
def test_a_damaged_run_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / RUN).write_text(content)
    with pytest.raises(UserError, match=r"run\.json: (not a readable run|has no config)"):
        read_run(tmp_path)


# Paths ----------------------------------------------------------------------------------------------------------------

PATHS = ("--train_file", "rows/train.jsonl", "--data_dir", "embedded", "--ds_config", "zero2.json")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder in which a run was started with relative paths."""
    project = tmp_path / "project"
    (project / "rows").mkdir(parents=True)
    (project / "rows" / "train.jsonl").touch()
    (project / "embedded").mkdir()  # a word all the same
    return project


def test_relative_paths_lead_to_where_the_run_began(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write(project / "run", record_of(*PATHS, "--eval_file", "gone.jsonl", started_in=str(project)))
    monkeypatch.chdir(project.parent)
    config, _ = parse_over_run(["--run", str(run)], verb=EVALUATE)
    assert config.data.train_file == str(project / "rows" / "train.jsonl")
    assert (config.data.data_dir, config.run.ds_config) == ("embedded", "zero2.json")
    assert config.model.model_name_or_path == "base", "a Hub id stays one"
    assert config.data.eval_file == "gone.jsonl"
    own, _ = parse_over_run(["--run", str(run), "--train_file", "mine.jsonl"], verb=EVALUATE)
    assert own.data.train_file == "mine.jsonl"


def test_records_of_the_first_schema_keep_their_paths(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write(project / "run", record_of(*PATHS))
    monkeypatch.chdir(project)
    assert parse_over_run(["--run", str(run)], verb=EVALUATE)[0].data.train_file == "rows/train.jsonl"


def test_paths_are_compared_by_where_they_lead(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = record_of(*PATHS, started_in=str(project))
    monkeypatch.chdir(project / "rows")
    (project.parent / "link").symlink_to(project)
    for same in ("train.jsonl", str(project / "rows" / "train.jsonl"), str(project.parent / "link/rows/train.jsonl")):
        assert differences(record, config_of(*PATHS, "--train_file", same), FILE) == [], same
    (project / "rows" / "other.jsonl").touch()
    (other,) = differences(record, config_of(*PATHS, "--train_file", "other.jsonl"), FILE)
    assert other.there == str(project / "rows" / "train.jsonl")


def test_the_same_words_are_the_same_path(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work folders of jobs are copies of one another; the digests of rows and base tell whether they are."""
    record = record_of(*PATHS, started_in=str(project))
    (project.parent / "copy").mkdir()
    monkeypatch.chdir(project.parent / "copy")
    assert differences(record, config_of(*PATHS), FILE) == []
