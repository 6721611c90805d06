"""The proof of an export in a process forked before its run began: as fresh as a new one, with all imports done."""

import contextlib
import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any


def prove_in_fork() -> None:
    """Fork the process that will open this one's export; it ends with this one."""
    from taso_ds.methods import prove

    requests, asked = os.pipe()
    answered, answers = os.pipe()
    if os.fork() == 0:
        os.close(asked)
        os.close(answered)
        try:
            with os.fdopen(requests) as lines, os.fdopen(answers, "w") as out:
                for line in lines:
                    out.write(json.dumps(_prove(line.strip())) + "\n")
                    out.flush()
        finally:
            os._exit(0)
    os.close(requests)
    os.close(answers)
    asking, told = os.fdopen(asked, "w"), os.fdopen(answered)

    def run(command: list[str], **_options: Any) -> "subprocess.CompletedProcess[str]":
        asking.write(command[-1] + "\n")
        asking.flush()
        return subprocess.CompletedProcess(command, **json.loads(told.readline()))

    prove.subprocess = SimpleNamespace(run=run)  # type: ignore[assignment]


def _prove(spec: str) -> dict[str, Any]:
    """Return what a process of its own would leave."""
    from taso_ds.methods import fresh_process

    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            fresh_process.main(spec)
        except Exception as error:
            code = 1
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return {"returncode": code, "stdout": out.getvalue(), "stderr": err.getvalue()}
