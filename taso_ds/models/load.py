"""Load the frozen base: whole on every rank's device, or at ZeRO stage 3 straight into partitions."""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from taso_ds.distributed import comm, engine
from taso_ds.distributed.zero import assert_partitioned, full_numel
from taso_ds.distributed.zero_config import ZeroConfig
from taso_ds.errors import UserError
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
from taso_ds.models.quantization import adopt_linears
from taso_ds.models.quantized_linear import QuantizedLinear
from taso_ds.models.source import Loaded, loading
from taso_ds.models.spec import BaseSpec, in_pooler, outside_body

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A loaded base.

    Attributes:
        spec: what was known of it before.
        model: frozen but for the head.
        new_pooler: parameters of the body's pooler that the checkpoint lacks: they belong to the head.
    """

    spec: BaseSpec
    model: "PreTrainedModel"
    new_pooler: frozenset[str] = frozenset()

    @property
    def head_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of the classification head; empty without one."""
        return outside_body(self.model, new_pooler=self.new_pooler) if self.spec.head else {}


def load_base_model(spec: BaseSpec, *, seed: int, zero: ZeroConfig) -> BaseModel:
    """Load the base in the engine's dtype, at ZeRO stage 3 as partitions. Only a classification head is trainable.

    Args:
        spec: which base.
        seed: of a new head, which starts alike at every world size and stage.
        zero: the resolved DeepSpeed configuration.

    Raises:
        UserError: when the checkpoint cannot be read.
    """
    torch.manual_seed(seed)
    options: dict[str, object] = {"dtype": spec.dtype, "trust_remote_code": spec.arguments.trust_remote_code}
    if spec.arguments.attn_implementation is not None:
        options["attn_implementation"] = spec.arguments.attn_implementation
    if zero.stage == 3:
        model, report = _load_partitioned(spec, options, zero=zero)
        assert_partitioned(model)
    else:
        model, report = _load_whole(spec, options)
    new_pooler = _check_complete(model, report, spec)
    if spec.quantization is not None:
        _say_what_is_quantized(model, spec.quantization.bits)
    model.config.use_cache = False
    model.requires_grad_(False)
    base = BaseModel(spec, model, new_pooler)
    for parameter in base.head_parameters.values():
        parameter.requires_grad_(True)
    return base


def _say_what_is_quantized(model: "PreTrainedModel", bits: int) -> None:
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    small, packed = sum(linear.matrix.numel() for linear in linears), {id(linear.weight) for linear in linears}
    large = sum(full_numel(parameter) for parameter in model.parameters() if id(parameter) not in packed)
    log.info("%.0f %% of the weights in %d bits, the others stay as they are", 100 * small / (small + large), bits)


def _load_whole(spec: BaseSpec, options: dict[str, object]) -> tuple["PreTrainedModel", LoadReport]:
    """Load a whole model on every rank's device, through transformers."""
    if spec.quantization is not None:
        options = options | spec.quantization.options(spec.meta)
    model, report = comm.together(lambda: _from_pretrained(spec, options, whole=True))
    if spec.quantization is not None:
        adopt_linears(model, spec.quantization)
        _leave_files(model)
    model.to(comm.device())  # type: ignore[arg-type]  # whose decorator loses ``self``
    return model, report


def _leave_files(model: "PreTrainedModel") -> None:
    """Copy the parameters that are still pages of the checkpoint.

    One of them keeps the whole file in memory, although most of its 16-bit weights have been quantized by now.
    """
    if comm.device().type != "cpu":  # parameters are copied to other devices anyway
        return
    quantized = {id(module.weight) for module in model.modules() if isinstance(module, QuantizedLinear)}
    for parameter in model.parameters():
        if id(parameter) not in quantized:
            parameter.data = parameter.data.clone()


def _from_pretrained(
    spec: BaseSpec, options: dict[str, object], *, whole: bool
) -> tuple["PreTrainedModel", LoadReport]:
    def load() -> tuple["PreTrainedModel", LoadReport]:
        model, found = model_class(head=spec.head).from_pretrained(
            spec.source,
            config=spec.config,
            revision=spec.arguments.model_revision,
            output_loading_info=True,
            ignore_mismatched_sizes=whole,  # reported by name afterwards; ZeRO-3 loading cannot
            **options,
        )
        return model, LoadReport(found["missing_keys"], found["unexpected_keys"], found["mismatched_keys"])

    return loading(spec.source, load)


def _load_partitioned(
    spec: BaseSpec, options: dict[str, object], *, zero: ZeroConfig
) -> tuple["PreTrainedModel", LoadReport]:
    """Load into ZeRO-3 partitions: each rank reads its own where the checkpoint allows it, transformers otherwise."""
    source = spec.source
    model = loading(
        source, lambda: build_without_memory(model_class(head=spec.head), copy.deepcopy(spec.config), **options)
    )
    reason = comm.together(lambda: why_not_sharded(source, model))
    if reason is None:
        tie_weights(model, source)
        loads = comm.together(lambda: QuantizedLoad(spec.quantization, model))
        report = comm.together(lambda: load_sharded(model, source, zero, loads))
        loads.finish()
        _read_generation_config(model, source)
        return model, report
    if spec.quantization is not None:
        # transformers quantizes whole matrices, after which nothing is left for ZeRO to partition on the way.
        log.info("loading %s whole on every rank, to partition it then: %s", source, reason)
        model, report = _load_whole(spec, options)
        partition_whole(model, zero)
        return model, report
    log.info("loading %s through transformers, rank 0 reads for all: %s", source, reason)
    with engine.zero3_loading(zero):
        return _said_by_each_rank(lambda: _from_pretrained(spec, options, whole=False))


def _read_generation_config(model: "PreTrainedModel", source: str) -> None:
    """Read the settings of generation, such as end tokens, as ``from_pretrained`` would have done."""
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
    """Run ``load`` and log its error on the rank that fails.

    ``load`` is full of collectives, so that rank cannot tell the other ranks. It tells the user.
    """
    try:
        return load()
    except UserError as error:
        if not comm.is_main():  # whose error is printed anyway
            log.error("rank %d: %s", comm.rank(), error)
        raise


def _check_complete(model: "PreTrainedModel", report: LoadReport, spec: BaseSpec) -> frozenset[str]:
    """Refuse a checkpoint that leaves weights of the body at random values. Only a head may start from these.

    Returns:
        The parameters of the pooler if the checkpoint lacks it: encoders are often published without. They start at
        random values and train with the head.
    """
    source = spec.source
    if report.unexpected_keys:
        log.warning("%s holds %s, which the model has no place for", source, some_of(report.unexpected_keys))
    body = f"{model.base_model_prefix}."
    missing = {name for name in report.missing_keys if name.startswith(body) or not spec.head}
    new_pooler = frozenset(filter(in_pooler, missing)) if spec.head else frozenset()
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
