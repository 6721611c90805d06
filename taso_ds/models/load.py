"""The frozen pretrained model and its tokenizer, from a folder, the Hub or a GGUF file."""

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from taso_ds.adapters.adapter import ADAPTER_MODULE
from taso_ds.distributed import comm, engine
from taso_ds.distributed.zero import assert_partitioned, full_numel
from taso_ds.distributed.zero_config import ZeroConfig
from taso_ds.errors import UserError
from taso_ds.files.json_text import parse_json
from taso_ds.files.safetensors_ranges import has_checkpoint, weight_files
from taso_ds.models.arguments import ModelArguments
from taso_ds.models.load_quantized import QuantizedLoad
from taso_ds.models.load_sharded import (
    LoadReport,
    build_without_memory,
    load_sharded,
    partition_whole,
    some_of,
    tie_weights,
    why_not_sharded,
)
from taso_ds.models.model_class import model_class
from taso_ds.models.quantization import Quantization, adopt_linears, quantization_of
from taso_ds.models.quantized_linear import QuantizedLinear
from taso_ds.models.source import Loaded, check_no_gguf, loading
from taso_ds.models.stored_names import open_for, stored_keys

log = logging.getLogger(__name__)

# What encoders put between their body and a classification head, and some checkpoints lack.
_POOLER = "pooler"


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A loaded base.

    Attributes:
        head: whether it ends in a classification head, which trains in full.
        new_pooler: parameters of the body's pooler that the checkpoint lacks: they belong to the head.
    """

    model: nn.Module
    config: Any
    head: bool
    quantization: Quantization | None = None
    new_pooler: frozenset[str] = frozenset()

    @property
    def head_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of the classification head: everything outside the pretrained body and an attached adapter."""
        if not self.head:
            return {}
        others = (f"{self.model.base_model_prefix}.", f"{ADAPTER_MODULE}.")
        return {
            name: value
            for name, value in self.model.named_parameters()
            if name in self.new_pooler or not name.startswith(others)
        }


def check_weight_files(source: str) -> None:
    """Refuse a folder with a damaged safetensors file, on every rank, before partitioned loading could hang on it."""
    for path in weight_files(Path(source)):
        try:
            with safe_open(path, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"model_name_or_path: {path} is damaged, copy it again ({error})") from error


def load_config(arguments: ModelArguments, source: str) -> Any:
    """Return the transformers configuration of the base."""
    from transformers import AutoConfig

    file = Path(source) / "config.json"
    if file.is_file() or file.is_symlink():  # of a key given twice transformers would keep the last
        text = loading(str(file), partial(file.read_text, encoding="utf-8"))
        parse_json(text, f"model_name_or_path: {file}", constants=True)
    return loading(
        source,
        lambda: AutoConfig.from_pretrained(
            source, revision=arguments.model_revision, trust_remote_code=arguments.trust_remote_code
        ),
    )


def read_config(arguments: ModelArguments) -> Any:
    """Return the configuration from the checkpoint as it is: of a GGUF file only the header is read."""
    name, file = str(arguments.model_name_or_path), arguments.gguf_file
    if file is None:
        check_no_gguf(name)
        return load_config(arguments, name)
    from transformers import AutoConfig

    return loading(f"{name}/{file}", lambda: AutoConfig.from_pretrained(name, gguf_file=file))


def load_tokenizer(arguments: ModelArguments, source: str) -> Any:
    """Return the tokenizer, the base's own unless another is named."""
    from transformers import AutoTokenizer

    name = arguments.tokenizer_name or source
    return loading(
        f"a tokenizer from {name}",
        lambda: AutoTokenizer.from_pretrained(
            name, revision=arguments.model_revision, trust_remote_code=arguments.trust_remote_code
        ),
        flag="tokenizer_name",
    )


