"""Launch a worker on two ranks of this machine, in the launch scripts' environment, and stop it before it exhausts the
machine's memory."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from taso_ds.console.screen import QUIET
from taso_ds.entry import ENVIRONMENT

RANKS = 2
_LEAST_FREE = 0.8e9  # bytes


class LaunchFailed(SystemExit):
    """A worker ended with an error, which it printed."""


def launch(
    worker: Path, flags: Sequence[str], *, environment: Mapping[str, str] | None = None, count: int = RANKS
) -> Any:
    """Return what the worker's rank 0 wrote to ``--result``; None when it was stopped for want of memory.

    Raises:
        LaunchFailed: a non-zero exit.
    """
    with tempfile.TemporaryDirectory(prefix="taso_bench_") as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(count), str(worker)]
        process = subprocess.Popen(
            [*command, "--result", str(result), *flags],
            stdout=sys.stderr, env=ENVIRONMENT | QUIET | os.environ | dict(environment or {}), start_new_session=True,
        )  # fmt: skip
        while process.poll() is None:
            if psutil.virtual_memory().available < _LEAST_FREE:
                _kill(process)
                return None
            time.sleep(0.05)
        if process.returncode:
            raise LaunchFailed(f"{worker.name} {' '.join(flags)} failed")
        return json.loads(result.read_text())


def attempt(worker: Path, flags: Sequence[str], *, environment: Mapping[str, str] | None = None) -> tuple[Any, str]:
    """Return what ``launch`` returns, or None and why there is nothing: "does not fit" or "failed"."""
    try:
        found = launch(worker, flags, environment=environment)
    except LaunchFailed as error:
        print(error, file=sys.stderr, flush=True)
        return None, "failed"
    return found, "does not fit" if found is None else ""


def _kill(process: subprocess.Popen[bytes]) -> None:
    for child in [*psutil.Process(process.pid).children(recursive=True), process]:
        child.kill()
    process.wait()
