"""Launchers that do something else than was asked for, and two runs at once on one node."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launching import ROOT, begin, finish, start
from sample_rows import write_splits

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.fixture
def flags(tmp_path: Path, llama_folder: Path) -> list[str]:
    return [
        *("--model_name_or_path", str(llama_folder), "--task", "completion", "--max_seq_length", "64"),
        *write_splits(tmp_path, 8, 2),
        *("--max_steps", "2", "--calibration_samples", "4"),
        *("--per_device_train_batch_size", "2", "--no_verify_export", "--ds_config", "zero2.json"),
    ]


def deepspeed(tmp_path: Path, words: list[str], flags: list[str]) -> "subprocess.Popen[str]":
    return begin(["-m", "deepspeed.launcher.runner", *words, ROOT / "launch" / "train.py", *flags], cwd=tmp_path)


def test_a_hostfile_that_does_not_exist_starts_nothing(tmp_path: Path, flags: list[str]) -> None:
    done = finish(deepspeed(tmp_path, ["--hostfile", "hosts.txt"], flags))
    assert done.code == 2
    (line,) = done.errors
    assert "--hostfile hosts.txt, which is no file here" in line
    assert not (tmp_path / "runs").exists()


def test_fewer_ranks_than_expected_start_nothing(tmp_path: Path, flags: list[str]) -> None:
    done = start("train", [*flags, "--expected_world_size", "4"], cwd=tmp_path)
    assert done.code == 2
    (line,) = done.errors
    assert "expected_world_size: 4 ranks were asked for and 1 came" in line


def test_two_runs_at_once_have_a_port_and_a_folder_each(tmp_path: Path, flags: list[str]) -> None:
    runs = [deepspeed(tmp_path, ["--num_gpus", "2"], flags) for _ in range(2)]
    finished = [finish(run).succeeded() for run in runs]
    last = {done.lines[-1] for done in finished}
    names = {"runs/taso-completion", "runs/taso-completion-2"}
    assert last == {f"RUN {name}" for name in names}
    adapters = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in sorted(names)]
    assert adapters[0] == adapters[1]
    for done in finished:  # what a rank, or a library, says of itself is not for the console
        assert len(set(done.lines)) == len(done.lines)
        assert not [line for line in [*done.lines, *done.err.splitlines()] if "built" in line or "Warning" in line]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", ["deepspeed.launcher.runner --num_gpus 2", "torch.distributed.run --nproc_per_node 2"]
)
def test_ctrl_c_at_a_terminal(launcher: str, tmp_path: Path, flags: list[str]) -> None:
    """Launcher and ranks get it at once; each launcher then has its own way to end the ranks, which save meanwhile."""
    command: list[str | Path] = ["-m", *launcher.split(), ROOT / "launch" / "train.py", *flags]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell
    process = begin([*command, "--max_steps", "3000", "--output_dir", "run"], cwd=tmp_path, session=True)
    signal.signal(signal.SIGINT, before)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n") > 2):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    done = finish(process)  # when the ranks are gone too: they hold its pipes
    step = len(metrics.read_text().splitlines())
    said = [line for line in done.err.splitlines() if line.startswith(("stopped by", "error: "))]
    assert said == [f"stopped by SIGINT after step {step}; the same command goes on from there"]
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:08d}" / "COMPLETE").is_file()
