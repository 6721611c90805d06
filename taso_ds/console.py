"""What a script says, and what its libraries may: what all ranks know is said once, and only what a user can act on.

Warnings of libraries, and what they print while they load, are shown with ``--debug``.
"""

import logging
import os
import select
import sys
from collections.abc import MutableMapping, Sequence
from typing import TextIO

from taso_ds.errors import speaks_for_all

log = logging.getLogger("taso_ds")

QUIET = {
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # or a lost connection fills the screen
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
}
# Bars of files that each rank reads for itself.
_NO_BARS = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
_LONGEST_LINE = 560


class _Handler(logging.StreamHandler):
    """Writes to stdout until that fails; the run goes on."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            go_on_without_stdout(error)
        else:
            super().handleError(record)


def set_up(environment: MutableMapping[str, str], *, debug: bool) -> None:
    """Let this program speak, and libraries only where they must; what the user has set in the environment stays."""
    silent = {} if debug else QUIET if speaks_for_all() else QUIET | _NO_BARS
    for name, value in silent.items():
        environment.setdefault(name, value)
    level = logging.WARNING if debug else logging.ERROR
    handler = _Handler(sys.stdout)
    logging.basicConfig(level=level, format="%(message)s", handlers=[handler], force=True)
    logging.captureWarnings(not debug)  # to the logger py.warnings, which the level keeps quiet
    ours = logging.DEBUG if debug else logging.INFO
    log.setLevel(ours if speaks_for_all() else logging.ERROR)


def printable(message: str) -> str:
    """Return one line of bounded length in which nothing a file held can move the cursor or turn the text around."""
    line = " ".join(message.split())
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
    if len(line) <= _LONGEST_LINE:
        return line
    return f"{line[: _LONGEST_LINE - 153]} … {line[-150:]}"  # what is wrong at the start, the remedy at the end


def drop_output() -> bool:
    """Send to nowhere what this process still writes to a pipe that nobody reads; says whether there was one."""
    unread = [stream for stream in (sys.stdout, sys.stderr) if _is_unread(stream)]
    _send_to_nowhere(unread)
    return bool(unread)


def go_on_without_stdout(error: OSError) -> None:
    """Let the rest be lost where nobody reads it, as behind ``| head``; a file on a full disk is said once."""
    if isinstance(error, BrokenPipeError):
        drop_output()
        return
    _send_to_nowhere([sys.stdout])
    print(f"stdout: {error.strerror}; what else is said there is lost, the work goes on", file=sys.stderr, flush=True)


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
