"""How every launch script starts and ends: logs on rank 0, one line for a user's mistake, one exit code."""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from taso_ds.distributed import slurm
from taso_ds.errors import Interrupted, UserError, speaks_for_all

CRASH, USER_ERROR = 1, 2
INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: not an error, start me again

# What a launch script sets unless the user did.
ENVIRONMENT = {
    "DS_LOG_LEVEL": "warning",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # or a lost connection fills the screen
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    # Host tensors from 2 MB on lie in huge pages, where the system has them (https://github.com/pytorch/pytorch/pull/93888):
    # one page fault in place of 512 whenever a parameter is gathered. torch looks when it makes its first tensor.
    "THP_MEM_ALLOC_ENABLE": "1",
}

# Seconds in which the death of another rank is noticed, if that is what broke a collective.
_LOOK_AROUND = 4.0

log = logging.getLogger("taso_ds")


def run_script(action: Callable[[], str | None]) -> None:
    """Run ``action``; print what it returns as the last line of rank 0.

    A ``UserError`` becomes one line ``error: …`` and exit code 2, ``--debug`` shows its traceback; ``Interrupted``
    becomes exit code 75; anything else is a bug, with traceback and exit code 1. In each case no rank is left waiting.
    """
    slurm.adopt_ranks(os.environ)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    _set_up_logging()
    _leave_script_folder()
    try:
        last_line = action()
    except UserError as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        _leave(f"error: {_printable(str(error))}", USER_ERROR)
    except Interrupted as reason:
        _blame_another(wait=0.0)  # a launcher stops the ranks that a failed one leaves behind
        _leave(str(reason), INTERRUPTED)
    except Exception as error:
        _blame_another(wait=_LOOK_AROUND)
        traceback.print_exc()
        _leave(f"error: {type(error).__name__}: {_printable(str(error))}", CRASH)
    from taso_ds.distributed import comm, process_group

    if last_line is not None and comm.is_main():
        print(last_line, flush=True)
    process_group.leave()


def _blame_another(*, wait: float) -> None:
    """Leave with another rank's failure, if there is one: a collective fails on all when one is gone."""
    process_group = sys.modules.get("taso_ds.distributed.process_group")
    failure = process_group.cause_elsewhere(wait) if process_group else None
    if process_group and failure and failure.code != INTERRUPTED:
        process_group.give_up(f"error: {failure.message}", failure.code, failure)


def _leave(line: str, code: int) -> NoReturn:
    """Say the line on rank 0 and leave; the others leave too."""
    if process_group := sys.modules.get("taso_ds.distributed.process_group"):
        process_group.give_up(line, code)
    if speaks_for_all():
        print(line, file=sys.stderr, flush=True)
    sys.exit(code)


def _set_up_logging() -> None:
    # A single script, many ranks: what all of them know is said once.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout, force=True)
    log.setLevel(logging.INFO if speaks_for_all() else logging.ERROR)
    # Names that newer torch versions prefer inside DeepSpeed; nothing a user of this program can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def _leave_script_folder() -> None:
    """Take the script's own folder off the import path, where ``evaluate.py`` would hide the library of that name."""
    folder = Path(sys.argv[0]).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != folder]


_LONGEST_LINE = 560


def _printable(message: str) -> str:
    """Return one line of bounded length in which nothing a file held can move the cursor or turn the text around."""
    line = " ".join(message.split())
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
    if len(line) <= _LONGEST_LINE:
        return line
    return f"{line[: _LONGEST_LINE - 153]} … {line[-150:]}"  # what is wrong at the start, the remedy at the end
