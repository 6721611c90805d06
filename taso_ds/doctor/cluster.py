"""How the job reaches its nodes: Slurm's variables, or the ``deepspeed`` launcher's hostfile over ssh."""

import os
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from taso_ds.doctor.finding import Finding, fail, ok, warn

_SSH_SECONDS = 5
_SHOWN = 4


def check_slurm() -> Finding:
    """Say what Slurm has given this job. The launchers start the ranks: Slurm should start one task per node."""
    if "SLURM_JOB_ID" not in os.environ:
        return ok("Slurm", "not inside a job")
    nodes = slurm_nodes()
    tasks = int(os.environ.get("SLURM_NTASKS", nodes))  # where nobody says, srun starts one per node
    found = f"job {os.environ['SLURM_JOB_ID']}: {nodes} nodes, {tasks} tasks"
    if tasks > nodes:
        return warn("Slurm", found, "#SBATCH --ntasks-per-node=1: torchrun or deepspeed starts the ranks of a node")
    if tasks < nodes:
        return warn("Slurm", found, "start one launcher per node: srun --ntasks-per-node=1 torchrun --nnodes ...")
    return ok("Slurm", found)


def slurm_nodes() -> int:
    """Return the nodes of the Slurm job around this process; 1 without."""
    return int(os.environ.get("SLURM_JOB_NUM_NODES", os.environ.get("SLURM_NNODES", "1")))


def check_hosts(hosts: Mapping[str, int]) -> list[Finding]:
    """Resolve every host of a hostfile, and log in where the launcher will.

    Args:
        hosts: slots by host.
    """
    slots = sorted(set(hosts.values()))
    found = [ok("hostfile", f"{len(hosts)} hosts with {' or '.join(map(str, slots))} slots")]
    if len(slots) > 1:
        remedy = "give every host the same number of slots: ranks of unequal nodes wait for one another"
        found = [warn("hostfile", found[0].found, remedy)]
    if len(hosts) > 1:
        found.append(_check_pdsh())
    with ThreadPoolExecutor(max_workers=32) as pool:
        problems = dict(zip(hosts, pool.map(_unresolved, hosts), strict=True))
        found.append(_summary("hosts resolve", problems, "correct the names in the hostfile, or /etc/hosts and DNS"))
        resolved = [host for host, problem in problems.items() if problem is None]
        if shutil.which("ssh") is None:
            return [*found, fail("ssh", "no ssh in PATH", "install an ssh client, or start torchrun on every node")]
        logins = dict(zip(resolved, pool.map(_no_login, resolved), strict=True))
    remedy = "set up ssh keys without a passphrase and known hosts (ssh-copy-id HOST), for this node too"
    return [*found, _summary("ssh", logins, remedy)] if logins else found


def _check_pdsh() -> Finding:
    path = shutil.which("pdsh")
    if path is None:
        remedy = "install pdsh, pass another --launcher to deepspeed, or start torchrun on every node"
        return fail("pdsh", "not in PATH: deepspeed starts several nodes with it", remedy)
    return ok("pdsh", path)


def _unresolved(host: str) -> str | None:
    try:
        socket.getaddrinfo(host, 22)
    except OSError as error:
        return str(error.strerror)
    return None


def _no_login(host: str) -> str | None:
    """Return why ssh cannot run a command on ``host`` without asking; None when it can."""
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={_SSH_SECONDS}", "-o", "ConnectionAttempts=1"]
    command = ["ssh", *options, host, "true"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=4 * _SSH_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"no answer in {4 * _SSH_SECONDS} s"
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return (lines or [f"exit code {done.returncode}"])[-1] if done.returncode else None


def _summary(check: str, problems: Mapping[str, str | None], remedy: str) -> Finding:
    bad: Sequence[str] = [f"{host} ({why})" for host, why in problems.items() if why is not None]
    if not bad:
        return ok(check, f"all {len(problems)} hosts")
    more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    return fail(check, f"{len(bad)} of {len(problems)} fail: {', '.join(bad[:_SHOWN])}{more}", remedy)
