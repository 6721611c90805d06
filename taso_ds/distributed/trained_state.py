"""The trained state of an engine, whole on rank 0: fp32 weights and Adam's two moments, whatever the ZeRO stage.

Every stage keeps them in another layout: whole on every rank (stage 0), as one flat tensor per parameter group cut
into equal ranges (1, 2), as each parameter's own shards one after the other (3). A ``Fragment`` says where a rank holds
which range of which parameter; reading and writing know fragments only, so what one stage and world size wrote, any
other reads.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from taso_ds.distributed import comm, zero
from taso_ds.distributed.engine import base_optimizer, zero_stage_of

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


def read_state(engine: Any, names: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, str, Tensor]]:
    """Yield ``(kind, parameter name, fp32 tensor of its shape)``, whole on rank 0 and empty elsewhere. A collective.

    One tensor at a time is alive. The bits are those the optimizer holds.
    """
    optimizer, fragments = base_optimizer(engine), _fragments(engine)
    if zero_stage_of(engine) == 0 and not comm.is_main():
        fragments = {}  # all hold the same
    for name, parameter in names.items():
        shape = zero.full_shape(parameter)
        for kind in KINDS:
            bits = torch.zeros(shape.numel(), dtype=torch.int32, device=comm.device())
            for part in fragments.get(id(parameter), []):
                held = part.holder if kind == MASTER else optimizer.state[part.holder][kind]
                bits[part.start : part.start + part.length] = part.of(held).view(torch.int32).to(bits.device)
            comm.sum_on_main(bits)  # an element is on one rank; elsewhere its bits are zero
            yield kind, name, bits.view(torch.float32).view(shape).cpu() if comm.is_main() else torch.empty(0)


def optimizer_steps(engine: Any) -> int:
    """Return the number of steps that Adam's bias correction counts."""
    counts = {int(state["step"]) for state in base_optimizer(engine).state.values() if "step" in state}
    assert len(counts) <= 1, counts
    return counts.pop() if counts else 0


def write_state(
    engine: Any, names: Mapping[str, nn.Parameter], read: Callable[[str, str], Tensor], *, steps: int
) -> None:
    """Make the engine hold what ``read_state`` yielded after ``steps`` steps. A collective.

    Args:
        read: returns a whole tensor by kind and parameter name; called on rank 0 only.
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


def _fragments(engine: Any) -> dict[int, list[Fragment]]:
    """Return this rank's ranges by the parameter's id; over all ranks every element once, at stage 0 on each."""
    layout = {0: _whole, 1: _cut_groups, 2: _cut_groups, 3: _sharded}[zero_stage_of(engine)]
    found: dict[int, list[Fragment]] = {}
    for parameter, fragment in layout(engine.optimizer):
        if fragment.length > 0:
            found.setdefault(id(parameter), []).append(fragment)
    return found


def _whole(optimizer: Any) -> Iterator[tuple[Tensor, Fragment]]:
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


def _cut_groups(optimizer: Any) -> Iterator[tuple[Tensor, Fragment]]:
    """Stages 1 and 2: a group's parameters lie one after the other, padded, cut into one range per rank."""
    for number, holder in enumerate(optimizer.single_partition_of_fp32_groups):
        first = comm.rank() * holder.numel()
        parameters, offsets = optimizer.round_robin_bit16_groups[number], optimizer.round_robin_bit16_offsets[number]
        for parameter, begins in zip(parameters, offsets, strict=True):
            start = max(0, first - begins)
            stop = min(parameter.numel(), first + holder.numel() - begins)
            yield parameter, Fragment(start, stop - start, holder, begins + start - first)


def _sharded(optimizer: Any) -> Iterator[tuple[Tensor, Fragment]]:
    """Stage 3: this rank's shards of a group's parameters lie one after the other."""
    for parameters, holder in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for parameter in parameters:
            size = parameter.ds_tensor.ds_numel
            start = size * comm.rank()
            yield parameter, Fragment(start, min(size, parameter.ds_numel - start), holder, offset)
            offset += size
