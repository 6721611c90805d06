"""Nobody waits for a rank that is gone: every rank tells the others that it is alive, and what made it fail.

A collective returns only when all ranks come. A rank that died, or gave up with an error, would leave the others
waiting for half an hour, until the backend's time-out. So a thread of every rank writes a sign of life into the job's
key-value store, through which the ranks met, every other second. Rank 0's thread watches all ranks, the others' watch
rank 0 and the ranks of their own node. A rank that fails leaves its message in the store. Each rank ends when it finds
such a message, or a process that is gone, or no sign of a rank for ``SILENCE`` seconds. Where a cable is cut, calls to
the store do not return; then a second thread ends the rank.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from taso_ds.console import screen as console
from taso_ds.distributed import meeting

INTERVAL = 2.0
# Long enough for a library that holds the interpreter's lock, short enough to end within half a minute.
SILENCE = 20.0
# A rank that meets the same error as the failed one will say so itself within this time.
GRACE = 3.0
_STORE_IS_GONE = (RuntimeError, ValueError)
_FAILED = "taso_ds/failed"


@dataclass(frozen=True)
class Failure:
    """Which rank failed, with which exit code, and why."""

    rank: int
    code: int
    message: str

    @classmethod
    def read(cls, text: bytes) -> "Failure":
        """Return what a rank left in the store as ``text``."""
        rank, code, message = text.decode().split("\n", 2)
        return cls(int(rank), int(code), message)

    @property
    def text(self) -> str:
        """The failure as it stands in the store."""
        return f"{self.rank}\n{self.code}\n{self.message}"

    @property
    def is_stop(self) -> bool:
        """Say whether a signal had asked the rank to stop, which is no error."""
        return self.code in (75, 130)

    @property
    def line(self) -> str:
        """Return what the user is told."""
        return self.message if self.is_stop else f"error: {self.message}"


@dataclass
class _Sign:
    """The last sign of life of a rank, and when it was seen first, on this rank's clock."""

    text: str
    since: float

    def process(self) -> tuple[str, int] | None:
        """Return host and process id; None before the first sign."""
        parts = self.text.split()
        return (parts[1], int(parts[2])) if parts else None


