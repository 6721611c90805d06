"""Ranks and collectives. Every helper is an identity in one process, so one script runs on a laptop and on 64 GPUs."""

import atexit
import datetime
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from taso_ds.distributed import launcher, network, slurm
from taso_ds.distributed.extensions import warn_of_locks
from taso_ds.distributed.watch import Failure, Watch
from taso_ds.errors import UserError, speaks_for_all

Result = TypeVar("Result")
# Like the process group they belong to they are the process's own: none, or one of each.
_stores: list[Any] = []
_watches: list[Watch] = []
SHARED_MEMORY = Path("/dev/shm")
_GRACE = 4.0  # seconds in which a rank that gave up is noticed


def launched_rank() -> int:
    """Return the rank the launcher gave this process, before any process group exists."""
    return _launched("RANK", 0, range(launched_world_size()))


def launched_world_size() -> int:
    """Return the number of processes the launcher started, before any process group exists."""
    return _launched("WORLD_SIZE", 1, _SIZES)


_SIZES = range(1, 1_000_001)


def _launched(name: str, default: int, valid: range) -> int:
    """Return a number from the launcher's variables.

    Raises:
        UserError: when it is no number, or none of the valid ones.
    """
    text = os.environ.get(name, str(default))
    if not (text.isdecimal() and len(text) < 10 and int(text) in valid):
        wanted = f"a number from {valid[0]} to {valid[-1]}"
        raise UserError(f"environment: {name} is {text!r}, not {wanted}; start with deepspeed, torchrun or srun")
    return int(text)


def check_launched() -> None:
    """Refuse rank variables that no launcher sets, and hosts that ``deepspeed`` did not take, before anything takes its
    time; Slurm's variables are taken over.

    Raises:
        UserError: names the variable, or the hosts.
    """
    slurm.adopt_meeting_point(os.environ)
    if "RANK" not in os.environ:
        if launched_world_size() != 1:
            raise UserError("environment: WORLD_SIZE is set but RANK is not; start with deepspeed, torchrun or srun")
        return
    missing = [name for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"environment: RANK is set but {', '.join(missing)} is not; start with deepspeed, torchrun or srun"
        )
    if local_world_size() > launched_world_size():
        raise UserError(
            f"environment: {local_world_size()} ranks on this node (LOCAL_WORLD_SIZE or LOCAL_SIZE) are more than"
            f" WORLD_SIZE {launched_world_size()}; start with deepspeed, torchrun or srun"
        )
    launched_rank(), local_rank(), _launched("MASTER_PORT", 0, range(1 << 16))
    launcher.check_hosts(launcher.processes_above())


def meet(timeout_minutes: float = 30.0) -> None:
    """Meet the other ranks at a key-value store; alone when no launcher set the rank variables.

    From here on a rank that fails ends all, so what may fail on a single node belongs behind it.

    Raises:
        UserError: when some, but not all, rank variables are set, or others than expected, or the ranks cannot meet.
    """
    if _stores or dist.is_initialized():
        return
    check_launched()
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(_free_port())
    os.environ["MASTER_PORT"] = launcher.own_port(launcher.processes_above()) or os.environ["MASTER_PORT"]
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=datetime.timedelta(minutes=timeout_minutes)))
    except dist.DistError as error:
        first = str(error).splitlines()[0]
        is_taken = "EADDRINUSE" in first or "address already in use" in first.lower()
        remedy = (
            "another run has this port; choose another --master_port (srun: MASTER_PORT)"
            if is_taken
            else "are all nodes started?"
        )
        raise UserError(f"environment: cannot meet at {where}: {first}; {remedy}") from error
    _stores.append(store)
    if world_size > 1:
        _watches.append(Watch(store, rank, world_size))


