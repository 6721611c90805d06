"""The run folder: what is written is whole, and what goes is said."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from taso_ds.data.encode import EncodedRow
from taso_ds.errors import UserError
from taso_ds.reports.metrics_file import METRICS
from taso_ds.runs.folder import PARTIAL, RUN, RunFolder, versions


def test_starting_again_removes_the_earlier_run_aloud_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder(tmp_path)
    folder.write_json(RUN, {"config": {}})
    (tmp_path / METRICS).write_text('{"step": 1}\n')
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "x").write_text("x")
    (tmp_path / "notes.txt").write_text("mine")
    with caplog.at_level(logging.INFO, "taso_ds"):
        folder.start()
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]
    said = f"output_dir: {tmp_path}: removes metrics.jsonl, adapter, run.json"
    assert [record.getMessage() for record in caplog.records] == [said]


def test_starting_in_a_new_folder_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "taso_ds"):
        RunFolder(tmp_path / "new").start()
        (tmp_path / "new" / PARTIAL).touch()
        RunFolder(tmp_path / "new").start()
    assert caplog.records == []


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