class Watch:
    """The signs of life of one rank, and its eye on the others'."""

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        # A connection of its own: a blocked call on the shared one would hold back the signs.
        self._store: dist.Store = store.clone()  # type: ignore[attr-defined]  # the stubs of torch lack it
        self._rank, self._world_size = rank, world_size
        self._host = socket.gethostname()
        self._signs = {rank: _Sign("", time.monotonic()) for rank in range(self._world_size) if rank != self._rank}
        self._beats = self._meetings = self._rounds = 0
        self._leaving = threading.Event()
        self._speaking = threading.Lock()  # taken once, by whoever says why this process ends
        self._beat()
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._run, self._guard)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the watch; the job has come to its end on all ranks."""
        self._leaving.set()
        for thread in self._threads:
            thread.join()

    def meet(self) -> None:
        """Wait until all ranks have come here, for as long as they are alive: no backend's time-out runs meanwhile."""
        self._meetings += 1
        key = _key("meeting", self._meetings)
        self._store.add(key, 1)
        while self._store.add(key, 0) < self._world_size:
            time.sleep(meeting.look_every(self._world_size))

    def cause_elsewhere(self, wait: float) -> Failure | None:
        """Return what happened to another rank, which this one's trouble may come from; looks for ``wait`` seconds."""
        deadline = time.monotonic() + wait
        while True:
            found = self._look()
            if found is not None and found.rank != self._rank:
                return found
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.2)

    def speaks(self, failure: Failure | None = None) -> bool:
        """Say whether this rank is to tell the user; true once. Rank 0 speaks for all, unless rank 0 has failed."""
        is_speaker = self._rank == 0 or (failure is not None and failure.rank == 0)
        return is_speaker and self._speaking.acquire(blocking=False)

    def tell(self, message: str, code: int) -> None:
        """Leave the reason why this rank ends, unless there is one already, and wait until the others have read it."""
        where = f"rank {self._rank} on {self._host}"
        with contextlib.suppress(*_STORE_IS_GONE):  # then its rank is what the others find
            self._tell(Failure(self._rank, code, f"{where}: {message}").text)

    def _tell(self, failure: str) -> None:
        self._store.compare_set(_FAILED, "", failure)
        self._store.set(_key("gone", self._rank), "")
        deadline = time.monotonic() + INTERVAL + GRACE + 1.0
        others = [_key("gone", rank) for rank in self._signs]
        while self._rank == 0 and not self._store.check(others) and time.monotonic() < deadline:
            time.sleep(0.1)  # the store may live in this process

    def _run(self) -> None:
        while not self._leaving.wait(INTERVAL):
            self._beat()
            failure = self._look()
            # A rank that fails ends by itself; on leaving, others may be gone already.
            if failure is not None and failure.rank != self._rank and not self._leaving.is_set():
                self._end(failure)
            self._rounds += 1

    def _guard(self) -> None:
        """End this process when the store has not answered the other thread for ``SILENCE`` seconds.

        They count only while this thread runs too: a library that holds the interpreter's lock stops both.
        """
        seen = waited = 0
        while not self._leaving.wait(INTERVAL):
            waited = waited + 1 if self._rounds == seen else 0
            seen = self._rounds
            if waited * INTERVAL > SILENCE:
                if os.environ["LOCAL_RANK"] == "0" and self._speaking.acquire(blocking=False):
                    where = f"rank {self._rank} on {self._host}"
                    print(
                        f"\nerror: {where}: cut off from the other ranks for {SILENCE:.0f} s",
                        file=console.err(),
                        flush=True,
                    )
                os._exit(1)

    def _beat(self) -> None:
        self._beats += 1
        with contextlib.suppress(*_STORE_IS_GONE):  # ``_look`` finds the same, and says it
            self._store.set(_key("alive", self._rank), f"{self._beats} {self._host} {os.getpid()}")

    def _look(self) -> Failure | None:
        """Return the first failure that any rank left, or that this one can see."""
        try:
            if self._store.check([_FAILED]):
                return Failure.read(self._store.get(_FAILED))
            for failure in self._missing():
                # The rank may have said why it ends since the first look.
                return Failure.read(self._store.compare_set(_FAILED, "", failure.text))
        except _STORE_IS_GONE:
            host, process = self._signs[0].process() or ("", 0)
            if host == self._host and not _is_running(process):
                return _gone(0, host)
            return Failure(0, 1, "rank 0: ended or is out of reach (the ranks' key-value store does not answer)")
        return None

    def _missing(self) -> Iterator[Failure]:
        """Yield the ranks whose process is gone, or that have been silent for too long."""
        now = time.monotonic()
        for rank, sign in self._signs.items():
            if not self._store.check([_key("alive", rank)]):
                continue  # it is still on its way here
            text = self._store.get(_key("alive", rank)).decode()
            if text != sign.text:
                sign.text, sign.since = text, now
            host, process = sign.process() or ("", 0)
            if host == self._host and not _is_running(process):
                yield _gone(rank, host)
            elif 0 in (rank, self._rank) and now - sign.since > SILENCE:
                yield Failure(rank, 1, f"rank {rank} on {host}: no sign of life for {SILENCE:.0f} s")

    def _end(self, failure: Failure) -> None:
        """Say why and end this process, whatever its other threads wait for."""
        if self._leaving.wait(GRACE):
            return  # the job had come to its end, and the others were faster
        if failure.rank != 0:
            with contextlib.suppress(*_STORE_IS_GONE):
                self._store.set(_key("gone", self._rank), "")
        if self.speaks(failure):
            print(f"\n{failure.line}", file=console.err(), flush=True)
        console.end()
        os._exit(failure.code)


def _gone(rank: int, host: str) -> Failure:
    return Failure(rank, 1, f"rank {rank} on {host}: its process is gone (killed; out of memory?)")


def _key(kind: str, number: int) -> str:
    return f"taso_ds/{kind}/{number}"


def _is_running(process: int) -> bool:
    """Say whether a process of this machine runs; one that has ended and waits to be noticed does not (Linux)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False