def meta_model(arguments: ModelArguments, config: Any, *, head: bool) -> nn.Module:
    """Return the model without weights, for counting.

    Raises:
        UserError: when it cannot be built, or its classification head cannot be told from its body.
    """

    def build() -> nn.Module:
        with torch.device("meta"):
            model: nn.Module = model_class(head=head).from_config(
                copy.deepcopy(config), trust_remote_code=arguments.trust_remote_code
            )
        return model

    name = str(arguments.model_name_or_path)
    model = loading(name, build)
    if head and not BaseModel(model, config, head).head_parameters:
        raise UserError(f"model_name_or_path: {name}: {type(model).__name__} has no head of its own to train")
    return model


def without_weights(model: nn.Module, config: Any, source: str, *, head: bool) -> BaseModel:
    """Return the base of a meta model, for counting.

    Args:
        source: where its checkpoint will be; of safetensors files that are there it is known what they lack.
    """
    if not head or not has_checkpoint(Path(source)):
        return BaseModel(model, config, head)
    with open_for(model, source) as checkpoint:
        stored = stored_keys(model, checkpoint)
    lacking = (name for name, _ in model.named_parameters() if name not in stored)
    return BaseModel(model, config, head, new_pooler=frozenset(filter(_in_pooler, lacking)))


def load_base_model(
    arguments: ModelArguments, source: str, config: Any, *, head: bool, seed: int, zero: ZeroConfig
) -> BaseModel:
    """Load the base in the engine's dtype, frozen but for a classification head; partitioned at once at stage 3.

    Raises:
        UserError: when the checkpoint cannot be read.
    """
    torch.manual_seed(seed)  # a new head starts the same at every world size and stage
    options: dict[str, Any] = {
        "dtype": torch.bfloat16 if arguments.bf16 else torch.float32,
        "trust_remote_code": arguments.trust_remote_code,
    }
    if arguments.attn_implementation is not None:
        options["attn_implementation"] = arguments.attn_implementation
    quantization = quantization_of(arguments, config)
    if zero.stage == 3:
        model, report = _load_partitioned(
            arguments, source, config, options, head=head, zero=zero, quantization=quantization
        )
        assert_partitioned(model)
    else:
        model, report = _load_whole(arguments, source, config, options, head=head, quantization=quantization)
    new_pooler = _check_complete(model, report, source, head=head)
    if quantization is not None:
        _say_what_is_quantized(model, quantization.bits)
    model.config.use_cache = False
    model.requires_grad_(False)
    base = BaseModel(model, config, head, quantization, new_pooler)
    for parameter in base.head_parameters.values():
        parameter.requires_grad_(True)
    return base


def _say_what_is_quantized(model: Any, bits: int) -> None:
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    small, packed = sum(linear.matrix.numel() for linear in linears), {id(linear.weight) for linear in linears}
    large = sum(full_numel(parameter) for parameter in model.parameters() if id(parameter) not in packed)
    log.info("%.0f %% of the weights in %d bits, the others stay as they are", 100 * small / (small + large), bits)


def _load_whole(
    arguments: ModelArguments,
    source: str,
    config: Any,
    options: dict[str, Any],
    *,
    head: bool,
    quantization: Quantization | None,
) -> tuple[Any, LoadReport]:
    """Load through transformers, a whole model on every rank's device."""
    if quantization is not None:
        options = options | quantization.options(meta_model(arguments, config, head=head))
    model, report = comm.together(lambda: _from_pretrained(arguments, source, config, options, head=head, whole=True))
    if quantization is not None:
        adopt_linears(model, quantization)
        _leave_files(model)
    model.to(comm.device())
    return model, report


def _leave_files(model: Any) -> None:
    """Copy parameters that are still pages of the checkpoint: one of them keeps the pages of all in memory.

    After quantization those are mostly the 16-bit weights that nobody needs any more.
    """
    if comm.device().type != "cpu":  # where the parameters are copied anyway
        return
    quantized = {id(module.weight) for module in model.modules() if isinstance(module, QuantizedLinear)}
    for parameter in model.parameters():
        if id(parameter) not in quantized:
            parameter.data = parameter.data.clone()


