"""The experts that transformers keeps in one module: each slice of their fused parameters is a matrix of its own.

Such a module holds ``gate_up_proj (E, 2f, h)`` (``up_proj`` where there is no gate) and ``down_proj (E, h, f)`` of
``E`` experts, the last two dimensions swapped where ``is_transposed``, and says in its attributes how they are used. It
has no linears to hook. So while something listens, its forward is replaced by one that computes the same: every pair of
a token and an expert it chose is one row, the rows are sorted by expert, and each parameter is applied to all rows in
one call that a hook sees. Whatever the routing, the graph is the same on every rank, and so is the order of what
backward delivers; an expert without a token has no rows there.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeGuard

import torch
from torch import Tensor, nn

# Of one parameter: (number of rows of each expert, inputs (rows, in), outputs (rows, out)) -> outputs
ExpertHook = Callable[[Sequence[int], Tensor, Tensor], Tensor]

_DESCRIPTION = ("num_experts", "has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_apply_gate")


class FusedExperts(Protocol):
    """What transformers' modules of fused experts say about themselves."""

    num_experts: int
    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    is_transposed: bool
    _apply_gate: Callable[[Tensor], Tensor]
    act_fn: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]


def has_fused_experts(module: object) -> TypeGuard[FusedExperts]:
    """Say whether a module holds experts as slices of its parameters."""
    return all(hasattr(module, name) for name in _DESCRIPTION)


@dataclass(frozen=True)
class ExpertMatrix:
    """The matrix of one expert in a fused parameter, a target like a linear."""

    experts: nn.Module
    attribute: str
    index: int

    @property
    def parameter(self) -> nn.Parameter:
        """The fused parameter, which may be partitioned."""
        return self.experts.get_parameter(self.attribute)

    @property
    def weight(self) -> Tensor:
        """This expert's slice; needs a parameter that is whole."""
        return self.parameter[self.index]

    @property
    def transposed(self) -> bool:
        return bool(self.experts.is_transposed)


def fused_parameters(module: nn.Module) -> list[str]:
    """Return the attributes of a module that hold experts as slices, in the order it registered them; often none."""
    names = [name for name, _ in module.named_parameters(recurse=False)]
    if not has_fused_experts(module):
        return []
    wanted = (_first_projection(module), "down_proj")
    return [name for name in names if name in wanted]


def expert_matrices(module: nn.Module) -> dict[str, ExpertMatrix]:
    """Return every expert matrix of one module as ``<attribute>.<index>``; none of a module of another kind."""
    attributes = fused_parameters(module)
    return {
        f"{attribute}.{index}": ExpertMatrix(module, attribute, index)
        for attribute in attributes
        for index in range(_num_experts(module))
    }


def get_expert_matrix(model: nn.Module, name: str) -> ExpertMatrix | None:
    """Return the expert matrix called ``<module>.<attribute>.<index>``; None when the name is that of a module."""
    path, _, index = name.rpartition(".")
    owner, _, attribute = path.rpartition(".")
    if not index.isdigit() or not attribute:
        return None
    module = model.get_submodule(owner)
    return ExpertMatrix(module, attribute, int(index)) if attribute in fused_parameters(module) else None


def fused_sizes(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """Return the number of experts of every fused parameter that holds one of the named matrices, by parameter name."""
    found = {name.rpartition(".")[0]: get_expert_matrix(model, name) for name in names}
    return {name: _num_experts(matrix.experts) for name, matrix in found.items() if matrix is not None}


def _num_experts(module: nn.Module) -> int:
    assert has_fused_experts(module)
    return module.num_experts


class HookedExperts:
    """One module of fused experts whose parameters, by attribute, have hooks until ``remove``."""

    def __init__(self, experts: nn.Module, hooks: Mapping[str, ExpertHook]) -> None:
        assert "forward" not in vars(experts), "hooked already"
        self._own_attributes = vars(experts)
        assert has_fused_experts(experts)
        self._own_attributes["forward"] = partial(_forward, experts, hooks)

    def remove(self) -> None:
        del self._own_attributes["forward"]


def hook_experts(
    matrices: Mapping[str, ExpertMatrix], make_hook: Callable[[dict[int, str]], ExpertHook]
) -> list[HookedExperts]:
    """Hook the modules that hold some named matrices.

    Args:
        make_hook: gets the names of one parameter's matrices by expert, and returns its hook.
    """
    modules: dict[nn.Module, dict[str, dict[int, str]]] = {}
    for name, matrix in matrices.items():
        modules.setdefault(matrix.experts, {}).setdefault(matrix.attribute, {})[matrix.index] = name
    return [
        HookedExperts(module, {attribute: make_hook(names) for attribute, names in parameters.items()})
        for module, parameters in modules.items()
    ]


def _first_projection(experts: FusedExperts) -> str:
    return "gate_up_proj" if experts.has_gate else "up_proj"


def _forward(
    experts: FusedExperts, hooks: Mapping[str, ExpertHook], hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Return what ``experts.forward`` does; ``hidden (tokens, h)``, the others ``(tokens, experts per token)``."""
    chosen = top_k_index.flatten()
    order = chosen.argsort(stable=True)
    counts = chosen.bincount(minlength=experts.num_experts).tolist()

    def apply(attribute: str, inputs: Tensor) -> Tensor:
        weight = getattr(experts, attribute)
        output = _SortedLinear.apply(inputs.to(weight.dtype), weight, counts, experts.is_transposed)
        if experts.has_bias:
            output = output + getattr(experts, f"{attribute}_bias")[chosen[order]]
        return hooks[attribute](counts, inputs, output) if attribute in hooks else output

    rows = apply(_first_projection(experts), hidden[order // top_k_index.shape[-1]])
    rows = apply("down_proj", experts._apply_gate(rows) if experts.has_gate else experts.act_fn(rows))
    if experts.has_post_expert_norm:
        rows = experts.post_expert_norm(rows)
    rows = rows * top_k_weights.flatten()[order, None]
    return rows[order.argsort()].view(*top_k_index.shape, -1).sum(1).to(hidden.dtype)


class _SortedContext(Protocol):
    """What ``_SortedLinear`` keeps for its backward."""

    needs_input_grad: tuple[bool, ...]
    weight: Tensor
    counts: Sequence[int]
    transposed: bool


class _SortedLinear(torch.autograd.Function):
    """``y = x W_eᵀ`` (``x W_e`` where transposed) for rows sorted by expert; only ``x`` gets a gradient.

    Backward reads the parameter itself, which ZeRO-3 has gathered again by then; slices kept from the forward would
    hold on to what was gathered there.
    """

    @staticmethod
    def forward(ctx: _SortedContext, inputs: Tensor, weight: Tensor, counts: Sequence[int], transposed: bool) -> Tensor:
        assert not ctx.needs_input_grad[1], "its gradient would be lost"
        ctx.weight, ctx.counts, ctx.transposed = weight, counts, transposed
        return _multiply(inputs, weight if transposed else weight.mT, counts)

    @staticmethod
    def backward(ctx: _SortedContext, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        matrices = ctx.weight.mT if ctx.transposed else ctx.weight
        return _multiply(grad_output, matrices, ctx.counts), None, None, None


def _multiply(rows: Tensor, matrices: Tensor, counts: Sequence[int]) -> Tensor:
    """Return each expert's rows times its matrix ``(E, n, m)``, ``(rows, m)``."""
    result = rows.new_empty(len(rows), matrices.shape[2])
    for part, matrix, into in zip(rows.split(counts), matrices, result.split(counts), strict=True):
        if len(part):
            torch.mm(part, matrix, out=into)
    return result
