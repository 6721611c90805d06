"""Errors that nobody foresaw: one line for the terminal, and a file with all that a bug report needs."""

import contextlib
import importlib.metadata
import os
import platform
import shlex
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from taso_ds.flags.verbs import command

_PACKAGES = ("taso_ds", "torch", "deepspeed", "transformers", "peft", "datasets", "safetensors", "bitsandbytes")
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LONGEST_MESSAGE = 200


def write_report(error: BaseException, folder: Path | None, *, log: Sequence[str]) -> Path | None:
    """Write a file about an error.

    Args:
        folder: where it goes; the temporary folder takes it where this one cannot.
        log: what libraries said last.

    Returns:
        The file; None if no folder could take it.
    """
    rank = os.environ.get("RANK", "0")
    name = f"traceback-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-rank{rank}.txt"
    places = [] if folder is None else [folder / name]
    for path in (*places, Path(tempfile.gettempdir()) / f"taso-{name}"):
        with contextlib.suppress(OSError), path.open("x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(_report(error, log))
            return path
    return None


def describe(error: BaseException, report: Path | None, *, log: Path | None) -> str:
    """Return the line about an error: what happened, whose fault it is, where the traceback lies, what to do with it.

    Args:
        report: the file with the traceback, if there is one.
        log: the file with all that libraries said, if there is one.
    """
    first = (str(error).strip().splitlines() or [""])[0]
    what = f"{type(error).__name__}: {first}"
    what = what if len(what) <= _LONGEST_MESSAGE else f"{what[:_LONGEST_MESSAGE]} …"
    where = "traceback: with --debug, there is no room for a file" if report is None else f"traceback: {report}"
    where += "" if log is None else f", what libraries said: {log}"
    if _is_out_of_memory(error):
        remedy = f"lower --per_device_train_batch_size, or let {command('plan')} say what fits"
        return f"out of memory ({what.removesuffix(': ')}); {remedy}; {where}"
    whose = "not foreseen, so a bug of taso_ds or of a library below it"
    return f"{what.removesuffix(': ')}: {whose}; {where}; please report it with that, and with run.json if there is one"


def _is_out_of_memory(error: BaseException) -> bool:
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's, which may not be there to be asked
        or "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


def _report(error: BaseException, log: Sequence[str]) -> str:
    ranks = {name: os.environ[name] for name in _RANK_VARIABLES if name in os.environ}
    lines = [
        f"command: {shlex.join(sys.argv)}",
        f"host: {socket.gethostname()}, {platform.platform()}, python {platform.python_version()}",
        f"ranks: {ranks or 'one process'}",
        f"versions: {', '.join(f'{name} {_version(name)}' for name in _PACKAGES)}",
        "",
        *traceback.format_exception(error),
        "what libraries said last:",
        *log,
    ]
    return "\n".join(line.rstrip("\n") for line in lines) + "\n"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
