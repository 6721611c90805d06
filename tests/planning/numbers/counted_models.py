"""Models of the planning tests, counted on the meta device."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from taso_ds.adapters.targets import MatrixShape, find_targets
from taso_ds.planning.numbers.model_shape import ModelShape, read_model_shape

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def shapes_of(model: nn.Module) -> dict[str, MatrixShape]:
    return find_targets(model).shapes


def counted(config: "PretrainedConfig", *, trainable: int = 1000) -> ModelShape:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = shapes_of(model)
    return read_model_shape(model, config, shapes, trainable=trainable, adapter_dense=0, quantized=list(shapes))


def llama(*, layers: int = 2, kv_heads: int = 4, tied: bool = False) -> "PretrainedConfig":
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=160, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=kv_heads, tie_word_embeddings=tied,
    )  # fmt: skip


def llama_7b() -> ModelShape:
    from transformers import LlamaConfig

    return counted(LlamaConfig(tie_word_embeddings=False), trainable=2_748_000)