def init(timeout_minutes: float = 30.0) -> None:
    """Join the process group on the accelerator's own backend, after meeting the other ranks.

    Raises:
        UserError: the ranks cannot meet, or not connect.
    """
    if dist.is_initialized():
        return
    meet(timeout_minutes)
    import deepspeed

    accelerator = deepspeed.accelerator.get_accelerator()
    backend = accelerator.communication_backend_name()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(local_rank())
    elif "OMP_NUM_THREADS" not in os.environ:
        # Ranks that each use every core of a CPU node slow one another down several times over.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world_size()))
    if backend == "gloo" and local_world_size() < launched_world_size():
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
        first = str(error).splitlines()[0][:300]
        remedy = f"open all ports between the nodes, or name their interface in {backend.upper()}_SOCKET_IFNAME"
        raise UserError(f"environment: the ranks met but cannot connect ({first}); {remedy}") from error
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def leave() -> None:
    """Leave the process group: the last call of a rank, which does not return where there are several.

    Partitioned parameters and DeepSpeed's globals keep gloo's communicator alive until the interpreter is torn down,
    where its threads now and then abort a process that has done all its work ("terminate called without an active
    exception"). So the process ends here, once everything registered for its end has run.
    """
    if not dist.is_initialized():
        return
    barrier()
    while _watches:
        _watches.pop().stop()
    _stores.clear()
    alone = dist.get_world_size() == 1
    dist.destroy_process_group()
    if not alone:
        _exit(0)


def _wait_for_all() -> None:
    """Wait for ranks that may take long, with a download, tokens or the proof of an export."""
    if _watches:
        _watches[0].meet()


def cause_elsewhere(wait: float) -> Failure | None:
    """Return what happened to another rank, which this one's trouble may come from; None where there is no other."""
    return _watches[0].cause_elsewhere(wait) if _watches else None


def give_up(line: str, code: int, failure: Failure | None = None) -> NoReturn:
    """Say ``line`` on the rank that speaks for all, tell the other ranks, and end this process.

    They leave too, whatever they wait for.

    Args:
        failure: of another rank, if that is the reason.
    """
    if not _watches:
        if speaks_for_all():
            print(line, file=sys.stderr, flush=True)
        sys.exit(code)
    for number in (signal.SIGTERM, signal.SIGINT):  # a launcher's, which ends what a failed rank leaves behind
        signal.signal(number, signal.SIG_IGN)
    if failure is None:
        _watches[0].tell(line.removeprefix("error: "), code)
    if _watches[0].speaks(failure):
        print(line, file=sys.stderr, flush=True)
    _exit(code)


def _exit(code: int) -> NoReturn:
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    return _launched("LOCAL_RANK", 0, range(local_world_size()))


def local_world_size() -> int:
    """Return the number of ranks on this node; all of them where the launcher does not say."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")
    return _launched(next((name for name in names if name in os.environ), names[-1]), 1, _SIZES)


def spans_nodes() -> bool:
    """Say whether there are ranks on other nodes too."""
    return local_world_size() < world_size()


def is_main() -> bool:
    """Say whether this rank logs and writes."""
    return rank() == 0


def device() -> torch.device:
    """Return this rank's device, as DeepSpeed's accelerator names it."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    name = accelerator.device_name()
    return torch.device("cpu") if name == "cpu" else torch.device(accelerator.device_name(local_rank()))


def peak_device_memory() -> int:
    """Return the peak bytes allocated on this rank's accelerator; 0 on a CPU, which keeps no such count."""
    from deepspeed.accelerator import get_accelerator

    return int(get_accelerator().max_memory_allocated() or 0)


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def reduction_buffer(part: Tensor) -> Tensor:
    """Return the buffer ``add_on_owner`` needs for parts of up to this size and of this dtype."""
    return torch.empty_like(part, dtype=part.dtype if world_size() <= 2 else torch.float32)


