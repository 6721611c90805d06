"""Where the ranks of a job meet: a key-value store at rank 0's address.

Rank 0 may start long after the others, so waiting for it is no mistake; but a line says who waits. All waiting happens
here, in steps of a second, and not inside torch, where a signal would wait too, for half an hour.
"""

import datetime
import logging
import os
import socket
import time

import torch.distributed as dist

from taso_ds.distributed import environment
from taso_ds.errors import UserError

log = logging.getLogger(__name__)

_RESOLVES_WITHIN = 20.0  # seconds; a cluster may make a host's name together with the host
_SAYS_EVERY = 30.0
_CONNECTS_WITHIN = 5.0
_CAME = "taso_ds/came"
_STARTED = "are all nodes started?"
_LOOKS_PER_SECOND = 2000  # of all ranks together, at a store that one thread of rank 0 keeps


def meet(timeout_minutes: float) -> dist.Store:
    """Return the store that all ranks have come to. ``environment.check`` has seen the rank variables.

    Raises:
        UserError: the address means nothing here, the port is another's, or not all ranks came in time.
    """
    try:
        return _meet(timeout_minutes)
    except UserError as error:
        if environment.rank() != 0 and environment.local_rank() == 0:
            log.error("error: %s", error)  # rank 0, which speaks for all, cannot be told
        raise


def _meet(timeout_minutes: float) -> dist.Store:
    wait = _Wait(60.0 * timeout_minutes)
    if _is_another_attempt():
        _move(wait)
    host, port = _address()
    _check_resolves(host)
    if environment.rank() == 0 and not _is_kept_by_torchrun():
        store = _store("127.0.0.1", port, wait, is_keeper=True)
        _check_leads_here(host, port)
    else:
        _await_server(host, port, wait)
        store = _store(host, port, wait, is_keeper=False)
    _await_all(store, wait)
    return store


def free_port() -> int:
    """Return a port of this node that nobody has at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _address() -> tuple[str, int]:
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def _is_kept_by_torchrun() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _is_another_attempt() -> bool:
    """Say whether ``torchrun --max_restarts`` has started the ranks again, on one node: several count on their own."""
    is_one_node = environment.local_world_size() == environment.world_size()
    return is_one_node and _is_kept_by_torchrun() and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def _move(wait: "_Wait") -> None:
    """Let the ranks meet at a store of their own: torchrun's still holds what ended the earlier attempt."""
    attempt = f"taso_ds/attempt/{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    agents = dist.PrefixStore(attempt, _store(*_address(), wait, is_keeper=False))
    if environment.rank() == 0:
        agents.set("port", str(free_port()))
    while not agents.check(["port"]):
        wait.go_on("rank 0 has not come", seconds=0.05)
    os.environ.update(MASTER_PORT=agents.get("port").decode(), TORCHELASTIC_USE_AGENT_STORE="False")


def _store(host: str, port: int, wait: "_Wait", *, is_keeper: bool) -> dist.TCPStore:
    """Keep the store, or connect to it; other processes of torch that keep one at this port share it."""
    try:
        return dist.TCPStore(
            host,
            port,
            environment.world_size(),
            is_master=is_keeper,
            timeout=datetime.timedelta(seconds=wait.timeout),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except dist.DistError as error:
        first = str(error).splitlines()[0]
        is_taken = "EADDRINUSE" in first or "address already in use" in first.lower()
        remedy = "another run has this port; choose another --master_port (srun: MASTER_PORT)" if is_taken else _STARTED
        raise wait.error(first, remedy) from error


class _Wait:
    """Waits a second at a time, says every so often for what, and gives up."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._start = self._said = time.monotonic()

    def go_on(self, reason: str, *, seconds: float = 1.0) -> None:
        """Wait once more, because of ``reason``; UserError when the time is over."""
        now = time.monotonic()
        if now - self._start > self.timeout:
            raise self.error(f"{reason}, for {self.timeout / 60:.0f} minutes", _STARTED)
        if now - self._said > _SAYS_EVERY and environment.local_rank() == 0:
            self._said = now
            here = f"rank {environment.rank()} on {socket.gethostname()}"
            # Not only rank 0 is to be heard: it may be the one that does not come.
            log.error("environment: %s waits at %s:%d: %s", here, *_address(), reason)
        time.sleep(seconds)

    def error(self, reason: str, remedy: str) -> UserError:
        host, port = _address()
        return UserError(f"environment: cannot meet at {host}:{port}: {reason}; {remedy}")


def _check_resolves(host: str) -> None:
    deadline = time.monotonic() + _RESOLVES_WITHIN
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"environment: MASTER_ADDR is {host!r}, which has no address on {socket.gethostname()}"
                    f" ({error.strerror}); name the host or the address of rank 0"
                ) from error
        time.sleep(1.0)


def _check_leads_here(host: str, port: int) -> None:
    """Refuse an address of rank 0 at which rank 0 does not reach itself."""
    deadline = time.monotonic() + _RESOLVES_WITHIN
    while (problem := _knock(host, port)) is not None:
        if time.monotonic() > deadline:
            raise UserError(
                f"environment: MASTER_ADDR is {host!r}, where {socket.gethostname()}, which has rank 0, does not reach"
                f" itself ({problem}); name its own host or address"
            )
        time.sleep(1.0)


def _await_server(host: str, port: int, wait: _Wait) -> None:
    """Wait until somebody listens there."""
    while (problem := _knock(host, port)) is not None:
        wait.go_on(f"rank 0 does not answer ({problem})")


def _knock(host: str, port: int) -> str | None:
    """Return why nothing answers there; None when something does."""
    try:
        socket.create_connection((host, port), _CONNECTS_WITHIN).close()
        return None
    except OSError as error:
        return error.strerror or str(error)


def look_every(world_size: int) -> float:
    """Return the seconds between two looks of a rank at what all ranks wait for."""
    return max(0.05, world_size / _LOOKS_PER_SECOND)


def _await_all(store: dist.Store, wait: _Wait) -> None:
    """Wait until every rank has come."""
    size = environment.world_size()
    came = store.add(_CAME, 1)
    while came < size:
        wait.go_on(f"{came} of {size} ranks have come", seconds=look_every(size))
        came = store.add(_CAME, 0)
