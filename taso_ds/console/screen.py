"""What a script says, and what its libraries may say: only what a user can act on, and once for all ranks.

A script that runs a model sends everything else into a log file, which ends up in the run folder. ``--debug`` shows it
instead.
"""

import contextlib
import logging
import os
import select
import sys
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import TextIO

from taso_ds.console.library_log import LibraryLog
from taso_ds.errors import speaks_for_all

log = logging.getLogger("taso_ds")

QUIET = {
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # or a lost connection fills the screen
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
}
# Bars of libraries. Ours are those of ``taso_ds.console.bar``.
_NO_BARS = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
_LONGEST_LINE = 560
# None, or one. It belongs to the process, like the streams that it replaces.
_logs: list[LibraryLog] = []


def out() -> TextIO:
    """Return the console's stdout. ``sys.stdout`` is not that where libraries write into a file."""
    return _logs[-1].out if _logs else sys.stdout


def err() -> TextIO:
    """Return the console's stderr."""
    return _logs[-1].err if _logs else sys.stderr


class _Handler(logging.StreamHandler):
    """Writes to stdout until that fails. The run goes on then."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            go_on_without_stdout(error)
        else:
            super().handleError(record)


def set_up(environment: MutableMapping[str, str], *, debug: bool, libraries_to_log: bool = False) -> None:
    """Let this program speak, and libraries only where they must.

    Args:
        environment: where libraries are told to be quiet; what the user has set there stays.
        debug: whether libraries and our own details are shown.
        libraries_to_log: whether a file takes what libraries say, until ``end``; not with ``debug``.
    """
    if libraries_to_log and not debug:
        with contextlib.suppress(OSError):  # no room for a file, or no console to keep free
            _logs.append(LibraryLog())
    silent = {} if debug else _NO_BARS if _logs else QUIET if speaks_for_all() else QUIET | _NO_BARS
    for name, value in silent.items():
        environment.setdefault(name, value)
    handler = _Handler(out())
    level = logging.WARNING if debug else logging.ERROR
    ours = logging.DEBUG if debug else logging.INFO
    logging.basicConfig(level=level, format="%(message)s", handlers=[handler], force=True)
    logging.captureWarnings(not debug)  # to the logger py.warnings, which the level keeps quiet
    log.setLevel(ours if speaks_for_all() else logging.ERROR)
    if _logs:
        handler.addFilter(lambda record: record.levelno >= (ours if _is_ours(record) else level))
        _write_log(_logs[-1].stream)


def _is_ours(record: logging.LogRecord) -> bool:
    return speaks_for_all() and record.name.partition(".")[0] == log.name


def _write_log(stream: TextIO) -> None:
    """Write more into the log file than on the console: all that rank 0 says, and the warnings of the others."""
    handler = logging.StreamHandler(stream)
    rank = "" if speaks_for_all() else f"rank {os.environ['RANK']} "
    handler.addFilter(_Once())
    handler.setFormatter(logging.Formatter(f"%(asctime)s {rank}%(levelname)s %(name)s: %(message)s"))
    logging.root.addHandler(handler)
    logging.root.setLevel(logging.INFO if speaks_for_all() else logging.WARNING)
    log.setLevel(logging.DEBUG if speaks_for_all() else logging.WARNING)


class _Once(logging.Filter):
    """Lets each of Python's warnings through once: DeepSpeed and torch give some of them at every step."""

    def __init__(self) -> None:
        super().__init__()
        self._passed: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name != "py.warnings":
            return True
        message = record.getMessage()
        is_new = message not in self._passed
        self._passed.add(message)
        return is_new


def keep_log(path: Path) -> None:
    """Let the log file be ``path`` from here on: the run's file, to which several ranks may append."""
    if _logs:
        _logs[-1].move(path)


def kept_log() -> Path | None:
    """Return the path of the log file that stays; None where there is none."""
    return _logs[-1].path if _logs and _logs[-1].is_kept else None


def last_of_log(number: int) -> list[str]:
    """Return the last lines of the log file."""
    return _logs[-1].last_lines(number) if _logs else []


def end() -> None:
    """Give the standard streams back, and remove a log file that no run keeps."""
    while _logs:
        _logs.pop().close()
        logging.root.setLevel(logging.WARNING)


def printable(message: str) -> str:
    """Return a message as one line of bounded length.

    Nothing that a file held can move the cursor or turn the text around.
    """
    line = " ".join(message.split())
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
    if len(line) <= _LONGEST_LINE:
        return line
    return f"{line[: _LONGEST_LINE - 153]} … {line[-150:]}"  # what is wrong at the start, the remedy at the end


def drop_output() -> bool:
    """Drop what this process still writes to pipes that nobody reads.

    Returns:
        Whether there was such a pipe.
    """
    unread = [stream for stream in (out(), err()) if _is_unread(stream)]
    _send_to_nowhere(unread)
    return bool(unread)


def go_on_without_stdout(error: OSError) -> None:
    """Drop the rest of the output: silently where nobody reads it, as behind ``| head``, with a line on a full disk."""
    if isinstance(error, BrokenPipeError):
        drop_output()
        return
    _send_to_nowhere([out()])
    print(f"stdout: {error.strerror}; what else is said there is lost, the work goes on", file=err(), flush=True)


def _send_to_nowhere(streams: Sequence[TextIO]) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _is_unread(stream: TextIO) -> bool:
    try:
        descriptor = stream.fileno()
    except OSError:  # no file of the system
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
