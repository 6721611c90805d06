"""DeepSpeed's compiled parts, which all runs of a user share, and the lock that a killed run leaves there.

A process that compiles or loads one creates a file ``lock`` beside it. Others wait until the file is gone, and say
nothing. Nobody removes the lock of a process that was killed.
"""

import logging
import os
import time
from pathlib import Path

log = logging.getLogger(__name__)

_PATIENCE = 60.0  # seconds; loading takes less than one, compiling a few minutes


def warn_of_locks() -> None:
    """Say which files this run is about to wait for."""
    # torch's own function for this folder would create it.
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    for lock in old_locks(folder, now=time.time()):
        log.warning("environment: waits while %s exists; if no run compiles, it is a killed one's: remove it", lock)


def joining_problem(error: Exception, backend: str) -> str:
    """Say in one line why ranks that have met cannot join: a part does not compile, or the network is to blame.

    Args:
        error: what DeepSpeed raised.
        backend: the communication library.
    """
    first = str(error).splitlines()[0][:300]
    if "JIT load" in first or "building extension" in first:
        return (
            f"a part of DeepSpeed, for memory that ranks share, does not compile ({first}); install a C++ compiler"
            " and ninja, and put them in PATH (launch/doctor.py looks for them)"
        )
    remedy = f"open all ports between the nodes, or name their interface in {backend.upper()}_SOCKET_IFNAME"
    return f"the ranks met but cannot connect ({first}); {remedy}"


def old_locks(folder: Path, *, now: float) -> list[Path]:
    """Return the locks below ``folder`` that have been there for longer than loading takes."""
    found = []
    for lock in sorted([*folder.glob("*/lock"), *folder.glob("*/*/lock")]):
        try:
            if now - lock.stat().st_mtime > _PATIENCE:
                found.append(lock)
        except FileNotFoundError:  # released meanwhile
            continue
    return found
