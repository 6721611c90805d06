"""A lock that a killed run left is named."""

import logging
import os
import time
from pathlib import Path

import pytest

from taso_ds.distributed.extensions import joining_problem, warn_of_locks


def test_an_old_lock_is_named_and_a_new_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name in ("old", "new", "py311_cpu/older"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "lock").touch()
    for name in ("old", "py311_cpu/older"):
        os.utime(tmp_path / name / "lock", (time.time() - 100,) * 2)
    with caplog.at_level(logging.WARNING):
        warn_of_locks()
    named = [str(tmp_path / name / "lock") for name in ("old", "py311_cpu/older")]
    assert [next(name for name in named if name in line) for line in caplog.messages] == named
    assert all("remove it" in line for line in caplog.messages)


def test_no_folder_is_no_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "none"))
    warn_of_locks()
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "words",
    [
        "Unable to JIT load the deepspeed_shm_comm op due to ninja not being installed.",
        "Error building extension 'deepspeed_shm_comm': c++ not found",
    ],
)
def test_what_does_not_compile_is_no_trouble_of_the_network(words: str) -> None:
    said = joining_problem(RuntimeError(words), "gloo")
    assert words in said
    assert "C++ compiler and ninja" in said
    assert "ports" not in said
    assert "GLOO_SOCKET_IFNAME" in joining_problem(RuntimeError("connect timed out"), "gloo")
