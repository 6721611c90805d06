"""Ranks that cannot meet say so soon, and those that wait for others say for whom.

Ranks that do meet are in every test of several ranks.
"""

import os
import socket
import time
from typing import NoReturn

import pytest
import torch.distributed as dist
from launching import free_port

from taso_ds.distributed import meeting
from taso_ds.errors import UserError


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_RESOLVES_WITHIN", 0.1)
    monkeypatch.setattr(meeting, "_SAYS_EVERY", 0.1)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)


def be(rank: int, monkeypatch: pytest.MonkeyPatch, *, size: int = 2, address: str = "127.0.0.1") -> str:
    """Take a rank's variables; returns where they say that all meet."""
    port = free_port()
    variables = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": size, "MASTER_ADDR": address, "MASTER_PORT": port}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    return f"{address}:{port}"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_name_without_an_address_is_refused(
    rank: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rank 0 speaks for all; a rank that cannot reach it speaks for its own node."""

    def unknown(*_args: object) -> NoReturn:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    be(rank, monkeypatch, address="no-such-host")
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    wanted = f"MASTER_ADDR is 'no-such-host', which has no address on {socket.gethostname()} .Name or service not known"
    started = time.monotonic()
    with pytest.raises(UserError, match=wanted):
        meeting.meet(30.0)
    assert time.monotonic() - started < 3.0
    assert len(caplog.messages) == rank


def test_a_name_that_comes_with_its_host_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [socket.gaierror(socket.EAI_AGAIN, "not yet"), []]

    def resolve(*_args: object) -> object:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(meeting, "_RESOLVES_WITHIN", 20.0)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    meeting._check_resolves("node-a")
    assert not answers


def test_an_address_where_rank_0_does_not_find_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> NoReturn:
        raise ConnectionRefusedError(111, "Connection refused")

    be(0, monkeypatch, address="127.0.0.1")
    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(UserError, match=f"where {socket.gethostname()}, which has rank 0, does not reach itself"):
        meeting.meet(30.0)


def test_a_rank_says_that_rank_0_does_not_answer_and_gives_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    where = be(1, monkeypatch)
    with pytest.raises(UserError, match=f"cannot meet at {where}: rank 0 does not answer .Connection refused., for "):
        meeting.meet(2.5 / 60)
    here = f"rank 1 on {socket.gethostname()}"
    said = f"environment: {here} waits at {where}: rank 0 does not answer (Connection refused)"
    *waiting, last = caplog.messages
    assert set(waiting) == {said}
    assert last.startswith("error: environment: cannot meet at ")


def test_rank_0_says_how_many_have_come_and_gives_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    where = be(0, monkeypatch, size=3)
    wanted = f"cannot meet at {where}: 1 of 3 ranks have come, for 0 minutes; are all nodes started"
    with pytest.raises(UserError, match=wanted):
        meeting.meet(0.5 / 60)
    assert caplog.messages
    assert caplog.messages[0].endswith(f"waits at {where}: 1 of 3 ranks have come")


def test_rank_0_alone_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    be(0, monkeypatch, size=1)
    assert meeting.meet(30.0) is not None


def test_torchrun_starts_again_without_what_ended_the_first_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    where = be(0, monkeypatch, size=1)
    agents = dist.TCPStore("127.0.0.1", int(where.rpartition(":")[2]), is_master=True, wait_for_workers=False)
    agents.set("taso_ds/failed", "why")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not meeting.meet(30.0).check(["taso_ds/failed"])
    assert f"127.0.0.1:{os.environ['MASTER_PORT']}" != where, "where torch and DeepSpeed meet too"
    assert os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "False"


def test_many_ranks_look_less_often_at_their_one_store() -> None:
    assert meeting.look_every(2) == meeting.look_every(64) == 0.05
    assert 1024 / meeting.look_every(1024) == 2000
