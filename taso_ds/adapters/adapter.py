"""The sparse adapter of a whole model: one flat parameter, expanded to low-rank pairs, added by hooks.

``W' = W + s · B A`` for every target, with ``A (R, in)``, ``B (out, R)`` and ``s = alpha / rank`` (method section 3).
Only the kept entries are trainable; those of *all* targets live in one flat parameter. Under ZeRO-3 a thousand tiny
parameters would each be gathered after every step; one flat parameter costs one gather per forward, one per backward
and one reduction per step, for a 135M and for a 70B model alike.

The base is not touched: no module is swapped, no name changes. A forward hook on each target adds ``s · (x Aᵀ) Bᵀ`` to
its output (on each module of fused experts: to the rows of each of its experts). The flat parameter is expanded at the
start of each forward of the whole model, because every architecture calls that module, once and outside any
checkpointed block.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from taso_ds.adapters.fused_experts import ExpertHook, ExpertMatrix, HookedExperts, hook_experts
from taso_ds.adapters.selection import CoreRegion
from taso_ds.adapters.structure import STRUCTURES, dense_positions, dense_rank
from taso_ds.adapters.targets import get_target, matrix_shape

ADAPTER_MODULE = "taso_adapter"


@dataclass(frozen=True, eq=False)
class Factors:
    """The dense low-rank pair of one matrix: ``A (R, in_features)`` and ``B (out_features, R)``, zero where pruned."""

    A: Tensor
    B: Tensor


def low_rank_update(output: Tensor, inputs: Tensor, factors: Factors, scaling: float) -> Tensor:
    """Return ``output + scaling · (inputs Aᵀ) Bᵀ``.

    Args:
        output: of the frozen linear, ``(..., out_features)``.
        inputs: of the frozen linear, ``(..., in_features)``.
    """
    hidden = inputs.to(factors.A.dtype).flatten(0, -2) @ factors.A.t()
    flat = torch.addmm(output.flatten(0, -2), hidden, factors.B.t(), alpha=scaling)
    return flat.view_as(output)


class _BeforeForward:
    """Runs ``action`` at the start of each forward of ``model``, until ``remove``.

    The forward itself is replaced: a hook of the model would run before those that ZeRO-3 adds later, and expand the
    flat parameter before ZeRO knows of a new forward.
    """

    def __init__(self, model: nn.Module, action: Callable[[], None]) -> None:
        assert "forward" not in vars(model), "replaced already"
        self._model = model
        forward = model.forward

        @functools.wraps(forward)  # with its signature, which says what the model can be asked for
        def prepared(*args: object, **kwargs: object) -> object:
            action()
            return forward(*args, **kwargs)

        vars(model)["forward"] = prepared

    def remove(self) -> None:
        del vars(self._model)["forward"]


class TasoAdapter(nn.Module):
    """Compact sparse adapters for a set of matrices.

    ``forward`` returns the dense pairs of all matrices as one flat tensor. It is a module of its own so that ZeRO's
    hooks gather the flat parameter exactly for that expansion.

    Args:
        regions: core region per module name; the order is the storage order.
        structure: a key of ``STRUCTURES``.
        rank: rank of each branch.
        scaling: ``s`` in ``W + s · B A``.
        seed: seeds the initial ``A``; ``B`` starts at zero, so the model's output is unchanged at step 0.
        dtype: the engine's dtype.
    """

    def __init__(
        self,
        regions: Mapping[str, CoreRegion],
        *,
        structure: str,
        rank: int,
        scaling: float,
        seed: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.regions = dict(regions)
        self.structure = structure
        self.rank = rank
        self.scaling = scaling
        self._pairs: dict[str, Factors] = {}
        self._handles: list[RemovableHandle | HookedExperts | _BeforeForward] = []
        self._sizes: list[int] = []  # of each A and B in the dense tensor
        generator = torch.Generator().manual_seed(seed)
        values, positions, offset = [], [], 0
        for region in self.regions.values():
            local = dense_positions(structure, region, rank)
            dense = self._initial_dense(region, generator)
            values.append(dense[local])
            positions.append(local + offset)
            offset += dense.numel()
            total_rank = dense_rank(structure, rank)
            self._sizes += [total_rank * region.in_features, region.out_features * total_rank]
        self.num_compact = [len(value) for value in values]
        self.flat = nn.Parameter(torch.cat(values).to(dtype))
        self.register_buffer("positions", torch.cat(positions), persistent=False)
        self.positions: Tensor

    def _initial_dense(self, region: CoreRegion, generator: torch.Generator) -> Tensor:
        """Draw ``A`` as LoRA does, Kaiming-uniform(a=√5), on the full shape (our choice); ``B = 0``."""
        pairs = []
        for _ in STRUCTURES[self.structure]:
            bound = 1.0 / math.sqrt(region.in_features)  # √(6 / ((1 + 5) · fan_in))
            draw = torch.rand(self.rank, region.in_features, generator=generator)
            pairs.append((2.0 * draw - 1.0) * bound)
        A = torch.cat(pairs)
        return torch.cat([A.flatten(), torch.zeros(region.out_features * A.shape[0])])

    @property
    def num_dense(self) -> int:
        """Entries of all dense pairs, pruned ones included."""
        return sum(self._sizes)

    def forward(self) -> Tensor:
        """Return all dense pairs as one tensor of ``num_dense`` elements."""
        dense = torch.zeros(self.num_dense, dtype=self.flat.dtype, device=self.flat.device)
        return dense.index_copy(0, self.positions, self.flat)

    def factors(self, dense: Tensor) -> dict[str, Factors]:
        """Split what ``forward`` returned (or any tensor of that shape) into the pair of each matrix, as views."""
        parts = iter(dense.split(self._sizes))
        total_rank = dense_rank(self.structure, self.rank)
        return {
            name: Factors(
                A=next(parts).view(total_rank, region.in_features),
                B=next(parts).view(region.out_features, total_rank),
            )
            for name, region in self.regions.items()
        }

    def compact(self, flat: Tensor) -> dict[str, Tensor]:
        """Split a full flat tensor into the compact parameters of each matrix, in storage order."""
        return dict(zip(self.regions, flat.split(self.num_compact), strict=True))

    def delta_weight(self, name: str) -> Tensor:
        """Return ``s · B A`` of one matrix, ``(out_features, in_features)``, in fp32: the reference for every test."""
        pair = self.factors(self().detach())[name]
        return self.scaling * (pair.B.float() @ pair.A.float())

    def attach(self, model: nn.Module) -> None:
        """Make ``model`` compute with the adapter. The flat parameter becomes ``taso_adapter.flat`` of ``model``."""
        assert not self._handles, "attached already"
        model.add_module(ADAPTER_MODULE, self)
        self._handles.append(_BeforeForward(model, self._expand))
        targets = {name: get_target(model, name) for name in self.regions}
        experts = {name: target for name, target in targets.items() if isinstance(target, ExpertMatrix)}
        self._handles += hook_experts(experts, self._update_of_experts)
        for name, module in targets.items():
            if isinstance(module, ExpertMatrix):
                continue
            shape, region = matrix_shape(module), self.regions[name]
            assert shape is not None, name
            assert (shape.out_features, shape.in_features) == (region.out_features, region.in_features), name
            self._handles.append(module.register_forward_hook(self._update_of(name)))

    def detach(self, model: nn.Module) -> None:
        """Undo ``attach``: the model computes with its base weights again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._pairs.clear()
        delattr(model, ADAPTER_MODULE)

    def _expand(self) -> None:
        # Kept until the next forward: recomputed blocks read the same pairs in backward.
        self._pairs.update(self.factors(self()))

    def _update_of(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return low_rank_update(output, args[0], self._pairs[name], self.scaling)

        return hook

    def _update_of_experts(self, names: dict[int, str]) -> ExpertHook:
        def hook(counts: Sequence[int], inputs: Tensor, output: Tensor) -> Tensor:
            parts, rows = list(output.split(counts)), inputs.split(counts)
            for index, name in names.items():
                if counts[index]:
                    parts[index] = low_rank_update(parts[index], rows[index], self._pairs[name], self.scaling)
            return torch.cat(parts)

        return hook


def merge_into(weight: Tensor, delta: Tensor, *, transposed: bool) -> Tensor:
    """Return ``weight + delta``, rounded once to the weight's dtype.

    Args:
        delta: fp32, ``(out_features, in_features)``.
        transposed: whether the weight is stored as ``(in_features, out_features)``.
    """
    return (weight.float() + (delta.t() if transposed else delta)).to(weight.dtype)
