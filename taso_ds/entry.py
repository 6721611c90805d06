"""How every launch script starts and ends: logs on rank 0, one line for what went wrong, one exit code."""

import atexit
import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from taso_ds import crash_report, slurm_ranks
from taso_ds.console import screen as console
from taso_ds.errors import Interrupted, LibraryError, Unforeseen, UserError, no_permission, speaks_for_all
from taso_ds.interrupts import Interrupts

CRASH, USER_ERROR = 1, 2
NOT_READ = 141  # what a shell says of a program whose output nobody reads

# What a launch script sets unless the user did.
ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    # Host tensors from 2 MB on lie in huge pages, where the system has them (https://github.com/pytorch/pytorch/pull/93888):
    # one page fault in place of 512 whenever a parameter is gathered. torch looks when it makes its first tensor.
    "THP_MEM_ALLOC_ENABLE": "1",
}

# Seconds in which the death of another rank is noticed, if that is what broke a collective.
_LOOK_AROUND = 4.0
# The end of the log file, where the reason is found.
_SHOWN_LINES = 20


def run_script(
    action: Callable[[Interrupts], str | None], *, resumes: bool = False, libraries_to_log: bool = False
) -> None:
    """Run ``action``; print what it returns as the last line of rank 0.

    A ``UserError``, or a file that is not open to the user, becomes one line ``error: …`` and exit code 2, a signal
    one line and ``Interrupted``'s exit code. Anything else is a bug: one line that says so, a file with the traceback,
    and exit code 1. ``--debug`` shows tracebacks. In each case no rank is left waiting.

    Args:
        action: loads what is heavy itself: signals count from here on.
        resumes: whether the same command goes on where a signal has stopped this one.
        libraries_to_log: whether everything that is not printed through ``console`` goes to the log file.
    """
    with Interrupts(_leave_at_once, resumes=resumes) as interrupts, _console_given_back():
        debug = False
        try:
            debug = _prepare(libraries_to_log)
            last_line = action(interrupts)
            _say_and_leave(last_line)
        except SystemExit:
            raise
        except BaseException as error:
            interrupts.ignore()
            # A library may have made another exception of the interrupt.
            _end(error if isinstance(error, Interrupted) else interrupts.reason() or error, debug=debug)


@contextlib.contextmanager
def _console_given_back() -> Iterator[None]:
    """Give the console back at the end of the script, or of the process."""
    atexit.register(console.end)
    try:
        yield
    finally:
        console.end()
        atexit.unregister(console.end)


def _prepare(libraries_to_log: bool) -> bool:
    """Set up environment and console; says whether ``--debug`` was given."""
    from taso_ds.flags.command_line import debug_is_on

    slurm_ranks.adopt_ranks(os.environ)
    _check_current_folder()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    debug = debug_is_on(sys.argv[1:])
    console.set_up(os.environ, debug=debug, libraries_to_log=libraries_to_log)
    _leave_script_folder()
    return debug


def _check_current_folder() -> None:
    """Refuse to work in a folder that is gone, where relative paths lead nowhere and some libraries do not load."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UserError("the current folder has been removed: change to another one, and start again") from error


def _say_and_leave(last_line: str | None) -> None:
    if last_line is not None and speaks_for_all():
        try:
            print(last_line, file=console.out(), flush=True)
        except OSError as error:
            console.go_on_without_stdout(error)
    if process_group := sys.modules.get("taso_ds.distributed.process_group"):
        process_group.leave()


def _end(error: BaseException, *, debug: bool) -> NoReturn:
    """Leave with the line and the exit code that belong to ``error``."""
    folder = error.folder if isinstance(error, Unforeseen) else None
    error = error.__cause__ or error if isinstance(error, Unforeseen) else error
    if isinstance(error, Interrupted):
        _blame_another(wait=0.0, stops=False)  # a launcher stops the ranks that a failed one leaves behind
        _give_up(str(error), error.code)
    error = no_permission(error) or error
    if not isinstance(error, UserError):
        _blame_another(wait=_LOOK_AROUND, stops=True)
    if isinstance(error, BrokenPipeError) and console.drop_output():
        _give_up("stopped: nobody reads what it prints", NOT_READ)
    if debug:
        traceback.print_exception(error)
    if isinstance(error, LibraryError):
        _show_log()
    if isinstance(error, UserError):
        _give_up(f"error: {console.printable(str(error))}", USER_ERROR)
    report = crash_report.write_report(error, folder, log=console.last_of_log(100))
    _give_up(f"error: {console.printable(crash_report.describe(error, report, log=console.kept_log()))}", CRASH)


def _show_log() -> None:
    """Show the end of the libraries' log, which says why one of them could not do its work."""
    for line in console.last_of_log(_SHOWN_LINES) if speaks_for_all() else ():
        print(f"  {console.printable(line)}", file=console.err(), flush=True)


def _blame_another(*, wait: float, stops: bool) -> None:
    """Leave with another rank's failure, if there is one: a collective fails on all when one is gone.

    Args:
        wait: seconds to wait for the news of another rank's death.
        stops: whether a rank that was told to stop counts too.
    """
    process_group = sys.modules.get("taso_ds.distributed.process_group")
    failure = process_group.cause_elsewhere(wait) if process_group else None
    if process_group and failure and (stops or not failure.is_stop):
        process_group.give_up(failure.line, failure.code, failure)


def _give_up(line: str, code: int) -> NoReturn:
    """Say the line on rank 0 and leave; the others leave too."""
    give_up = getattr(sys.modules.get("taso_ds.distributed.process_group"), "give_up", None)
    if give_up is not None:
        give_up(line, code)
    if speaks_for_all():
        print(line, file=console.err(), flush=True)
    sys.exit(code)


def _leave_at_once(line: str, code: int) -> NoReturn:
    """Leave from a thread, whatever the main one waits for."""
    try:
        _give_up(line, code)
    finally:
        console.end()
        os._exit(code)


def _leave_script_folder() -> None:
    """Take the script's own folder off the import path, where ``evaluate.py`` would hide the library of that name."""
    folder = Path(sys.argv[0]).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != folder]
