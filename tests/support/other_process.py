"""Another process that holds the lock of a run folder."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Holds the lock of argv[1] until it is killed, or for ever.
_HOLD = """
import os, sys, time
from pathlib import Path
from taso_ds.runs.run_lock import locked
with locked(Path(sys.argv[1])):
    forks = "fork" in sys.argv
    if not forks or os.fork():
        print("locked", flush=True)
        if forks:
            os._exit(0)  # the child lives on
    time.sleep(600)
"""


@contextmanager
def holding(folder: Path, *words: str) -> Iterator["subprocess.Popen[str]"]:
    """A process that has the lock."""
    command = [sys.executable, "-c", _HOLD, str(folder), *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
