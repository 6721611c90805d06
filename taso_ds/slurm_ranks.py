"""Ranks that ``srun`` starts: Slurm's variables in the words of torch.distributed, found without ssh.

Only variables of a *step* count. The batch script itself has ``SLURM_PROCID=0`` and ``SLURM_NTASKS`` too, but without
``srun`` it starts one process, which would wait for the others for ever.
"""

import re
import socket
import subprocess
from collections.abc import MutableMapping

from taso_ds.errors import UserError

# Below the ports that Linux hands out by itself; the width is a prime, so that jobs that follow each other spread.
_FIRST_PORT, _PORTS = 12000, 19997
_STEPS_PER_JOB = 16


def adopt_ranks(environment: MutableMapping[str, str]) -> None:
    """Set the rank variables of a process that ``srun`` started; torchrun and deepspeed set their own."""
    world_size = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environment or world_size == "1":
        return
    node = int(environment["SLURM_NODEID"])
    environment.update(
        RANK=environment["SLURM_PROCID"],
        LOCAL_RANK=environment["SLURM_LOCALID"],
        WORLD_SIZE=world_size,
        LOCAL_WORLD_SIZE=str(tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])[node]),
    )


def adopt_meeting_point(environment: MutableMapping[str, str]) -> None:
    """Set where the ranks of a step meet: rank 0's host, and a port that follows from the job. What is set stays.

    Raises:
        UserError: the host has no address, or the port is taken.
    """
    if "SLURM_STEP_NODELIST" not in environment or "RANK" not in environment:
        return
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = _address(first_host(environment["SLURM_STEP_NODELIST"]))
    if "MASTER_PORT" not in environment:
        environment["MASTER_PORT"] = str(port_of(int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])))
        if environment["RANK"] == "0":
            _check_free(int(environment["MASTER_PORT"]))


def tasks_per_node(text: str) -> list[int]:
    """Return the number of tasks of each node from Slurm's short form: ``2(x3),1`` is 2, 2, 2, 1."""
    counts = []
    for part in text.split(","):
        count, _, repeated = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(repeated or 1)
    return counts


def first_host(nodes: str) -> str:
    """Return the first host of Slurm's short form: ``gpu-[003-005,9]x,login`` begins with ``gpu-003x``."""
    (first,) = re.findall(r"^(?:\[[^]]*\]|[^,[])+", nodes)
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", first)


def port_of(job: int, step: int) -> int:
    """Return the port of a job's step: jobs and steps that can share a host get different ones."""
    return _FIRST_PORT + (job * _STEPS_PER_JOB + step % _STEPS_PER_JOB) % _PORTS


def _address(host: str) -> str:
    """Return the name of a host or, where it means nothing here, the address that Slurm reaches it by."""
    try:
        socket.getaddrinfo(host, None)
        return host
    except OSError:
        found = re.search(r"\bNodeAddr=(\S+)", _ask_slurm("show", "node", host))
    if found is None:
        raise UserError(f"environment: {host}, where rank 0 is, has no address here; set MASTER_ADDR to one")
    return found[1]


def _ask_slurm(*question: str) -> str:
    try:
        return subprocess.run(["scontrol", *question], capture_output=True, text=True, check=False, timeout=60).stdout
    except OSError:  # a container without Slurm's commands
        return ""


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that only cools down will do
        try:
            probe.bind(("", port))
        except OSError as error:
            host = socket.gethostname()
            raise UserError(f"environment: port {port} of {host} is taken ({error}); set MASTER_PORT") from error
