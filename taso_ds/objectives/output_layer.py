"""A language model's output layer, and what the model does to its result before calling it logits.

The loss in chunks applies the output layer itself. It may do so if the logits depend on nothing but that layer's
result, in a way that is known here. A forward with a made-up result shows whether that is so, for any model.
"""

from collections.abc import Collection
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@runtime_checkable
class _Configured(Protocol):
    """A model of transformers."""

    config: "PretrainedConfig"


def output_layer(model: nn.Module) -> nn.Module | None:
    """Return the module from hidden states to the vocabulary, or None where the model names none."""
    find = getattr(model, "get_output_embeddings", None)
    layer: nn.Module | None = find() if find is not None else None
    return layer


def finish_logits(raw: Tensor, config: object) -> Tensor:
    """Return the logits made of the output layer's result: scaled (Cohere), divided (Granite), soft-capped (Gemma)."""
    scale, divisor, cap = (
        _number(config, name) for name in ("logit_scale", "logits_scaling", "final_logit_softcapping")
    )
    if scale is not None:
        raw = raw * scale
    if divisor is not None:
        raw = raw / divisor
    if cap is not None:
        raw = (raw / cap).tanh() * cap
    return raw


def text_config(model: nn.Module) -> object:
    """Return the configuration of the model's text decoder."""
    assert isinstance(model, _Configured)
    return model.config.get_text_config()


def _number(config: object, name: str) -> float | None:
    value = getattr(config, name, None)
    return value if isinstance(value, (int, float)) else None


def why_not_in_chunks(model: nn.Module, adapted: Collection[str], *, device: torch.device) -> str | None:
    """Return why the loss cannot apply the output layer to chunks of positions, or None if it can.

    It runs a forward, so at ZeRO-3 it is a collective. The answer depends on no data and is the same on every rank.

    Args:
        model: the model itself, with ZeRO's hooks where it is partitioned.
        adapted: names of the matrices that hooks compute or observe.
    """
    layer = output_layer(model)
    if not isinstance(layer, nn.Linear):
        return f"{type(model).__name__} names no linear output layer"
    if any(parameter.requires_grad for parameter in layer.parameters()):
        return "the output layer is trained"
    if any(module is layer for name, module in model.named_modules() if name in adapted):
        return "the output layer is a target"
    if not _logits_follow(model, layer, device):
        return f"{type(model).__name__} does more to its logits than scale or cap them"
    return None


@torch.no_grad()
def _logits_follow(model: nn.Module, layer: nn.Linear, device: torch.device) -> bool:
    """Say whether the model turns a made-up result of its output layer into the logits expected of it."""
    tokens = torch.zeros(1, 2, dtype=torch.long, device=device)
    results: list[Tensor] = []

    def replace(_layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        one_state_per_token = len(args) == 1 and args[0].shape[:-1] == tokens.shape
        if one_state_per_token:
            # wide enough for every cap in use (30 to 50) to show
            results.append(torch.linspace(-100.0, 100.0, layer.out_features).to(output).expand(*tokens.shape, -1))
            return results[-1]
        return output

    handle = layer.register_forward_hook(replace)
    try:
        logits = model(input_ids=tokens, use_cache=False).logits
    finally:
        handle.remove()
    if len(results) != 1:
        return False
    expected = finish_logits(results[0], text_config(model))
    rounding = 4 * torch.finfo(expected.dtype).eps
    return logits.shape == expected.shape and torch.allclose(logits.float(), expected.float(), rtol=rounding, atol=0.0)
