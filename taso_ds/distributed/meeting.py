"""Where the ranks of a job meet: a key-value store at rank 0's address.

Rank 0 may start long after the others, so that waiting for it is no mistake; but it is said, and by whom. All waiting
happens here, in steps of a second, and not inside torch: there a signal would wait too, for half an hour.
"""

import datetime
import logging
import os
import socket
import time
from typing import Any

import torch.distributed as dist

from taso_ds.distributed import environment
from taso_ds.errors import UserError

log = logging.getLogger(__name__)

_RESOLVES_WITHIN = 20.0  # seconds; a cluster may make a host's name together with the host
_SAYS_EVERY = 30.0
_CONNECTS_WITHIN = 5.0
_CAME = "taso_ds/came"
_STARTED = "are all nodes started?"


def meet(timeout_minutes: float) -> Any:
    """Return the store that all ranks have come to, under the rank variables, which have been checked.

    Raises:
        UserError: the address means nothing here, the port is another's, or not all came in time.
    """
    try:
        return _meet(timeout_minutes)
    except UserError as error:
        if environment.rank() != 0 and environment.local_rank() == 0:
            log.error("error: %s", error)  # rank 0, which speaks for all, cannot be told
        raise


def _meet(timeout_minutes: float) -> Any:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    wait = _Wait(60.0 * timeout_minutes, f"{host}:{port}")
    _check_resolves(host)
    # torchrun keeps the store itself.
    if environment.rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        store = _store("127.0.0.1", port, wait, is_keeper=True)
        _check_leads_here(host, port)
    else:
        _await_server(host, port, wait)
        store = _store(host, port, wait, is_keeper=False)
    _await_all(store, wait)
    return store


def _store(host: str, port: int, wait: "_Wait", *, is_keeper: bool) -> Any:
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

    def __init__(self, timeout: float, where: str) -> None:
        self._where, self.timeout = where, timeout
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
            log.error("environment: %s waits at %s: %s", here, self._where, reason)
        time.sleep(seconds)

    def error(self, reason: str, remedy: str) -> UserError:
        return UserError(f"environment: cannot meet at {self._where}: {reason}; {remedy}")


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


def _await_all(store: Any, wait: _Wait) -> None:
    """Wait until every rank has come."""
    size = environment.world_size()
    came = store.add(_CAME, 1)
    while came < size:
        wait.go_on(f"{came} of {size} ranks have come", seconds=0.05)
        came = store.add(_CAME, 0)
