"""A model on the meta device in numbers: what a run would freeze, train and quantize, and how it would be loaded."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from taso_ds.adapters.structure import count_dense
from taso_ds.adapters.targets import MatrixShape
from taso_ds.config import RunConfig
from taso_ds.errors import UserError
from taso_ds.models.load import without_weights
from taso_ds.models.load_sharded import why_not_sharded
from taso_ds.models.model_class import wants_head
from taso_ds.models.quantization import Quantization, quantization_of
from taso_ds.models.stored_names import merged_names
from taso_ds.planning.numbers.model_shape import ModelShape, read_model_shape
from taso_ds.runs import prepare


class NotCountedError(UserError):
    """A model that cannot be counted: it can be trained all the same."""


def count_model(
    config: RunConfig,
    model: nn.Module,
    base_config: Any,
    shapes: Mapping[str, MatrixShape],
    *,
    source: str | None = None,
) -> ModelShape:
    """Count a meta model: frozen and trainable parameters as a run would have them.

    Args:
        source: the folder it will be loaded from; default: the model's name, which may be one.

    Raises:
        NotCountedError: its configuration does not say what a plan needs, under the usual names.
    """
    try:
        return _count(config, model, base_config, shapes, source=source)
    except UserError:
        raise
    except Exception as error:
        # Configurations come from anywhere, with attributes and errors of their own; --debug shows which it was.
        raise NotCountedError(
            f"model_name_or_path: {type(model).__name__} cannot be planned: {' '.join(str(error).split())[:300]}"
        ) from error


def _count(
    config: RunConfig, model: nn.Module, base_config: Any, shapes: Mapping[str, MatrixShape], *, source: str | None
) -> ModelShape:
    adapter = config.adapter
    folder = Path(source or str(config.model.model_name_or_path))
    base = without_weights(model, base_config, str(folder), head=wants_head(config.model, base_config))
    heads = sum(value.numel() for value in base.head_parameters.values())
    trains_base = adapter.method == "full"
    if trains_base:
        trainable = sum(value.numel() for value in model.parameters())
    else:
        trainable = prepare.count_adapter(config, dict(shapes)).trainable + heads
    dense = 0
    if adapter.method == "taso":
        dense = sum(
            count_dense(
                adapter.structure, out_features=shape.out_features, in_features=shape.in_features, rank=adapter.rank
            )
            for shape in shapes.values()
        )
    quantization = quantization_of(config.model, base_config)
    found = read_model_shape(
        model,
        base_config,
        shapes,
        trainable=trainable,
        adapter_dense=dense,
        quantized=_quantized_names(config, model, quantization),
        merged=merged_names(model, folder),
    )
    stored = None if quantization is None else quantization.stored
    return dataclasses.replace(
        found,
        trains_base=trains_base,
        reads_whole=_is_read_whole(model, folder),
        double_quantized=stored is None or bool(stored.get("bnb_4bit_use_double_quant")),
    )


def can_quantize(config: RunConfig, model: nn.Module) -> bool:
    """Say whether a base that is not quantized may be, as this run uses it."""
    if config.adapter.method == "full" or config.adapter.adapt_experts:
        return False
    return bool(_quantized_names(config, model, None))


def _quantized_names(config: RunConfig, model: nn.Module, quantization: Quantization | None) -> list[str]:
    """Return the linears that are quantized, or would be in 4 bits; none where one of them cannot be."""
    if quantization is not None:
        return quantization.names(model)
    try:
        return Quantization(4, torch.bfloat16 if config.model.bf16 else torch.float32).names(model)
    except UserError:
        return []


def _is_read_whole(model: nn.Module, folder: Path) -> bool:
    """Say whether the checkpoint must be loaded by transformers at stage 3 too."""
    if _holds_weights(folder):
        return why_not_sharded(str(folder), model) is not None
    return bool(merged_names(model, folder, experts=False))


def _holds_weights(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin"))
