"""The watch ends a rank that others have left behind, and no rank that has come to its end itself.

Whole jobs whose ranks fail, die or stand still are in ``tests/e2e/test_resume.py``.
"""

import os
import socket
import threading
from typing import NoReturn

import pytest
import torch.distributed as dist

from taso_ds.distributed import watch
from taso_ds.distributed.watch import Failure, Watch


class Ended(BaseException):
    pass


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """The watch of rank 1, without a job."""

    def end(code: int) -> NoReturn:
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(watch, "GRACE", 0.2)
    made = Watch.__new__(Watch)
    made._rank, made._leaving, made._speaking = 1, threading.Event(), threading.Lock()
    return made


GONE = Failure(0, 3, "rank 0 on a: its process is gone")


def test_a_rank_left_behind_ends_and_says_why(second: Watch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Ended) as ended:
        second._end(GONE)
    assert ended.value.args == (3,)
    assert capsys.readouterr().err.splitlines()[-1] == "error: rank 0 on a: its process is gone"


def test_a_rank_that_is_about_to_leave_is_not_ended_because_the_others_were_faster(second: Watch) -> None:
    """All have passed the last barrier; rank 0 has ended, this rank has not stopped its watch yet."""
    leaving = threading.Timer(0.05, second._leaving.set)
    leaving.start()
    second._end(GONE)
    leaving.join()


def test_whether_a_process_runs() -> None:
    assert watch._is_running(os.getpid())
    assert not watch._is_running(2**22 + 1)  # above the largest number a process can have


class LateStore(dist.Store):
    """A store in which rank 0 says why it ends just after this rank has looked, and ends then."""

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[str, bytes] = {watch._key("alive", 0): f"7 {socket.gethostname()} {2**22 + 1}".encode()}

    def check(self, keys: list[str]) -> bool:
        found = all(key in self._values for key in keys)
        if keys == [watch._FAILED]:
            self._values[watch._FAILED] = Failure(0, 75, "rank 0 on a: stopped by SIGUSR1").text.encode()
        return found

    def get(self, key: str) -> bytes:
        return self._values[key]

    def compare_set(self, key: str, expected_value: str, desired_value: str) -> bytes:
        return self._values.setdefault(key, desired_value.encode()) if not expected_value else b""


def test_a_rank_that_says_why_it_ends_while_others_look_is_believed(second: Watch) -> None:
    """By the time its process is found gone, the reason is there: it was stopped, not killed."""
    second._store = LateStore()
    second._host, second._signs = socket.gethostname(), {0: watch._Sign("", 0.0)}
    found = second._look()
    assert found is not None
    assert found.is_stop
    assert found.message == "rank 0 on a: stopped by SIGUSR1"
