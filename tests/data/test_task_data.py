"""The rows of a run: which are trained on, which are held out, and which are refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from taso_ds.data.arguments import DataArguments
from taso_ds.data.task_data import TaskData, check_held_out, load_task_data
from taso_ds.errors import UserError


def load(*, seed: int = 0, task: str = "completion", **arguments: Any) -> TaskData:
    return load_task_data(DataArguments(task=task, **arguments), seed=seed)


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    """Files of 40 training and 10 evaluation rows that no two share a text with."""
    files = {}
    for split, number in (("train", 40), ("eval", 10)):
        lines = [json.dumps({"prompt": f"{split} {n}:", "completion": f" {n * n}"}) for n in range(number)]
        file = tmp_path / f"{split}.jsonl"
        file.write_text("\n".join(lines) + "\n")
        files[f"{split}_file"] = str(file)
    return files


def test_the_first_rows_only(data: dict[str, Any]) -> None:
    loaded = load(**data, max_train_samples=7, max_eval_samples=3)
    assert (len(loaded.train), len(loaded.evaluation)) == (7, 3)
    assert loaded.train[0].prompt == "train 0:"
    assert loaded.evaluation[2].prompt == "eval 2:"
    assert loaded.train_source != loaded.eval_source


def test_rows_of_one_file_are_held_out(data: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    def prompts(**changes: Any) -> tuple[list[str], list[str]]:
        loaded = load(train_file=data["train_file"], eval_fraction=0.25, **changes)
        return [example.prompt for example in loaded.train], [example.prompt for example in loaded.evaluation]

    train, held_out = prompts()
    assert (len(train), len(held_out)) == (30, 10)
    assert {*train} | {*held_out} == {f"train {n}:" for n in range(40)}
    assert prompts() == (train, held_out)
    assert prompts(seed=1)[1] != held_out
    assert prompts(max_train_samples=5, max_eval_samples=2) == (train[:5], held_out[:2])
    assert not caplog.messages


def test_rows_are_held_out_of_any_tasks_training_split(tmp_path: Path) -> None:
    rows = [json.dumps({"question": f"{n}?", "answer": f"#### {n}"}) for n in range(8)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    arguments: dict[str, Any] = {"task": "gsm8k", "data_dir": str(tmp_path)}
    with pytest.raises(UserError, match=r"no test\.jsonl .*; --eval_fraction holds training rows out instead$"):
        load(**arguments)
    loaded = load(**arguments, eval_fraction=0.5)
    assert (len(loaded.train), len(loaded.evaluation)) == (4, 4)


def test_a_prompt_on_both_sides_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "again", "completion": "b"}\n' * 4)
    with caplog.at_level("WARNING", logger="taso_ds"):
        load(train_file=str(file), eval_fraction=0.5)
    assert caplog.messages == ["2 of the 2 held-out prompts are asked in the training rows too"]


def test_a_metric_is_measured_when_it_is_asked_for(data: dict[str, Any]) -> None:
    assert load(**data).task.metrics == ()
    assert load(**data, eval_metric="rouge").task.metrics == ("rouge",)


def test_training_rows_without_evaluation_rows_are_refused(data: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"eval_file: --train_file needs .*--eval_file.*--eval_fraction"):
        load(train_file=data["train_file"])


def test_rows_that_are_trained_on_are_no_measure(data: dict[str, Any], tmp_path: Path) -> None:
    check_held_out(DataArguments(**data))
    (tmp_path / "other.jsonl").symlink_to(data["train_file"])
    for name in (data["train_file"], str(tmp_path / "other.jsonl")):
        with pytest.raises(UserError, match=r"eval_file: .* is train_file: .*--eval_fraction 0\.05"):
            check_held_out(DataArguments(train_file=data["train_file"], eval_file=name))
