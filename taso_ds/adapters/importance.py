"""Importance of pretrained weights, ``I = |W ⊙ ∂L/∂W|`` (method section 1), and how the gradient is obtained.

``W`` is ``(out_features, in_features)``. The gradient of one weight matrix is ``gᵀx`` over all tokens, ``x`` the
input ``(tokens, in_features)`` and ``g`` the gradient of the output ``(tokens, out_features)``. Taking it from these
two instead of from ``weight.grad`` leaves the base frozen: it serves partitioned and quantized weights alike, and each
gradient can be consumed before the next one exists.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from taso_ds.adapters.fused_experts import ExpertHook, ExpertMatrix, HookedExperts, hook_experts

Deliver = Callable[[Tensor, Tensor], None]


class _TapContext(Protocol):
    """What ``_OutputTap`` keeps for its backward."""

    deliver: Deliver
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _OutputTap(torch.autograd.Function):
    """Identity on a linear's output that hands ``(input, output gradient)`` to a callback in backward.

    The input is kept through ``save_for_backward``, so that activation checkpointing drops and recomputes it like any
    other saved tensor.
    """

    @staticmethod
    def forward(ctx: _TapContext, output: Tensor, inputs: Tensor, deliver: Deliver) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.deliver = deliver
        # Not a view, which autograd would let nobody change in place: Falcon adds to the results of its linears.
        return output.detach()

    @staticmethod
    def backward(ctx: _TapContext, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (inputs,) = ctx.saved_tensors
        ctx.deliver(inputs.flatten(0, -2), grad_output.flatten(0, -2))
        return grad_output, None, None


def tap_gradient(linear: nn.Module, deliver: Deliver) -> RemovableHandle:
    """Call ``deliver(x (tokens, in), g (tokens, out))`` each time backward passes the output of ``linear``.

    Where no weight wants a gradient, the graph begins at the first tapped output: backward goes no deeper than needed.
    """

    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return _tapped(output, args[0], deliver)

    return linear.register_forward_hook(hook)


def tap_expert_gradients(
    matrices: Mapping[str, ExpertMatrix], deliver: Callable[[str, Tensor, Tensor], None]
) -> list[HookedExperts]:
    """Do the same for experts: ``deliver(name, x, g)``, in one order whatever the routing.

    An expert without a token is delivered with no rows.
    """

    def make_hook(names: dict[int, str]) -> ExpertHook:
        def hook(counts: Sequence[int], inputs: Tensor, output: Tensor) -> Tensor:
            def deliver_each(x: Tensor, g: Tensor) -> None:
                parts = list(zip(x.split(counts), g.split(counts), strict=True))
                for index, name in names.items():
                    deliver(name, *parts[index])

            return _tapped(output, inputs, deliver_each)

        return hook

    return hook_experts(matrices, make_hook)


def _tapped(output: Tensor, inputs: Tensor, deliver: Deliver) -> Tensor:
    if not output.requires_grad and torch.is_grad_enabled():
        output.requires_grad_(True)
    return _OutputTap.apply(output, inputs.detach(), deliver)


def weight_gradient(inputs: Tensor, grad_output: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return ``∂L/∂W``, ``(out_features, in_features)``, in the dtype of the output gradient.

    Args:
        inputs: of the linear, ``(tokens, in_features)``.
        grad_output: gradient of its output, ``(tokens, out_features)``.
        out: memory for the result.
    """
    return torch.mm(grad_output.t(), inputs.to(grad_output.dtype), out=out)


def importance(weight: Tensor, grad: Tensor) -> Tensor:
    """Return ``|W ⊙ ∂L/∂W|`` in fp32, same shape as ``weight`` (method section 1)."""
    return (weight.float() * grad.float()).abs_()


def needs_gradient(score: str) -> bool:
    """Say whether a score is made from gradients at all (``magnitude`` and ``random`` are not)."""
    return score in ("importance", "gradient")


def needs_weight(score: str) -> bool:
    """Say whether a score looks at the weights (``gradient`` and ``random`` do not)."""
    return score in ("importance", "magnitude")


def score_matrix(
    score: str, *, weight: Tensor | None, grad: Tensor | None, shape: tuple[int, int], seed: int
) -> Tensor:
    """Return the non-negative fp32 score of every element, ``(out_features, in_features)``.

    ``magnitude``, ``gradient`` and ``random`` are ablations of the paper's ``importance``.

    Args:
        weight: where the score looks at the weight (``needs_weight``).
        grad: fp32, where the score is made from it (``needs_gradient``). It is overwritten, because it is the
            accumulator of one matrix and the largest tensor around.
        seed: of ``random``.
    """
    if score == "random":
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    if score == "magnitude":
        assert weight is not None
        return weight.float().abs()
    assert grad is not None
    if score == "gradient":
        return grad.abs_()
    assert weight is not None
    return grad.mul_(weight).abs_()
