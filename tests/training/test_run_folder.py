"""The run folder: who may write where, and that what is written is whole."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from taso_ds.config import RunConfig, parse_run_config
from taso_ds.data.encode import EncodedRow
from taso_ds.errors import UserError
from taso_ds.training.recorded import read_run
from taso_ds.training.run_folder import METRICS, PARTIAL, RUN, RunFolder, choose_folder, versions


def config_of(path: Path | None, *flags: str) -> RunConfig:
    where = [] if path is None else ["--output_dir", str(path)]
    return parse_run_config(["--model_name_or_path", "base", "--task", "rte", *where, *flags])


def finished(path: Path, *flags: str) -> RunFolder:
    """A folder with the run of these flags in it."""
    folder = RunFolder(path)
    folder.start()
    folder.write_json(RUN, {"config": config_of(path, *flags).flags()})
    return folder


# Who may write where --------------------------------------------------------------------------------------------------


def test_a_new_or_empty_folder_is_taken_and_not_created_yet(tmp_path: Path) -> None:
    assert choose_folder(config_of(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    assert not (tmp_path / "a").exists()
    (tmp_path / "empty").mkdir()
    assert choose_folder(config_of(tmp_path / "empty")) == tmp_path / "empty"


def test_the_same_run_may_be_repeated(tmp_path: Path) -> None:
    finished(tmp_path / "run", "--learning_rate", "1e-3", "--target_modules", "q_proj")
    again = config_of(tmp_path / "run", "--learning_rate", "1e-3", "--target_modules", "q_proj", "--debug")
    assert choose_folder(again) == tmp_path / "run"  # how it is started is no difference


def test_what_a_run_left_before_its_first_record_is_no_hindrance(tmp_path: Path) -> None:
    for name in (PARTIAL, f".{PARTIAL}.tmp"):
        (tmp_path / name).write_text("...")
    assert choose_folder(config_of(tmp_path)) == tmp_path


def test_metrics_of_steps_that_are_done_again_are_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        folder.log({"step": step})
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 4, "lo')  # the process was killed while it wrote
    folder.forget_after(2)
    assert [json.loads(line)["step"] for line in (tmp_path / METRICS).read_text().splitlines()] == [1, 2]


def test_a_folder_that_holds_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        choose_folder(config_of(tmp_path))
    with pytest.raises(UserError, match="is a file"):
        choose_folder(config_of(tmp_path / "thesis.tex"))


@pytest.mark.parametrize("content", ["{", "[]", '{"config": 3}', ""])
def test_a_damaged_run_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / RUN).write_text(content)
    with pytest.raises(UserError, match=r"run\.json: (not a readable run|has no config)"):
        read_run(tmp_path)


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match="cannot write"):
        choose_folder(config_of(tmp_path / "locked" / "run"))


def test_a_path_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        choose_folder(config_of(tmp_path / "file" / "run"))


def test_without_a_name_the_first_free_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = []
    for _ in range(3):
        path = choose_folder(config_of(None))
        path.mkdir(parents=True)
        found.append(str(path))
    assert found == ["runs/taso-rte", "runs/taso-rte-2", "runs/taso-rte-3"]
    assert str(choose_folder(config_of(None, "--method", "lora"))) == "runs/lora-rte"


# What is written ------------------------------------------------------------------------------------------------------


def test_starting_again_removes_the_earlier_run_and_nothing_else(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    folder.log({"step": 1})
    folder.write_folder("adapter", lambda path: (path / "x").write_text("x"))
    (tmp_path / "notes.txt").write_text("mine")
    folder.start()
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]


def test_json_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    folder.write_json("results.json", {"a": 1, "name": "µ"})
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == {"a": 1, "name": "µ"}

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match=r"results\.json \(disk full\): make room"):
        folder.write_json("results.json", {"a": 2})
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["a"] == 1  # the old one stands


def test_a_folder_exists_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)

    def half(path: Path) -> None:
        (path / "one").write_text("1")
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError):
        folder.write_folder("adapter", half)
    assert not (tmp_path / "adapter").exists()
    folder.write_folder("adapter", lambda path: (path / "two").write_text("2"))
    assert [file.name for file in (tmp_path / "adapter").iterdir()] == ["two"]  # nothing of the first attempt
    with pytest.raises(RuntimeError):
        folder.write_folder("adapter", half)
    assert [file.name for file in (tmp_path / "adapter").iterdir()] == ["two"]
    folder.write_folder("adapter", lambda path: (path / "three").write_text("3"))
    assert [file.name for file in (tmp_path / "adapter").iterdir()] == ["three"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


def test_metrics_are_lines_in_order(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (1, 2):
        folder.log({"step": step, "loss": 0.5})
    lines = (tmp_path / METRICS).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}]


def test_rows_hold_what_is_needed_to_score_again(tmp_path: Path) -> None:
    rows = [
        EncodedRow([1, 5, 6], [-100, -100, 6]),
        EncodedRow([1, 7], [], target=1, token_type_ids=[0, 1]),
        EncodedRow([1, 8], [], target=2.5),
    ]
    RunFolder(tmp_path).write_rows("calibration.jsonl", rows)
    lines = [json.loads(line) for line in (tmp_path / "calibration.jsonl").read_text().splitlines()]
    assert lines == [
        {"input_ids": [1, 5, 6], "labels": [-100, -100, 6]},
        {"input_ids": [1, 7], "labels": 1, "token_type_ids": [0, 1]},
        {"input_ids": [1, 8], "labels": 2.5},
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == ["calibration.jsonl"]


def test_versions_name_what_decides_the_numbers() -> None:
    import torch

    found = versions()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"python", "taso_ds", "deepspeed", "transformers", "peft"} <= set(found)
