"""What a plan has to know about a model: parameter counts by role and the widths that decide activations.

Counts come from a model on the meta device, so every architecture transformers can build is counted, not guessed; the
widths come from its configuration under the names transformers gives all of them. Where layers differ (Gemma 3n and 4),
they are those of an average one: what all blocks hold together is the same.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from taso_ds.adapters.experts import find_experts
from taso_ds.adapters.targets import MatrixShape, matrix_shape

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class ModelShape:
    """A model in numbers. All counts are elements; a tensor used twice (tied) counts once in ``parameters``.

    Attributes:
        parameters: ``P``, the whole base.
        blocks: parameters of each transformer block, in order.
        quantized: parameters that are quantized if the base is, ``largest_quantized`` of them, and their rows.
        double_quantized: whether the scales of NF4 are quantized too; a checkpoint's may not be.
        embedding: ``E``, the input embedding.
        output: ``O``, the output layer's matrix, also when it is the embedding; 0 for a classification head.
        experts: parameters of mixture-of-experts experts.
        expert_share: share of the experts that one token passes.
        largest_tensor: the largest parameter.
        largest_block: the largest mixture of experts, which ZeRO-3 gathers as a whole; 0 without experts.
        targets: parameters of the matrices that are scored and adapted, and ``largest_target`` of them.
        trainable: ``t``, what is trained.
        adapter_dense: entries of the adapter once expanded; 0 where nothing is expanded.
        hidden: ``h``; this and what follows per layer, on average. attention: ``a`` = heads × head width. key_value:
            ``v`` = key/value heads × head width.
        feed_forward: ``f`` that one token passes, and ``gated`` when there are two such projections.
        upcasts_norms: whether norms keep an fp32 copy of their input (RMSNorm).
        vocabulary: ``V``.
        stored_dtype: what the checkpoint holds according to its config (``float32``); empty where it does not say.
        reads_whole: whether transformers has to load it, not every rank its own part.
        merged: parameters that it merges or splits on the way, and ``largest_merged`` of them.
        trains_base: whether the base itself is trained (``--method full``): nothing is frozen then.
    """

    parameters: int
    blocks: tuple[int, ...]
    quantized: int
    largest_quantized: int
    quantized_rows: int
    embedding: int
    output: int
    experts: int
    expert_share: float
    largest_tensor: int
    largest_block: int
    targets: int
    largest_target: int
    num_targets: int
    trainable: int
    adapter_dense: int
    hidden: int
    attention: int
    key_value: int
    num_heads: int
    feed_forward: int
    gated: bool
    upcasts_norms: bool
    vocabulary: int
    stored_dtype: str
    double_quantized: bool = True
    reads_whole: bool = False
    merged: int = 0
    largest_merged: int = 0
    trains_base: bool = False

    @property
    def frozen(self) -> int:
        """Parameters that are not trained; a task head, which trains too, is counted with them."""
        return 0 if self.trains_base else self.parameters

    @property
    def is_tied(self) -> bool:
        """Whether the output layer is the input embedding."""
        return self.output > 0 and self.parameters < sum(self.blocks) + self.embedding + self.output

    @property
    def stored_bytes(self) -> int:
        """Return the size of the checkpoint: 2 bytes per parameter, unless its config says fp32."""
        return self.parameters * (4 if self.stored_dtype == "float32" else 2)

    def is_stored_in(self, element: int) -> bool:
        """Say whether the checkpoint says it holds what a run of so many bytes per parameter computes with."""
        return self.stored_dtype == {2: "bfloat16", 4: "float32"}[element]

    @property
    def active(self) -> int:
        """Parameters one token is multiplied with: blocks without the experts it does not visit. No output layer."""
        return sum(self.blocks) - round(self.experts * (1.0 - self.expert_share))


def read_model_shape(
    model: "PreTrainedModel",
    config: "PretrainedConfig",
    targets: Mapping[str, MatrixShape],
    *,
    trainable: int,
    adapter_dense: int,
    quantized: Collection[str] = (),
    merged: Collection[str] = (),
) -> ModelShape:
    """Count a model on the meta device.

    Args:
        config: its transformers configuration.
        targets: shape of every matrix to adapt.
        trainable: parameters the method trains.
        adapter_dense: entries of the expanded adapter.
        quantized: names of the linears that are quantized if the base is.
        merged: names of the parameters that transformers merges or splits as it loads them.
    """
    text = config.get_text_config()
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and _has_linear(module)]
    outer = [one for one in lists if not any(one is not other and one in set(other.modules()) for other in lists)]
    blocks = tuple(_numel(block) for one in outer for block in one)
    linears = [shape for name in quantized if (shape := matrix_shape(model.get_submodule(name))) is not None]
    converted = [model.get_parameter(name).numel() for name in merged]
    output = model.get_output_embeddings()
    layers = _layers(text)
    experts, share = _experts(model, layers)
    norms = {type(module).__name__ for one in outer for module in one.modules() if "Norm" in type(module).__name__}
    return ModelShape(
        parameters=_numel(model),
        blocks=blocks,
        quantized=sum(shape.numel for shape in linears),
        largest_quantized=max((shape.numel for shape in linears), default=0),
        quantized_rows=sum(shape.out_features for shape in linears),
        embedding=model.get_input_embeddings().get_parameter("weight").numel(),
        output=0 if output is None else output.weight.numel(),
        experts=experts,
        expert_share=share,
        largest_tensor=max(parameter.numel() for parameter in model.parameters()),
        largest_block=max((_numel(model.get_submodule(name)) for name in find_experts(model).blocks), default=0),
        targets=sum(shape.numel for shape in targets.values()),
        largest_target=max((shape.numel for shape in targets.values()), default=0),
        num_targets=len(targets),
        trainable=trainable,
        adapter_dense=adapter_dense,
        hidden=text.hidden_size,
        attention=_average(layers, lambda layer: _heads(layer) * _head_width(layer)),
        key_value=_average(
            layers, lambda layer: (_number(layer, "num_key_value_heads") or _heads(layer)) * _head_width(layer)
        ),
        num_heads=_average(layers, _heads),
        feed_forward=_average(layers, _feed_forward),
        gated=_is_gated(outer, layers[0]),
        upcasts_norms=any("RMS" in name for name in norms),
        vocabulary=text.vocab_size,
        stored_dtype=str(getattr(config, "dtype", None) or "").removeprefix("torch."),
        reads_whole=bool(merged),
        merged=sum(converted),
        largest_merged=max(converted, default=0),
    )


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _has_linear(module: nn.Module) -> bool:
    return any(matrix_shape(inner) is not None for inner in module.modules())


def _layers(text: "PretrainedConfig") -> Sequence["PretrainedConfig"]:
    """Return the configuration of every layer where they differ, or the one they all have."""
    return list(text.per_layer_config) if getattr(text, "is_heterogeneous", False) else [text]


def _average(layers: Sequence["PretrainedConfig"], measure: Callable[["PretrainedConfig"], int]) -> int:
    return round(sum(measure(layer) for layer in layers) / len(layers))


def _number(config: object, *names: str) -> int | None:
    """Return the first of these numbers that is given; of a list, one number per layer, the average."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)) and value:
            return round(sum(value) / len(value))
        if value:
            return int(value)
    return None


