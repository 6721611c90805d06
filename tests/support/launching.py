"""Launch scripts as a user starts them: in this process for speed, or under a launcher as processes of their own."""

import contextlib
import importlib
import io
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Finished:
    """What a script left on the terminal."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """Lines of stdout, those of the deepspeed launcher itself left out."""
        return [line for line in self.out.splitlines() if not line.startswith("[20")]

    @property
    def errors(self) -> list[str]:
        """Lines a user is meant to read."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]

    def succeeded(self) -> "Finished":
        assert self.code == 0, f"exit code {self.code}\n{self.out[-3000:]}\n{self.err[-6000:]}"
        return self


def call_main(script: str, flags: Sequence[str | Path]) -> Finished:
    """Run ``main()`` of ``launch/<script>.py`` in this process; the process is afterwards as it was before."""
    return call(importlib.import_module(f"taso_ds.launch.{script}").main, script, flags)


def call(main: Callable[[], None], script: str, flags: Sequence[str | Path]) -> Finished:
    """Run ``main`` as the script of this name would."""
    root, ours = logging.getLogger(), logging.getLogger("taso_ds")
    handlers, level, path, argv = root.handlers[:], ours.level, sys.path[:], sys.argv
    out, err, code = io.StringIO(), io.StringIO(), 0
    root.handlers = []  # pytest's own would be closed
    sys.argv = [str(ROOT / "launch" / f"{script}.py"), *map(str, flags)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as left:
        code = int(left.code or 0)
    finally:
        logging.captureWarnings(False)
        root.handlers, sys.path[:], sys.argv = handlers, path, argv
        ours.setLevel(level)
    return Finished(code, out.getvalue(), err.getvalue())


def start(
    script: str,
    flags: Sequence[str | Path],
    *,
    cwd: Path,
    launcher: str = "python",
    ranks: int = 1,
    **variables: str,
) -> Finished:
    """Run ``launch/<script>.py`` under ``deepspeed``, ``torchrun`` or plain ``python`` on the CPU.

    Args:
        variables: added to the environment.
    """
    prefix = {
        "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(free_port())],
        "torchrun": ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={free_port()}"],
        "python": [],
    }[launcher]
    return finish(begin([*prefix, ROOT / "launch" / f"{script}.py", *flags], cwd=cwd, variables=variables))


def begin(
    words: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    session: bool = False,
    variables: Mapping[str, str] | None = None,
) -> "subprocess.Popen[str]":
    """Start Python with these words on its command line; ``finish`` waits for it.

    Args:
        session: whether the process gets a session of its own, as at a terminal.
        variables: added to the environment.
    """
    return subprocess.Popen(
        [sys.executable, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd,
        env=environment() | dict(variables or {}), start_new_session=session,
    )  # fmt: skip


def finish(process: "subprocess.Popen[str]", *, timeout: float = 400.0) -> Finished:
    """Wait for a process; one that hangs is ended and fails with what it had printed."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # launchers end their ranks
        out, err = process.communicate(timeout=60)
        raise AssertionError(f"no end after {timeout:.0f} s\n{out[-3000:]}\n{err[-6000:]}") from None
    return Finished(process.returncode, out, err)


# DeepSpeed compiles its asynchronous disk access at first use, for minutes, and needs libaio and a disk for it.
HAS_NVME = bool(os.environ.get("TASO_TEST_NVME"))
NO_NVME = "set TASO_TEST_NVME=1 where libaio-dev is installed and the temporary folder allows direct I/O"


def environment() -> dict[str, str]:
    """Return the environment of a fresh terminal on a CPU machine: no rank is set."""
    ranked = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in ranked}
    return kept | {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
