"""Ranks started by fork from a process that has imported everything: a two-rank run takes seconds, not half a minute.

A job is a JSON object: ``folder`` (for the ranks' output), ``ranks``, ``timeout`` in seconds, and what they do:
``argv`` of a ``script`` of launch/ (``train`` unless it says otherwise), or ``function`` (its file and its name).
Perhaps also ``environment``, ``faults`` (see ``faulty.py``), ``count`` (places whose calls are counted) or
``file_size``, a limit in bytes. The answer has each rank's exit code (negative: killed by that signal), whether a rank
had to be killed because it ``hung``, ``ended``, when the last one was gone, and the ``port`` through which they met.

No launcher helps here: what ends the ranks that a failed one leaves behind is the program itself.
"""

import faulthandler
import importlib
import inspect
import json
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class ForkServer:
    """The process that forks; jobs run one after the other."""

    def __enter__(self) -> "ForkServer":
        # threads would not survive a fork
        single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
        settings = {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths, "TORCH_CPP_LOG_LEVEL": "ERROR"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | single | settings,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert json.loads(self._process.stdout.readline())["ready"]
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._process.communicate()

    def run_on_ranks(
        self, function: Callable[..., Any], ranks: int, *args: Any, timeout: float = 300.0, **environment: str
    ) -> Any:
        """Call a module's function on ranks that have joined, and return what it returns on rank 0.

        Args:
            environment: added to that of the ranks.
        """
        with tempfile.TemporaryDirectory(prefix="taso_ranks_") as place:
            folder = Path(place)
            (folder / "arguments").write_bytes(pickle.dumps(args))
            answer = self.run(
                [], folder, ranks=ranks, timeout=timeout, function=address_of(function), environment=environment
            )
            said = "\n".join(file.read_text(errors="replace")[-4000:] for file in sorted(folder.glob("rank*.err")))
            assert answer["codes"] == [0] * ranks, f"{answer}\n{said}"
            return pickle.loads((folder / "result").read_bytes())

    def run(self, argv: list[str], folder: Path, *, ranks: int = 2, timeout: float = 300.0, **more: Any) -> Any:
        """Run one job and return its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job = {"argv": argv, "folder": str(folder), "ranks": ranks, "timeout": timeout, **more}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def address_of(function: Callable[..., Any]) -> tuple[str, str]:
    """Return how a job names a function."""
    return inspect.getfile(function), function.__name__


def _import_everything() -> None:
    """Load what a run loads; nothing of it may start a thread, which a fork would lose."""
    for name in ("deepspeed", "bitsandbytes", "peft", "transformers.models.llama.modeling_llama"):
        importlib.import_module(name)
    importlib.import_module("taso_ds.runs.train")


def _be_rank(job: dict[str, Any], rank: int, port: int) -> None:
    """Become one rank of a job: does not return."""
    from faulty import count_calls, plant
    from forked_proof import prove_in_fork

    folder = Path(job["folder"])
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["ranks"]), LOCAL_WORLD_SIZE=str(job["ranks"]),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(folder / f"rank{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    os.environ.update(job.get("environment", {}))
    os.chdir(folder)
    if "function" in job:
        faulthandler.dump_traceback_later(job["timeout"] - 10, exit=True)  # a rank that waits for ever says where
    else:
        prove_in_fork()
    if "file_size" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_size"],) * 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell started in the background
    code = 1
    try:
        plant([fault for fault in job.get("faults", []) if fault["rank"] == rank], folder)
        if job.get("count"):
            count_calls(folder / f"calls{rank}.json", job["count"])
        if "function" in job:
            _call(*job["function"])
        else:
            script = job.get("script", "train")
            sys.argv = [f"{script}.py", *job["argv"]]
            importlib.import_module(f"taso_ds.launch.{script}").main()
        code = 0
    except SystemExit as left:
        code = int(left.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _call(file: str, name: str) -> None:
    """Call a function between joining and leaving the process group, with the ``arguments`` of the folder, if any."""
    from taso_ds.distributed import comm, engine, process_group

    sys.path.insert(0, str(Path(file).parent))
    function = getattr(importlib.import_module(Path(file).stem), name)
    given, result = Path("arguments"), Path("result").resolve()
    arguments = pickle.loads(given.read_bytes()) if given.exists() else ()
    process_group.init(timeout_minutes=3.0)
    engine.quiet_deepspeed()
    returned = function(*arguments)
    if comm.is_main():
        result.write_bytes(pickle.dumps(returned))
    process_group.leave()


def _run(job: dict[str, Any]) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    started = time.monotonic()
    Path(job["folder"]).mkdir(parents=True, exist_ok=True)
    children: dict[int, int] = {}
    for rank in range(job["ranks"]):
        child = os.fork()
        if child == 0:
            try:
                _be_rank(job, rank, port)
            finally:
                os._exit(1)
        children[child] = rank
        os.setpgid(child, next(iter(children)))
    codes: dict[int, int] = {}
    hung = False
    while len(codes) < len(children):
        child, status = os.waitpid(-1, os.WNOHANG)
        if child in children:
            codes[children[child]] = os.waitstatus_to_exitcode(status)
            continue
        left = [child for child, rank in children.items() if rank not in codes]
        late = time.monotonic() - started > job["timeout"]
        # One that a fault has stopped would never end.
        if late or (codes and all(_is_stopped(child) for child in left)):
            hung |= late
            for child in left:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return {"codes": [codes[rank] for rank in range(job["ranks"])], "hung": hung, "ended": time.time(), "port": port}


def _is_stopped(child: int) -> bool:
    return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def _serve() -> None:
    _import_everything()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), flush=True)


if __name__ == "__main__":
    _serve()
