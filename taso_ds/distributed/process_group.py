"""How a process meets the other ranks, joins them, and leaves; alone, it is a group of one."""

import atexit
import datetime
import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from taso_ds.console import screen as console
from taso_ds.distributed import environment, launcher, meeting, network
from taso_ds.distributed.accelerator import usable_accelerator
from taso_ds.distributed.extensions import joining_problem, warn_of_locks
from taso_ds.distributed.watch import Failure, Watch
from taso_ds.errors import LibraryError, speaks_for_all

log = logging.getLogger(__name__)

# Like the process group they belong to they are the process's own: none, or one of each.
_stores: list[dist.Store] = []
_watches: list[Watch] = []
SHARED_MEMORY = Path("/dev/shm")
_GRACE = 4.0  # seconds in which a rank that gave up is noticed


def meet(timeout_minutes: float = 30.0) -> None:
    """Meet the other ranks at a key-value store; alone when no launcher set the rank variables.

    From here on a rank that fails ends all. So what may fail on a single node is done after it.

    Raises:
        UserError: the rank variables are incomplete or wrong, or the ranks cannot meet.
    """
    if _stores or dist.is_initialized():
        return
    environment.check()
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(meeting.free_port())
    os.environ["MASTER_PORT"] = launcher.own_port(launcher.processes_above()) or os.environ["MASTER_PORT"]
    store = meeting.meet(timeout_minutes)
    _stores.append(store)
    if environment.world_size() > 1:
        _watches.append(Watch(store, environment.rank(), environment.world_size()))


def init(timeout_minutes: float = 30.0) -> None:
    """Join the process group on the accelerator's own backend, after meeting the other ranks.

    Raises:
        UserError: the ranks cannot meet, or not connect.
    """
    if dist.is_initialized():
        return
    meet(timeout_minutes)
    accelerator = usable_accelerator(environment.local_rank())
    import deepspeed

    backend = accelerator.communication_backend_name()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(environment.local_rank())
    elif "OMP_NUM_THREADS" not in os.environ:
        # Ranks that each use every core of a CPU node slow one another down several times over.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // environment.local_world_size()))
    if backend == "gloo" and environment.local_world_size() < environment.world_size():
        network.check_gloo_address()
    warn_of_locks()
    try:
        # Through DeepSpeed, which binds devices as each version of torch needs it; it finds the same meeting point.
        deepspeed.init_distributed(
            dist_backend=backend, timeout=datetime.timedelta(minutes=timeout_minutes), verbose=False
        )
    except RuntimeError as error:
        if cause_elsewhere(_GRACE) is not None:
            raise  # a rank that gave up is no trouble of the network
        raise LibraryError(f"environment: {joining_problem(error, backend)}") from error
    if accelerator.device_name() == "cpu":
        _unlink_shared_buffers()


def _unlink_shared_buffers() -> None:
    """Remove the names of DeepSpeed's shared-memory buffers, 66 MB per rank, which it leaves behind for ever.

    Every rank has opened all of them when it has joined, and the memory lives as long as it is mapped.
    """
    dist.barrier()
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{dist.get_rank()}"
    (SHARED_MEMORY / name).unlink(missing_ok=True)


def leave() -> None:
    """Leave the process group: the last call of a rank, which does not return where there are several.

    Partitioned parameters and DeepSpeed's globals keep gloo's communicator alive until the interpreter is torn down,
    where its threads now and then abort a process that has done all its work ("terminate called without an active
    exception"). So the process ends here, once everything registered for its end has run.
    """
    if not dist.is_initialized():
        return
    alone = dist.get_world_size() == 1
    if not alone:
        dist.barrier()
    while _watches:
        _watches.pop().stop()
    _stores.clear()
    dist.destroy_process_group()
    if not alone:
        _exit(0)


def wait_for_all() -> None:
    """Wait for ranks that may take long over a download, tokens or the proof of an export."""
    if _watches:
        _watches[0].meet()


def cause_elsewhere(wait: float) -> Failure | None:
    """Return what happened to another rank, and may have caused this one's trouble; None where nothing has.

    Args:
        wait: seconds in which to look.
    """
    return _watches[0].cause_elsewhere(wait) if _watches else None


def give_up(line: str, code: int, failure: Failure | None = None) -> NoReturn:
    """Say ``line`` on the rank that speaks for all, tell the other ranks, and end this process.

    They leave too, whatever they wait for.

    Args:
        line: what the user is to read.
        code: of the exit.
        failure: of another rank, if that is the reason.
    """
    if not _watches:
        if speaks_for_all():
            print(line, file=console.err(), flush=True)
        sys.exit(code)
    if failure is None:
        _watches[0].tell(line.removeprefix("error: "), code)
    if _watches[0].speaks(failure):
        print(line, file=console.err(), flush=True)
    _exit(code)


def _exit(code: int) -> NoReturn:
    atexit._run_exitfuncs()
    console.end()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
