"""A model on the meta device in numbers: what a run would freeze, train and quantize, and how it would be loaded."""

import dataclasses
from pathlib import Path

from taso_ds.adapters.targets import Targets
from taso_ds.config import RunConfig
from taso_ds.errors import UserError
from taso_ds.models.load_sharded import why_not_sharded
from taso_ds.models.quantization import Quantization
from taso_ds.models.spec import BaseSpec
from taso_ds.models.stored_names import merged_names
from taso_ds.planning.numbers.model_shape import ModelShape, read_model_shape


class NotCountedError(UserError):
    """A model that cannot be counted: it can be trained all the same."""


def count_model(config: RunConfig, base: BaseSpec, targets: Targets) -> ModelShape:
    """Count a base without its weights: frozen and trainable parameters as a run would have them.

    Raises:
        NotCountedError: its configuration does not say what a plan needs, under the usual names.
    """
    try:
        return _count(config, base, targets)
    except UserError:
        raise
    except Exception as error:
        # Configurations come from anywhere, with attributes and errors of their own; --debug shows which it was.
        raise NotCountedError(
            f"model_name_or_path: {type(base.meta).__name__} cannot be planned: {' '.join(str(error).split())[:300]}"
        ) from error


def _count(config: RunConfig, base: BaseSpec, targets: Targets) -> ModelShape:
    method, model = config.method, base.meta
    count = method.count(base, targets)
    found = read_model_shape(
        model,
        base.config,
        targets.shapes,
        trainable=count.trainable,
        adapter_dense=count.dense,
        quantized=_quantized_names(base),
        merged=merged_names(model, Path(base.source)),
    )
    stored = None if base.quantization is None else base.quantization.stored
    return dataclasses.replace(
        found,
        trains_base=method.trains_base,
        reads_whole=_is_read_whole(base),
        double_quantized=stored is None or stored.double_quantized,
    )


def can_quantize(config: RunConfig, base: BaseSpec) -> bool:
    """Say whether a base that is not quantized may be, as this run uses it."""
    if config.method.trains_base or config.adapter.adapt_experts:
        return False
    return bool(_quantized_names(base))


def _quantized_names(base: BaseSpec) -> list[str]:
    """Return the linears that are quantized, or would be in 4 bits; none where one of them cannot be."""
    if base.quantization is not None:
        return base.quantization.names(base.meta)
    try:
        return Quantization(4, base.dtype).names(base.meta)
    except UserError:
        return []


def _is_read_whole(base: BaseSpec) -> bool:
    """Say whether the checkpoint must be loaded by transformers at stage 3 too."""
    folder = Path(base.source)
    if _holds_weights(folder):
        return why_not_sharded(base.source, base.meta) is not None
    return bool(merged_names(base.meta, folder, experts=False))


def _holds_weights(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin"))
