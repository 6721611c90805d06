"""Ranks started by fork from a process that has imported everything: a two-rank run takes seconds, not half a minute.

python benchmarks/forked.py                      # reads one job per line from stdin, answers with one line each

A job is a JSON object: ``argv`` (of launch/train.py), ``folder`` (for the ranks' output), ``ranks``, ``timeout`` in
seconds, ``faults`` (see ``faulty.py``). The answer has each rank's exit code (negative: killed by that signal), whether
a rank had to be killed because it ``hung``, and ``seconds``.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def import_everything() -> None:
    """Load what a run loads; nothing may start a thread, which a fork would lose."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    import taso_ds.training.build
    import taso_ds.training.run  # noqa: F401


def be_rank(job: dict[str, Any], rank: int, port: int) -> None:
    """Become one rank of a job: does not return."""
    from faulty import plant

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["ranks"]), LOCAL_WORLD_SIZE=str(job["ranks"]),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{job['folder']}/rank{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    os.chdir(job["folder"])
    sys.argv = ["train.py", *job["argv"]]
    plant([fault for fault in job.get("faults", []) if fault["rank"] == rank])
    from taso_ds.launch.train import main

    code = 1
    try:
        main()
        code = 0
    except SystemExit as left:
        code = int(left.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job to its end, without the help of a launcher that would end the ranks a failed one leaves behind."""
    port, started = free_port(), time.monotonic()
    Path(job["folder"]).mkdir(parents=True, exist_ok=True)
    children = {}
    for rank in range(job["ranks"]):
        child = os.fork()
        if child == 0:
            be_rank(job, rank, port)
        children[child] = rank
    codes: dict[int, int] = {}
    hung = False
    while len(codes) < len(children):
        child, status = os.waitpid(-1, os.WNOHANG)
        if child in children:
            codes[children[child]] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() - started > job["timeout"]:
            hung = True
            for child, rank in children.items():
                if rank not in codes:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return {
        "codes": [codes[rank] for rank in range(job["ranks"])],
        "hung": hung,
        "seconds": time.monotonic() - started,
    }


def main() -> None:
    import_everything()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
