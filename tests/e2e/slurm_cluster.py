"""A Slurm cluster of one machine: munged, slurmctld and one slurmd per node, with ports and folders of their own.

The nodes are names for this host; each claims eight devices and more cores than there are, so that shipped scripts fit.
"""

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import psutil
from launching import environment, free_port

DAEMONS = ("munged", "slurmctld", "slurmd")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")


def missing() -> str:
    """Return why no cluster can be made here; empty where one can."""
    absent = [name for name in DAEMONS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "Slurm's daemons are started as root"


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


class Cluster:
    """Nodes node1 to nodeN in one partition; everything of it lies in ``folder``."""

    def __init__(self, folder: Path, *, nodes: int, **variables: str) -> None:
        self.folder, self.nodes = folder, [f"node{number}" for number in range(1, nodes + 1)]
        self._conf = folder / "slurm.conf"
        self._environment = environment() | {"SLURM_CONF": str(self._conf), "PATH": _path(), **variables}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Cluster":
        try:
            self._come_up()
        except BaseException:
            self._stop()
            raise
        return self

    def _come_up(self) -> None:
        self._write_configuration()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        own = [f"--{name}-file={self.folder / 'munge'}.{name}" for name in ("pid", "log", "seed")]
        self._start("munged", "--foreground", "--force", f"--socket={self._socket}", f"--key-file={key}", *own)
        until(self._socket.exists, "munged does not answer", 10)
        self._start("slurmctld", "-D", "-c")
        for node in self.nodes:
            self._start("slurmd", "-D", "-N", node, name=node)
        until(lambda: self._states() == {"idle"}, "the nodes do not come up", 30)

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.ask("scancel", "--user=root")
            until(lambda: not self.ask("squeue", "-h"), "jobs do not end", 30)
        finally:
            self._stop()

    def _stop(self) -> None:
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
            daemon.wait(30)

    def ask(self, *command: str, cwd: Path | None = None, **variables: str) -> str:
        """Run one of Slurm's commands and return what it prints."""
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=cwd, env=self._environment | variables, timeout=60, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, *words: str | Path, cwd: Path) -> int:
        """Queue a batch script: options of sbatch, the script, flags of the program."""
        return int(self.ask("sbatch", "--parsable", "--partition=batch", *map(str, words), cwd=cwd))

    def job(self, job: int) -> dict[str, str]:
        """Return what Slurm knows of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.ask("scontrol", "show", "job", "-o", str(job))))

    def ended(self, job: int) -> bool:
        """Say whether a job, or every task of an array, has ended."""
        states = re.findall(r"JobState=(\S+)", self.ask("scontrol", "show", "job", "-o", str(job)))
        return all(state in ENDED for state in states)

    def wait(self, job: int, *, seconds: float = 120.0) -> str:
        """Wait for a job's end and return its last state."""
        until(lambda: self.ended(job), f"job {job} does not end", seconds)
        return self.job(job)["JobState"]

    def lose(self, node: str) -> None:
        """Take a node down as a power failure does: its daemon and all that runs there is killed."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait(30)
        for process in self._processes_of(node):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _processes_of(self, node: str) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                variables = process.environ()
            except psutil.Error:
                continue
            if variables.get("SLURM_CONF") == str(self._conf) and variables.get("SLURMD_NODENAME") == node:
                parent = process.parent()
                found += [parent, process] if parent and parent.name().startswith("slurmstepd") else [process]
        return found

    def _states(self) -> set[str]:
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-o", "%T"], capture_output=True, text=True, env=self._environment, check=False
        )
        return set(done.stdout.split())

    def _start(self, daemon: str, *words: str, name: str | None = None) -> None:
        with (self.folder / f"{name or daemon}.out").open("ab") as out:
            command = [str(shutil.which(daemon, path=_path())), *words]
            self._daemons[name or daemon] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=self._environment
            )

    @property
    def _socket(self) -> Path:
        return self.folder / "munge.socket"

    def _write_configuration(self) -> None:
        folder = self.folder
        nodes = "\n".join(
            f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={free_port()} CPUs=64 Gres=gpu:8"
            for node in self.nodes
        )
        # cred_expire: a requeued job waits that long, two minutes by default.
        self._conf.write_text(
            f"""\
ClusterName=tests
SlurmctldHost=localhost
SlurmctldPort={free_port()}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={self._socket},cred_expire=5
StateSaveLocation={folder}/slurmctld
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=5
GresTypes=gpu
{nodes}
PartitionName=batch Nodes=ALL Default=YES State=UP
"""
        )
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
        for number in range(8):
            (folder / f"gpu{number}").touch()
        for name in ("slurmctld", *self.nodes):
            (folder / name).mkdir()


def until(holds: Callable[[], bool], complaint: str, seconds: float) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{complaint} after {seconds:.0f} s"
        time.sleep(0.2)