def _from_pretrained(
    arguments: ModelArguments, source: str, config: Any, options: dict[str, Any], *, head: bool, whole: bool
) -> tuple[Any, LoadReport]:
    def load() -> tuple[Any, Mapping[str, Any]]:
        loaded: tuple[Any, Mapping[str, Any]] = model_class(head=head).from_pretrained(
            source,
            config=config,
            revision=arguments.model_revision,
            output_loading_info=True,
            ignore_mismatched_sizes=whole,  # reported by name afterwards; ZeRO-3 loading cannot
            **options,
        )
        return loaded

    model, found = loading(source, load)
    return model, LoadReport(found["missing_keys"], found["unexpected_keys"], found["mismatched_keys"])


def _load_partitioned(
    arguments: ModelArguments,
    source: str,
    config: Any,
    options: dict[str, Any],
    *,
    head: bool,
    zero: ZeroConfig,
    quantization: Quantization | None,
) -> tuple[Any, LoadReport]:
    """Load into ZeRO-3 partitions: sharded where the checkpoint allows it, through transformers where not."""
    model = loading(source, lambda: build_without_memory(model_class(head=head), copy.deepcopy(config), **options))
    reason = comm.together(lambda: why_not_sharded(source, model))
    if reason is None:
        tie_weights(model, source)
        loads = comm.together(lambda: QuantizedLoad(quantization, model))
        report = comm.together(lambda: load_sharded(model, source, zero, loads))
        loads.finish()
        _read_generation_config(model, source)
        return model, report
    if quantization is not None:
        # transformers quantizes whole matrices, after which nothing is left for ZeRO to partition on the way.
        log.info("loading %s whole on every rank, to partition it then: %s", source, reason)
        model, report = _load_whole(arguments, source, config, options, head=head, quantization=quantization)
        partition_whole(model, zero)
        return model, report
    log.info("loading %s through transformers, rank 0 reads for all: %s", source, reason)
    with engine.zero3_loading(zero):
        return _said_by_each_rank(lambda: _from_pretrained(arguments, source, config, options, head=head, whole=False))


def _read_generation_config(model: Any, source: str) -> None:
    """Let the model generate as its folder says, with all its end tokens, which ``from_pretrained`` sees to itself."""
    from transformers import GenerationConfig

    if not model.can_generate():
        return
    if (Path(source) / "generation_config.json").is_file():
        read = partial(GenerationConfig.from_pretrained, source)
    else:  # an older folder, which says in config.json how to generate
        read = partial(
            GenerationConfig.from_pretrained, source, config_file_name="config.json", _from_model_config=True
        )
    model.generation_config = loading(f"how {source} generates", read)


def _said_by_each_rank(load: Callable[[], Loaded]) -> Loaded:
    """Run ``load``, which is full of collectives: a rank that fails cannot tell the others, so it tells the user."""
    try:
        return load()
    except UserError as error:
        if not comm.is_main():  # whose error is printed anyway
            log.error("rank %d: %s", comm.rank(), error)
        raise


def _check_complete(model: Any, report: LoadReport, source: str, *, head: bool) -> frozenset[str]:
    """Refuse a checkpoint that left weights of the model at random values; only a head may start there.

    Returns:
        The parameters of a pooler that encoders are published without: they begin at random, and train with the head.
    """
    if report.unexpected_keys:
        log.warning("%s holds %s, which the model has no place for", source, some_of(report.unexpected_keys))
    body = f"{model.base_model_prefix}."
    missing = {name for name in report.missing_keys if name.startswith(body) or not head}
    new_pooler = frozenset(filter(_in_pooler, missing)) if head else frozenset()
    faults = []
    if report.mismatched_keys:
        found = (
            f"{name} as {tuple(shape)} instead of {tuple(wanted)}" for name, shape, wanted in report.mismatched_keys
        )
        faults.append(f"holds {some_of(found)}")
    if missing - new_pooler:
        faults.append(f"lacks {some_of(missing - new_pooler)}")
    if faults:
        raise UserError(f"model_name_or_path: {source} {'; it '.join(faults)}")
    if new_pooler:
        log.info("%s lacks %s: the pooler is trained in full, as part of the head", source, some_of(new_pooler))
    return new_pooler


def _in_pooler(name: str) -> bool:
    return _POOLER in name.split(".")