def _heads(layer: "PretrainedConfig") -> int:
    return _number(layer, "num_attention_heads") or 1  # a block without attention mixes one state


def _head_width(layer: "PretrainedConfig") -> int:
    return _number(layer, "head_dim") or layer.hidden_size // _heads(layer)


def _num_experts(layer: "PretrainedConfig") -> int | None:
    return _number(layer, "num_local_experts", "num_experts")


def _experts(model: nn.Module, layers: Sequence["PretrainedConfig"]) -> tuple[int, float]:
    """Return the parameters of all experts, and the share of them a token visits."""
    shares = [
        chosen / number
        for layer in layers
        if (number := _num_experts(layer)) and (chosen := _number(layer, "num_experts_per_tok"))
    ]
    found = sum(value.numel() for name, value in model.named_parameters() if ".experts." in name)
    return (found, sum(shares) / len(shares)) if shares and found else (0, 1.0)


def _dense_width(layer: "PretrainedConfig") -> int:
    return _number(layer, "intermediate_size", "n_inner") or 4 * int(layer.hidden_size)


def _feed_forward(layer: "PretrainedConfig") -> int:
    """Return the feed-forward width a token passes in a layer."""
    chosen = _number(layer, "num_experts_per_tok")
    if chosen and _num_experts(layer):
        return (_number(layer, "moe_intermediate_size") or _dense_width(layer)) * chosen
    return _dense_width(layer)


def _is_gated(blocks: Sequence[nn.ModuleList], layer: "PretrainedConfig") -> bool:
    """Say whether a gate doubles the first projection of the first block, whose configuration is ``layer``."""
    if _num_experts(layer) and _number(layer, "num_experts_per_tok"):
        return True
    width = _dense_width(layer)
    first = blocks[0][0] if blocks else nn.Identity()
    outputs = [shape.out_features for module in first.modules() if (shape := matrix_shape(module)) is not None]
    return outputs.count(width) >= 2 or 2 * width in outputs
