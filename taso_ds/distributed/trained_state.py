"""The trained state of an engine, whole on rank 0: fp32 weights and Adam's two moments, whatever the ZeRO stage.

Each stage has its own layout: everything on every rank (stage 0), one flat tensor per parameter group, cut into equal
ranges (1, 2), or each parameter's own shards, one after the other (3). A ``Fragment`` says where a rank holds which
range of which parameter. Reading and writing know fragments only, so any stage and world size reads what any other
wrote.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from taso_ds.distributed import comm, zero
from taso_ds.distributed.deepspeed_types import Bf16Optimizer, CutOptimizer, Engine, ShardedOptimizer, WholeOptimizer
from taso_ds.distributed.engine import base_optimizer

MASTER = "master"
KINDS = (MASTER, "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, eq=False)
class Fragment:
    """A range of one flattened parameter that this rank's optimizer updates.

    Attributes:
        start: where the range begins in the flattened parameter.
        holder: the tensor the optimizer steps; its state is keyed by it.
        offset: where the range begins in the flattened holder.
    """

    start: int
    length: int
    holder: Tensor
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return this range of the holder, or of a moment laid out like it; a view."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.length]


def read_state(engine: Engine, names: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, str, Tensor]]:
    """Yield ``(kind, parameter name, fp32 tensor of its shape)``, whole on rank 0 and empty elsewhere. A collective.

    One tensor at a time is alive. Its bits are those the optimizer holds.
    """
    optimizer, fragments = base_optimizer(engine), _fragments(engine)
    if engine.zero_optimization_stage() == 0 and not comm.is_main():
        fragments = {}  # all hold the same
    for name, parameter in names.items():
        shape = zero.full_shape(parameter)
        for kind in KINDS:
            bits = torch.zeros(shape.numel(), dtype=torch.int32, device=comm.device())
            for part in fragments.get(id(parameter), []):
                held = part.holder if kind == MASTER else optimizer.state[part.holder].get(kind)
                if held is not None:  # before the first step there are no moments: zeros
                    bits[part.start : part.start + part.length] = part.of(held).view(torch.int32).to(bits.device)
            comm.sum_on_main(bits)  # an element is on one rank; elsewhere its bits are zero
            yield kind, name, bits.view(torch.float32).view(shape).cpu() if comm.is_main() else torch.empty(0)


def optimizer_steps(engine: Engine) -> int:
    """Return the number of steps that Adam's bias correction counts."""
    counts = {int(state["step"]) for state in base_optimizer(engine).state.values() if "step" in state}
    assert len(counts) <= 1, counts
    return counts.pop() if counts else 0


def write_state(
    engine: Engine, names: Mapping[str, nn.Parameter], read: Callable[[str, str], Tensor], *, steps: int
) -> None:
    """Make the engine hold what ``read_state`` yielded after ``steps`` steps. A collective.

    Args:
        engine: of any stage and world size.
        names: the trained parameters.
        read: returns a whole tensor by kind and parameter name; called on rank 0 only.
        steps: what Adam's bias correction has counted.
    """
    optimizer, fragments = base_optimizer(engine), _fragments(engine)
    for name, parameter in names.items():
        for kind in KINDS:
            whole = read(kind, name).to(comm.device()) if comm.is_main() else None
            whole = _everywhere(whole, zero.full_shape(parameter))
            for part in fragments.get(id(parameter), []):
                held = part.holder if kind == MASTER else _moment(optimizer, part.holder, kind, steps)
                part.of(held).copy_(whole.view(-1)[part.start : part.start + part.length])
            if kind == MASTER:
                zero.assign(parameter, whole)


def _everywhere(whole: Tensor | None, shape: torch.Size) -> Tensor:
    if whole is None:
        whole = torch.empty(shape, dtype=torch.float32, device=comm.device())
    whole = whole.contiguous()
    comm.broadcast(whole, 0)
    return whole


def _moment(optimizer: torch.optim.Optimizer, holder: Tensor, kind: str, steps: int) -> Tensor:
    """Return a moment of ``holder``, made if the optimizer has not stepped yet."""
    state = optimizer.state[holder]
    state["step"] = torch.tensor(float(steps))
    if kind not in state:
        state[kind] = torch.zeros_like(holder)
    moment: Tensor = state[kind]
    return moment


def _fragments(engine: Engine) -> dict[int, list[Fragment]]:
    """Return this rank's ranges by the parameter's id.

    The ranges of all ranks together hold every element once; at stage 0 each rank's hold all.
    """
    cut = _flat_groups if hasattr(engine.optimizer, "bf16_groups") else _cut_groups
    layouts: dict[int, Callable[[Any], Iterator[tuple[Tensor, Fragment]]]]
    layouts = {0: _whole, 1: cut, 2: cut, 3: _sharded}
    found: dict[int, list[Fragment]] = {}
    for parameter, fragment in layouts[engine.zero_optimization_stage()](engine.optimizer):
        if fragment.length > 0:
            found.setdefault(id(parameter), []).append(fragment)
    return found


def _whole(optimizer: torch.optim.Optimizer | WholeOptimizer) -> Iterator[tuple[Tensor, Fragment]]:
    """Stage 0: every rank holds everything."""
    if isinstance(optimizer, torch.optim.Optimizer):
        pairs = [(value, value) for group in optimizer.param_groups for value in group["params"]]
    else:
        pairs = [
            pair
            for weights, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
            for pair in zip(weights, masters, strict=True)
        ]
    for parameter, master in pairs:
        yield parameter, Fragment(0, master.numel(), master, 0)


def _flat_groups(optimizer: Bf16Optimizer) -> Iterator[tuple[Tensor, Fragment]]:
    """Stage 1 in bf16: a group's parameters lie one after the other, cut into one range per rank."""
    groups = optimizer.bf16_groups
    offsets = [accumulate((value.numel() for value in group), initial=0) for group in groups]
    yield from _ranges(optimizer.fp32_groups_flat_partition, groups, offsets)


def _cut_groups(optimizer: CutOptimizer) -> Iterator[tuple[Tensor, Fragment]]:
    """Stages 1 and 2: the same, perhaps with padding between the parameters."""
    groups, offsets = optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets
    yield from _ranges(optimizer.single_partition_of_fp32_groups, groups, offsets)


def _ranges(
    holders: Sequence[Tensor], groups: Sequence[Sequence[Tensor]], offsets: Sequence[Iterable[int]]
) -> Iterator[tuple[Tensor, Fragment]]:
    """Yield what of each parameter lies in this rank's range of its group."""
    for holder, parameters, begins in zip(holders, groups, offsets, strict=True):
        first = comm.rank() * holder.numel()
        for parameter, begin in zip(parameters, begins, strict=False):
            start = max(0, first - begin)
            stop = min(parameter.numel(), first + holder.numel() - begin)
            yield parameter, Fragment(start, stop - start, holder, begin + start - first)


def _sharded(optimizer: ShardedOptimizer) -> Iterator[tuple[Tensor, Fragment]]:
    """Stage 3: this rank's shards of a group's parameters lie one after the other."""
    for parameters, holder in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for parameter in parameters:
            size = parameter.ds_tensor.ds_numel
            start = size * comm.rank()
            yield parameter, Fragment(start, min(size, parameter.ds_numel - start), holder, offset)
            offset += size
