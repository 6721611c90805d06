"""A base before its weights are loaded: what its folder says about it, and its model without weights.

A run asks here for everything that it decides or refuses before it loads, so each answer is worked out once.
"""

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from taso_ds.adapters.adapter import ADAPTER_MODULE
from taso_ds.adapters.targets import Targets, find_targets
from taso_ds.errors import UserError
from taso_ds.files.json_text import parse_json
from taso_ds.files.safetensors_ranges import has_checkpoint, weight_files
from taso_ds.models.arguments import ModelArguments
from taso_ds.models.model_class import choice_in_words, model_class, wants_head
from taso_ds.models.quantization import Quantization, quantization_of
from taso_ds.models.source import check_no_gguf, loading
from taso_ds.models.stored_names import open_for, stored_keys

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# What encoders put between their body and a classification head, and some checkpoints lack.
_POOLER = "pooler"


@dataclass(frozen=True, eq=False)
class BaseSpec:
    """A base before its weights are loaded.

    Attributes:
        arguments: the flags that name it.
        source: the folder it is loaded from, as ``model_source`` returned it, or the name of a model that is not here.
        config: its transformers configuration. It knows the number of labels.
        head: whether the model ends in a classification head, which trains in full.
    """

    arguments: ModelArguments
    source: str
    config: "PretrainedConfig"
    head: bool

    @property
    def name(self) -> str:
        """The name that the user gave."""
        return str(self.arguments.model_name_or_path)

    @property
    def dtype(self) -> torch.dtype:
        """The engine's."""
        return torch.bfloat16 if self.arguments.bf16 else torch.float32

    @property
    def num_positions(self) -> int | None:
        """How many positions the base has; None where it names no number."""
        limit = getattr(self.config, "max_position_embeddings", None) or getattr(self.config, "n_positions", None)
        return limit if limit is not None and limit > 0 else None  # XLNet says -1: any length

    @cached_property
    def quantization(self) -> Quantization | None:
        """How the base will be quantized; None when it will not.

        Raises:
            UserError: a flag for a checkpoint that is quantized already, or one that is quantized by other means.
        """
        return quantization_of(self.arguments, self.config)

    @cached_property
    def tokenizer(self) -> Any:  # its special tokens are attributes that no type of transformers names
        """The tokenizer: the base's own unless another is named."""
        from transformers import AutoTokenizer

        name = self.arguments.tokenizer_name or self.source
        return loading(
            f"a tokenizer from {name}",
            lambda: AutoTokenizer.from_pretrained(
                name, revision=self.arguments.model_revision, trust_remote_code=self.arguments.trust_remote_code
            ),
            flag="tokenizer_name",
        )

    @cached_property
    def meta(self) -> "PreTrainedModel":
        """The model without weights, for counting.

        Raises:
            UserError: when it cannot be built, or its classification head cannot be told from its body.
        """

        def build() -> "PreTrainedModel":
            with torch.device("meta"):
                model: PreTrainedModel = model_class(head=self.head).from_config(
                    copy.deepcopy(self.config), trust_remote_code=self.arguments.trust_remote_code
                )
            return model

        model = loading(self.name, build)
        if self.head and not outside_body(model):
            raise UserError(f"model_name_or_path: {self.name}: {type(model).__name__} has no head of its own to train")
        return model

    @property
    def can_recompute(self) -> bool:
        """Whether the model has blocks that can be recomputed in backward."""
        supports = getattr(self.meta, "supports_gradient_checkpointing", False)
        return supports and any(hasattr(module, "gradient_checkpointing") for module in self.meta.modules())

    @property
    def head_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of ``meta`` that belong to the classification head; empty without one.

        Where safetensors files are here, a pooler that they lack is among them.
        """
        if not self.head:
            return {}
        if not has_checkpoint(Path(self.source)):
            return outside_body(self.meta)
        with open_for(self.meta, self.source) as checkpoint:
            stored = stored_keys(self.meta, checkpoint)
        lacking = (name for name, _ in self.meta.named_parameters() if name not in stored)
        return outside_body(self.meta, new_pooler=frozenset(filter(in_pooler, lacking)))

    @property
    def head_in_words(self) -> str | None:
        """One line on how the kind of head was chosen; None where the flag or ``config.json`` says it."""
        return choice_in_words(self.arguments, self.config)

    def targets(self, target_modules: Sequence[str] | None, *, experts: bool) -> Targets:
        """Return the matrices of ``meta`` to adapt.

        Args:
            target_modules: names or patterns as ``find_targets`` takes them; None for all linears of the blocks.
            experts: take in the experts of fused parameters.

        Raises:
            UserError: when a name matches nothing.
        """
        return find_targets(self.meta, target_modules, experts=experts)

    def pad_with(self, token_id: int) -> None:
        """Tell the model which token pads, before anything is built from the configuration."""
        assert "meta" not in vars(self), "the model without weights does not know the padding"
        self.config.pad_token_id = token_id


def read_spec(arguments: ModelArguments, source: str | None = None, *, num_labels: int | None = None) -> BaseSpec:
    """Read what the base is, without its weights.

    Args:
        arguments: the flags that name it.
        source: the folder that ``model_source`` returned. None when it has not been called: the checkpoint is then
            read as it is, a GGUF file by its header only.
        num_labels: outputs of a classification head, if the base gets one. None leaves the number to ``config.json``.

    Raises:
        UserError: when the configuration cannot be read, or transformers has no such model.
    """
    config = _read_config(arguments) if source is None else load_config(arguments, source)
    head = wants_head(arguments, config)
    if head and num_labels:
        config.num_labels = num_labels
    return BaseSpec(arguments, source or str(arguments.model_name_or_path), config, head)


def load_config(arguments: ModelArguments, source: str) -> "PretrainedConfig":
    """Return the transformers configuration of the base.

    Raises:
        UserError: when it cannot be read, or ``config.json`` gives a key twice: transformers would keep the last.
    """
    from transformers import AutoConfig

    file = Path(source) / "config.json"
    if file.is_file() or file.is_symlink():
        text = loading(str(file), partial(file.read_text, encoding="utf-8"))
        parse_json(text, f"model_name_or_path: {file}", constants=True)
    return loading(
        source,
        lambda: AutoConfig.from_pretrained(
            source, revision=arguments.model_revision, trust_remote_code=arguments.trust_remote_code
        ),
    )


def _read_config(arguments: ModelArguments) -> "PretrainedConfig":
    """Return the configuration from the checkpoint as it is. Only the header of a GGUF file is read."""
    name, file = str(arguments.model_name_or_path), arguments.gguf_file
    if file is None:
        check_no_gguf(name)
        return load_config(arguments, name)
    from transformers import AutoConfig

    return loading(f"{name}/{file}", lambda: AutoConfig.from_pretrained(name, gguf_file=file))


def check_weight_files(source: str) -> None:
    """Refuse a folder with a damaged safetensors file, on every rank, before partitioned loading could hang on it."""
    for path in weight_files(Path(source)):
        try:
            with safe_open(path, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"model_name_or_path: {path} is damaged, copy it again ({error})") from error


def outside_body(model: "PreTrainedModel", *, new_pooler: Collection[str] = ()) -> dict[str, nn.Parameter]:
    """Return the parameters of a classification head: all outside the pretrained body and an attached adapter.

    Args:
        model: a model with such a head, on the meta device too.
        new_pooler: parameters of the body's pooler that the checkpoint lacks: they belong to the head.
    """
    others = (f"{model.base_model_prefix}.", f"{ADAPTER_MODULE}.")
    return {
        name: value for name, value in model.named_parameters() if name in new_pooler or not name.startswith(others)
    }


def in_pooler(name: str) -> bool:
    """Say whether a parameter belongs to what encoders put between their body and a head."""
    return _POOLER in name.split(".")
