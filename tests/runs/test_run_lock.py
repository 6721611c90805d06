"""The lock of a run folder, between real processes: one holds it, its death opens it, nothing of it stays."""

import errno
import fcntl
import json
import logging
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from other_process import holding

from taso_ds.errors import UserError
from taso_ds.runs.run_lock import LOCK, InUse, holder, locked


def test_a_second_process_is_refused_by_name_until_the_first_is_killed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with holding(run) as process:
        words = rf"{run} is in use by process {process.pid} on {socket.gethostname()} since 20.*choose another"
        with pytest.raises(InUse, match=words), locked(run):
            pytest.fail("two have it")
        before = (run / LOCK).read_bytes()
        assert f"process {process.pid} on " in (holder(run) or "")
        assert (run / LOCK).read_bytes() == before
        process.kill()
        process.wait()
        assert holder(run) is None
        with locked(run):
            assert json.loads((run / LOCK).read_text())["process"] == os.getpid()


def test_a_forked_child_does_not_keep_it(tmp_path: Path) -> None:
    with holding(tmp_path, "fork") as process:
        process.wait()  # its child sleeps
        with locked(tmp_path):
            pass


def test_nothing_of_it_stays(tmp_path: Path) -> None:
    with locked(tmp_path / "runs" / "a") as folder:
        assert [path.name for path in folder.iterdir()] == [LOCK]
    assert list(tmp_path.iterdir()) == [], "the folders that it made are empty, and go"
    with pytest.raises(UserError, match="a mistake"), locked(tmp_path / "runs" / "a"):
        raise UserError("a mistake")
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "runs" / "a") as folder:
        (folder / "run.json").touch()
    assert [path.name for path in folder.iterdir()] == ["run.json"]
    with locked(folder):
        pass
    assert folder.is_dir()


def test_a_new_folder_is_made_by_one_only(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(InUse, match="has just created it"), locked(tmp_path / "run", new=True):
        pytest.fail("two have it")
    assert (tmp_path / "run").is_dir()


def test_a_file_that_its_owner_removes_meanwhile_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lockf, calls = fcntl.lockf, []

    def slow(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 1:
            (tmp_path / LOCK).unlink()
        lockf(*args)

    monkeypatch.setattr(fcntl, "lockf", slow)
    with locked(tmp_path):
        assert (tmp_path / LOCK).is_file()
    assert len(calls) == 2


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", fail)
    with caplog.at_level(logging.WARNING, "taso_ds"), locked(tmp_path):
        pass
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
        f"run folder: the file system of {tmp_path} knows no locks"
    ]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 1}', "\xff"])
def test_what_a_killed_owner_left_is_no_hindrance(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK).write_text(text, encoding="latin-1")
    assert holder(tmp_path) is None
    with locked(tmp_path):
        pass
