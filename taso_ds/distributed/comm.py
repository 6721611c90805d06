"""Ranks and collectives. Every helper is an identity in one process, so one script runs on a laptop and on 64 GPUs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from taso_ds.distributed import environment
from taso_ds.distributed.process_group import wait_for_all
from taso_ds.errors import UserError

Result = TypeVar("Result")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def spans_nodes() -> bool:
    """Say whether there are ranks on other nodes too."""
    return environment.local_world_size() < world_size()


def is_main() -> bool:
    """Say whether this rank logs and writes."""
    return rank() == 0


def device() -> torch.device:
    """Return this rank's device, as DeepSpeed's accelerator names it."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    name = accelerator.device_name()
    return torch.device("cpu") if name == "cpu" else torch.device(accelerator.device_name(environment.local_rank()))


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def reduction_buffer(part: Tensor) -> Tensor:
    """Return the buffer that ``add_on_owner`` needs for parts of this dtype and at most this size."""
    return torch.empty_like(part, dtype=part.dtype if world_size() <= 2 else torch.float32)


def add_on_owner(total: Tensor | None, part: Tensor, owner: int, *, buffer: Tensor) -> None:
    """Add every rank's ``part`` to ``total``. A collective.

    Two ranks send the part itself in its own dtype: nothing is lost, and bf16 moves half the bytes of an fp32
    reduction. More ranks reduce in fp32.

    Args:
        total: the sum in fp32 on the owner; None elsewhere.
        part: of the shape of ``total``; undefined afterwards.
        owner: the rank that has the sum.
        buffer: of ``reduction_buffer``; undefined afterwards.
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
    """Return the flat parts of all ranks end to end on ``owner``; None elsewhere. Only ranks that have something send.

    Args:
        part: this rank's.
        owner: the rank that gets them.
        lengths: the number of elements of each rank's part; many may be 0.
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
    """Return the equally long tensors of all ranks on every rank, stacked by rank: ``(ranks, length)``."""
    if world_size() == 1:
        return row[None]
    rows = [torch.empty_like(row) for _ in range(world_size())]
    dist.all_gather(rows, row)
    return torch.stack(rows)


def gather_objects(value: Result) -> list[Result]:
    """Return the small Python objects of all ranks, by rank, on every rank."""
    if world_size() == 1:
        return [value]
    values = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_main(action: Callable[[], Result]) -> Result:
    """Run ``action`` on rank 0 and return its (small) result on every rank.

    Raises:
        UserError: on every rank when rank 0 raised one, so that no rank waits for another that has left.
    """
    if world_size() == 1:
        return action()
    box = [_attempt(action) if is_main() else _Outcome[Result]()]
    wait_for_all()
    dist.broadcast_object_list(box, src=0)
    if box[0].error is not None:
        raise UserError(box[0].error)
    return box[0].results[0]


def together(action: Callable[[], Result]) -> Result:
    """Run a local ``action`` on every rank and return each rank's own result.

    Raises:
        UserError: on every rank when any rank raised one, so that no rank waits for another that has left.
    """
    outcome = _attempt(action)
    wait_for_all()
    for number, error in enumerate(gather_objects(outcome.error)):
        if error is not None:
            raise UserError(error if number == 0 else f"rank {number}: {error}")
    return outcome.results[0]


@dataclass(frozen=True)
class _Outcome(Generic[Result]):
    """What came of an action: one result, or what was wrong."""

    results: tuple[Result, ...] = ()
    error: str | None = None


def _attempt(action: Callable[[], Result]) -> _Outcome[Result]:
    try:
        return _Outcome((action(),))
    except UserError as error:
        return _Outcome(error=str(error))
