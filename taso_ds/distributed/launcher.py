"""What DeepSpeed's launcher, which stands above this process, was asked for and does not pass on.

The launcher starts on this node alone in two cases where that is wrong: its hostfile does not exist, of which it only
warns, or the one chosen host is another. And all its runs meet at one port, unless told otherwise.
"""

import base64
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from taso_ds.errors import UserError

_DEFAULT_PORT = "29500"
_RUNNER, _NODE_LAUNCHER = "deepspeed.launcher.runner", "deepspeed.launcher.launch"
_COMMANDS = ("deepspeed", "deepspeed.pt", "ds")


@dataclass(frozen=True)
class Above:
    """A process above this one."""

    pid: int
    command: Sequence[str]


def processes_above() -> list[Above]:
    """Return this process's parent and its parent, as far as they can be seen."""
    found = []
    for process in psutil.Process().parents()[:2]:
        try:
            found.append(Above(process.pid, process.cmdline()))
        except psutil.Error:  # ended meanwhile, or another user's
            break
    return found


def check_hosts(above: Sequence[Above]) -> None:
    """Refuse to run on other hosts than ``deepspeed`` was asked for.

    Args:
        above: the processes above this one, the nearest first.

    Raises:
        UserError: ``deepspeed`` started on this host, although its hostfile does not exist or names one other host.
    """
    _check_hostfile(above)
    _check_only_host(above)


def _check_hostfile(above: Sequence[Above]) -> None:
    if len(above) < 2 or _NODE_LAUNCHER not in above[0].command:
        return
    hostfile = _given_hostfile(above[1].command)
    if hostfile is not None and not hostfile.is_file():
        raise UserError(
            f"environment: deepspeed was given --hostfile {hostfile}, which is no file here, and has started on this"
            " node alone; correct the path"
        )


def _check_only_host(above: Sequence[Above]) -> None:
    hosts = _started_hosts(above[0].command) if above else []
    if len(hosts) == 1 and not _is_this_host(hosts[0]):
        raise UserError(
            f"environment: deepspeed was to use {hosts[0]} and, as it is the only host, has started on"
            f" {socket.gethostname()}; add --force_multi, or start it on {hosts[0]}"
        )


def _started_hosts(command: Sequence[str]) -> list[str]:
    """Return the hosts that a node's launcher was told of."""
    given = [word.partition("=")[2] for word in command if word.startswith("--world_info=")]
    if _NODE_LAUNCHER not in command or not given:
        return []
    return list(json.loads(base64.urlsafe_b64decode(given[0])))


def _is_this_host(name: str) -> bool:
    own = socket.gethostname()
    if name in ("localhost", own, own.partition(".")[0]):
        return True
    try:
        addresses = {entry[4][0] for entry in socket.getaddrinfo(name, None)}
    except OSError:
        return False
    here = {entry.address.partition("%")[0] for entries in psutil.net_if_addrs().values() for entry in entries}
    return not addresses.isdisjoint(here)


def own_port(above: Sequence[Above]) -> str | None:
    """Return a port for a run on one node that was given none; None for any other run.

    Each rank derives the same port from the launcher's process id. With DeepSpeed's one default, two runs on a node
    would meet each other.
    """
    is_one_node = os.environ.get("LOCAL_SIZE") == os.environ["WORLD_SIZE"]
    if above and _NODE_LAUNCHER in above[0].command and is_one_node and os.environ["MASTER_PORT"] == _DEFAULT_PORT:
        return str(10_000 + above[0].pid % 20_000)  # below those that systems hand out by themselves
    return None


def _given_hostfile(command: Sequence[str]) -> Path | None:
    """Return the ``--hostfile`` of a ``deepspeed`` command."""
    starts = [n for n, word in enumerate(command) if word == _RUNNER or Path(word).name in _COMMANDS]
    if not starts:
        return None
    from deepspeed.launcher.runner import DLTS_HOSTFILE, parse_args

    given: str = parse_args(list(command[starts[0] + 1 :])).hostfile
    return None if given == DLTS_HOSTFILE else Path(given)
