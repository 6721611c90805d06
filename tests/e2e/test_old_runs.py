"""Runs of an earlier version go on: resumed (also across a flag that came later), extended, evaluated, merged."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from launching import ROOT, call_main
from safetensors.torch import load_file

from taso_ds import config
from taso_ds.flags.flag import arg
from taso_ds.runs import recorded
from taso_ds.training.arguments import TrainArguments

COMMAND = [
    *(
        "--model_name_or_path", "base", "--task", "completion", "--train_file", "train.jsonl", "--eval_file",
        "eval.jsonl",
    ),
    *("--max_seq_length", "48", "--no_bf16", "--ds_config", "zero2.json", "--max_steps", "6", "--save_steps", "3"),
    *("--per_device_train_batch_size", "2", "--global_batch_size", "4", "--calibration_samples", "8"),
    *("--learning_rate", "1e-2"),
]  # fmt: skip
ADAPTER = Path("adapter") / "taso_adapter.safetensors"


@dataclass(frozen=True)
class Later(TrainArguments):
    """The loop of a later version."""

    packing: bool = arg(False, "Came later; as before by default.")


@pytest.fixture(autouse=True)
def _moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs stand elsewhere than where they were made, with base and rows beside them as then."""
    shutil.copytree(ROOT / "tests" / "runs" / "old_runs", tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")


def assert_goes_on_to_what_finished(flags: list[str]) -> None:
    done = call_main("train", [*COMMAND, "--output_dir", "interrupted", *flags]).succeeded()
    assert "goes on after step 3" in done.out
    steps = [json.loads(line)["step"] for line in Path("interrupted/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
    there, here = load_file(Path("finished") / ADAPTER), load_file(Path("interrupted") / ADAPTER)
    assert there.keys() == here.keys()
    for name, tensor in there.items():
        torch.testing.assert_close(here[name], tensor, rtol=1e-4, atol=1e-6)


def test_an_interrupted_run_goes_on() -> None:
    assert_goes_on_to_what_finished([])


def test_an_interrupted_run_goes_on_across_a_flag_that_came_later(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = tuple(Later if group is TrainArguments else group for group in config.GROUPS)
    for module in (config, recorded):
        monkeypatch.setattr(module, "GROUPS", groups)
    refused = call_main("train", [*COMMAND, "--output_dir", "interrupted", "--packing"])
    assert refused.code == 2
    assert "packing: False there, True here" in refused.err
    assert_goes_on_to_what_finished([])


def test_a_finished_run_is_not_done_again() -> None:
    done = call_main("train", [*COMMAND, "--output_dir", "finished"]).succeeded()
    assert "holds this run, finished" in done.out


def test_a_finished_run_is_extended() -> None:
    flags = ["8" if flag == "6" else flag for flag in COMMAND]
    done = call_main("train", [*flags, "--output_dir", "finished"]).succeeded()
    assert "extended: 8 steps in place of 6" in done.out


def test_a_finished_run_is_evaluated_proved_and_merged() -> None:
    after = json.loads(Path("finished/results.json").read_text())["after"]
    found = json.loads(call_main("evaluate", ["--run", "finished"]).succeeded().lines[-1])
    assert found["loss"] == pytest.approx(after["loss"], rel=1e-5)
    assert "opened with peft" in call_main("export", ["--run", "finished"]).succeeded().out
    assert call_main("export", ["--run", "finished", "--merge"]).succeeded().lines[-1] == "EXPORT finished/model"
