"""Parameters that may be partitioned by ZeRO-3: shapes, gathering, shards. Ordinary parameters pass through.

When whole parameters come together at stage 3, and how:

- forward and backward of training, scoring and evaluation: DeepSpeed's hooks gather each module's weights just before
  they are used, in buckets, and free them behind it. An adapter is one flat parameter, gathered once per direction;
- after a scoring pass: each adapted weight travels to the one rank that scores it (``gathered_on``);
- a checkpoint or an export: what is trained, on rank 0; the frozen base never;
- loading: nothing, each rank reads its own part (``sharded``). A fingerprint is a sum over shards (``checksum``).
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeGuard

import torch
from torch import Tensor, nn

from taso_ds.distributed import comm
from taso_ds.distributed.deepspeed_types import PartitionedParameter


def is_partitioned(parameter: Tensor) -> TypeGuard[PartitionedParameter]:
    """Say whether ZeRO-3 holds this parameter as one shard per rank."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: Tensor) -> torch.Size:
    """Return the shape of the whole parameter, also of a partitioned one, whose own shape has 0 elements."""
    return torch.Size(parameter.ds_shape) if is_partitioned(parameter) else parameter.shape


def full_numel(parameter: Tensor) -> int:
    return full_shape(parameter).numel()


@contextmanager
def gathered(parameters: Iterable[nn.Parameter], *, write: bool = False) -> Iterator[None]:
    """Make whole parameters readable on every rank; with ``write``, keep what rank 0 wrote.

    A collective: every rank enters with the same parameters.
    """
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if write else None):
        yield


def assign(parameter: nn.Parameter, whole: Tensor) -> None:
    """Give ``parameter`` the values of ``whole``, which every rank has. A collective."""
    with gathered([parameter], write=True), torch.no_grad():
        if comm.is_main() or not is_partitioned(parameter):
            parameter.copy_(whole)


def gathered_on(parameter: Tensor, owner: int, *, index: int | None = None) -> Tensor | None:
    """Return the whole parameter, or its slice ``[index]``, detached, on rank ``owner`` and None elsewhere.

    A collective. The shards, or their parts of the slice, travel to the owner only. Nothing travels where ZeRO has the
    parameter whole at the moment. The owner may keep the result.
    """
    if is_partitioned(parameter) and parameter.ds_status.name != "AVAILABLE":
        if index is not None:
            return _slice_on(parameter, owner, index)
        whole = comm.concatenate_on(_read_shard(parameter).to(comm.device()), owner)
        return None if whole is None else whole[: parameter.ds_numel].view(parameter.ds_shape)
    if comm.rank() != owner:
        return None
    whole = parameter.detach() if index is None else parameter.detach()[index]
    return whole.clone() if is_partitioned(parameter) else whole  # what ZeRO gathered may be a view of many


def _slice_on(parameter: PartitionedParameter, owner: int, index: int) -> Tensor | None:
    shape = torch.Size(parameter.ds_shape[1:])
    start, size = index * shape.numel(), parameter.ds_tensor.ds_numel
    # What each rank's shard, the next ``size`` elements, has of the slice: elements of the shard from one to another.
    ends = [(max(0, start - n * size), min(size, start + shape.numel() - n * size)) for n in range(comm.world_size())]
    first, last = ends[comm.rank()]
    part = _read_shard(parameter)[first:last] if last > first else torch.empty(0, dtype=parameter.dtype)
    whole = comm.join_on(part.to(comm.device()), owner, lengths=[max(0, last - first) for first, last in ends])
    return None if whole is None else whole.view(shape)


def full_copy(parameter: nn.Parameter, *, to_rank: int | None = None) -> Tensor:
    """Return a detached CPU copy of the whole parameter on every rank, or on ``to_rank`` (empty elsewhere)."""
    with gathered([parameter]):
        if to_rank is None or comm.rank() == to_rank:
            return parameter.detach().cpu().clone()
    return torch.empty(0, dtype=parameter.dtype)


def local_shard(parameter: Tensor) -> tuple[Tensor, int]:
    """Return this rank's part of the flattened parameter without padding, and its offset.

    An ordinary parameter is cut the same way, so that sums over ranks count every element once.
    """
    total = full_numel(parameter)
    if is_partitioned(parameter):
        shard = _read_shard(parameter)
        offset = shard.numel() * comm.rank()
        return shard[: max(0, min(shard.numel(), total - offset))], offset
    size = -(-total // comm.world_size())
    offset = min(size * comm.rank(), total)
    return parameter.detach().flatten()[offset : offset + size], offset


def _read_shard(parameter: PartitionedParameter) -> Tensor:
    """Return this rank's padded shard, read back if it was offloaded to NVMe."""
    if parameter.ds_tensor.status.name == "AVAILABLE":
        return parameter.ds_tensor.flatten()
    parameter.nvme_swapper.swap_in([parameter], async_op=False)
    shard = parameter.ds_tensor.flatten().clone()
    parameter.nvme_swapper.remove_partition_and_release_buffers([parameter])
    return shard


def assert_partitioned(model: nn.Module) -> None:
    """Fail if ZeRO-3 left a parameter of ``model`` whole on this rank: then it was built outside ``zero.Init``."""
    whole = [name for name, parameter in model.named_parameters() if not is_partitioned(parameter)]
    assert not whole, f"ZeRO-3 did not partition {whole[:3]} and {len(whole)} parameters in all"
    for name, parameter in model.named_parameters():
        share = -(-full_numel(parameter) // comm.world_size())
        assert is_partitioned(parameter), name
        assert parameter.ds_tensor.ds_numel <= share, f"{name} is not partitioned"


_PERIOD = 65_521


def checksum(parameters: Sequence[Tensor]) -> list[int]:
    """Return one integer per parameter from its bf16 bits: equal for every sharding and for fp32 and bf16 loads.

    A collective. Each element's bits are weighted by its position, so permuted weights differ too.
    """
    sums = torch.zeros(len(parameters), dtype=torch.int64)
    chunk = 1 << 22
    for number, parameter in enumerate(parameters):
        shard, offset = local_shard(parameter)
        for start in range(0, shard.numel(), chunk):
            sums[number] += weighted_bits(shard[start : start + chunk], offset + start)
    on_device = sums.to(comm.device())
    comm.sum_everywhere(on_device)
    return [int(value) for value in on_device]


def weighted_bits(part: Tensor, first: int) -> Tensor:
    """Return a flat tensor's contribution to the checksum of a parameter in which it begins at ``first``.

    The element at position ``i`` weighs ``i mod 65521 + 1``; equal weights are added up before they are multiplied.
    """
    before = first % _PERIOD
    rows = -(-(before + len(part)) // _PERIOD)
    bits = torch.zeros(rows * _PERIOD, dtype=torch.int16, device=part.device)
    bits[before : before + len(part)] = part.to(torch.bfloat16).view(torch.int16)
    weights = torch.arange(1, _PERIOD + 1, device=part.device)
    return (bits.view(rows, _PERIOD).sum(0, dtype=torch.int64) * weights).sum().cpu()
