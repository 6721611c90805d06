"""How every launch script starts and ends: logs on rank 0, one line for a user's mistake, one exit code."""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from taso_ds.errors import UserError

log = logging.getLogger("taso_ds")


def run_script(action: Callable[[], str | None]) -> None:
    """Run ``action``; print what it returns as the last line of rank 0.

    A ``UserError`` becomes ``error: …`` on rank 0 and exit code 2 on every rank; ``--debug`` shows the traceback.
    """
    _set_up_logging()
    _leave_script_folder()
    try:
        last_line = action()
    except UserError as error:
        _fail(error)
    from taso_ds.distributed import comm

    if last_line is not None and comm.is_main():
        print(last_line, flush=True)
    comm.leave()


def _set_up_logging() -> None:
    # A single script, many ranks: what all of them know is said once.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout, force=True)
    log.setLevel(logging.INFO if _speaks() else logging.ERROR)
    # Names that newer torch versions prefer inside DeepSpeed; nothing a user of this program can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _leave_script_folder() -> None:
    """Take the script's own folder off the import path, where ``evaluate.py`` would hide the library of that name."""
    folder = Path(sys.argv[0]).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != folder]


def _fail(error: UserError) -> NoReturn:
    if "--debug" in sys.argv:
        raise error
    if _speaks():
        print(f"error: {_printable(str(error))}", file=sys.stderr, flush=True)
    sys.exit(2)


def _speaks() -> bool:
    """Say whether this process talks to the user: rank 0, or any whose rank no launcher can have given."""
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    return not (rank.isdecimal() and size.isdecimal() and 0 < int(rank) < int(size))


_LONGEST_LINE = 560


def _printable(message: str) -> str:
    """Return one line of bounded length in which nothing a file held can move the cursor or turn the text around."""
    line = " ".join(message.split())
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
    if len(line) <= _LONGEST_LINE:
        return line
    return f"{line[: _LONGEST_LINE - 153]} … {line[-150:]}"  # what is wrong at the start, the remedy at the end