def add_on_owner(total: Tensor | None, part: Tensor, owner: int, *, buffer: Tensor) -> None:
    """Add every rank's ``part`` to the fp32 ``total``, which only the owner has; parts are added up in fp32.

    Between two ranks the part itself is sent, in its own dtype, which loses nothing and moves half the bytes of an fp32
    reduction in bf16. More ranks reduce in fp32. ``part`` and ``buffer`` are undefined afterwards.
    """
    assert (total is not None) == (rank() == owner)
    view = buffer.flatten()[: part.numel()].view_as(part)
    if world_size() == 2:
        if total is None:
            dist.send(part, owner)
            return
        total.add_(part.to(total.device))
        dist.recv(view, 1 - owner)
        total.add_(view.to(total.device))
        return
    if world_size() > 2:
        view.copy_(part)
        dist.reduce(view, owner)
        part = view
    if total is not None:
        total.add_(part.to(total.device))


def concatenate_on(part: Tensor, owner: int) -> Tensor | None:
    """Return the flat parts of all ranks, which are equally long, end to end on ``owner``; None elsewhere."""
    if world_size() == 1:
        return part
    whole = torch.empty(world_size() * part.numel(), dtype=part.dtype, device=part.device) if rank() == owner else None
    dist.gather(part, None if whole is None else list(whole.chunk(world_size())), dst=owner)
    return whole


def join_on(part: Tensor, owner: int, *, lengths: Sequence[int]) -> Tensor | None:
    """Return flat parts of the given lengths, many of them perhaps 0, end to end on ``owner``; None elsewhere.

    Only ranks that have something send it.
    """
    if world_size() == 1:
        return part
    whole = torch.empty(sum(lengths), dtype=part.dtype, device=part.device) if rank() == owner else None
    if whole is None:
        sent = [dist.P2POp(dist.isend, part, owner)] if lengths[rank()] else []
    else:
        parts = whole.split(list(lengths))
        parts[owner].copy_(part)
        sent = [dist.P2POp(dist.irecv, parts[other], other) for other, n in enumerate(lengths) if n and other != owner]
    for work in dist.batch_isend_irecv(sent) if sent else []:
        work.wait()
    return whole


def sum_everywhere(tensor: Tensor) -> None:
    """Add ``tensor`` over all ranks, in place, everywhere."""
    if world_size() > 1:
        dist.all_reduce(tensor)


def sum_on_main(tensor: Tensor) -> None:
    """Add ``tensor`` over all ranks on rank 0, in place; undefined elsewhere afterwards."""
    if world_size() > 1:
        dist.reduce(tensor, 0)


def largest_everywhere(tensor: Tensor) -> None:
    """Take each element's maximum over all ranks, in place, everywhere."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)


def broadcast(tensor: Tensor, source: int) -> None:
    """Copy ``tensor`` from ``source`` to all ranks, in place."""
    if world_size() > 1:
        dist.broadcast(tensor, source)


def gather_rows(row: Tensor) -> Tensor:
    """Return the equally long tensors of all ranks, stacked by rank ``(ranks, length)``, on every rank."""
    if world_size() == 1:
        return row[None]
    rows = [torch.empty_like(row) for _ in range(world_size())]
    dist.all_gather(rows, row)
    return torch.stack(rows)


def gather_objects(value: Any) -> list[Any]:
    """Return the small Python objects of all ranks, by rank, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_main(action: Callable[[], Result]) -> Result:
    """Run ``action`` on rank 0 and return its (small) result on every rank.

    Raises:
        UserError: on every rank, when rank 0 raised one: all leave together and none waits for a dead rank.
    """
    if world_size() == 1:
        return action()
    box: list[Any] = [None, None]
    if is_main():
        try:
            box[0] = action()
        except UserError as error:
            box[1] = str(error)
    _wait_for_all()
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise UserError(box[1])
    result: Result = box[0]
    return result


def together(action: Callable[[], Result]) -> Result:
    """Run a local ``action`` on every rank and return each rank's own result.

    Raises:
        UserError: on every rank, when any rank raised one: nobody is left waiting for a rank that gave up.
    """
    result, message = None, None
    try:
        result = action()
    except UserError as error:
        message = str(error)
    _wait_for_all()
    for number, other in enumerate(gather_objects(message)):
        if other is not None:
            raise UserError(other if number == 0 else f"rank {number}: {other}")
    return result  # type: ignore[return-value]
