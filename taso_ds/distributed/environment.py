"""The rank variables that deepspeed, torchrun and srun set: read and checked before any process group exists."""

import os

from taso_ds import slurm_ranks
from taso_ds.distributed import launcher
from taso_ds.errors import UserError

_SIZES = range(1, 1_000_001)


def rank() -> int:
    """Return the rank the launcher gave this process; 0 where none did."""
    return _number("RANK", 0, range(world_size()))


def world_size() -> int:
    """Return the number of processes the launcher started; 1 where none did."""
    return _number("WORLD_SIZE", 1, _SIZES)


def local_rank() -> int:
    """Return this process's number among the ranks of its node."""
    return _number("LOCAL_RANK", 0, range(local_world_size()))


def local_world_size() -> int:
    """Return the number of ranks on this node; all of them where the launcher does not say."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")
    return _number(next((name for name in names if name in os.environ), names[-1]), 1, _SIZES)


def check() -> None:
    """Take over Slurm's variables, then refuse rank variables that no launcher sets, and hosts that it did not take.

    This costs nothing, so it comes first.

    Raises:
        UserError: names the variable, or the hosts.
    """
    slurm_ranks.adopt_meeting_point(os.environ)
    if "RANK" not in os.environ:
        if world_size() != 1:
            raise UserError("environment: WORLD_SIZE is set but RANK is not; start with deepspeed, torchrun or srun")
        return
    missing = [name for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"environment: RANK is set but not {', '.join(missing)}; start with deepspeed, torchrun or srun"
        )
    if local_world_size() > world_size():
        raise UserError(
            f"environment: {local_world_size()} ranks on this node (LOCAL_WORLD_SIZE or LOCAL_SIZE) are more than"
            f" WORLD_SIZE {world_size()}; start with deepspeed, torchrun or srun"
        )
    rank(), local_rank(), _number("MASTER_PORT", 0, range(1 << 16))
    launcher.check_hosts(launcher.processes_above())


def _number(name: str, default: int, valid: range) -> int:
    """Return a number from the launcher's variables.

    Raises:
        UserError: when it is no number, or none of the valid ones.
    """
    text = os.environ.get(name, str(default))
    if not (text.isdecimal() and len(text) < 10 and int(text) in valid):
        wanted = f"a number from {valid[0]} to {valid[-1]}"
        raise UserError(f"environment: {name} is {text!r}, not {wanted}; start with deepspeed, torchrun or srun")
    return int(text)
