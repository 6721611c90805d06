"""What this package takes from inside transformers, because nothing public says or does it: one list.

Each function's docstring names the version in which that was seen last and where it is known upstream;
``tests/models/test_transformers_fixes.py`` holds a test of each that fails when transformers says or does it by itself,
or no longer as here. The largest correction is ``load_sharded`` as a whole: at ZeRO-3 ``from_pretrained`` reads the
checkpoint on rank 0 and sends every weight (huggingface/transformers#12273, open), which
``tests/multiprocess/test_load.py`` counts.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter, WeightTransform


def skip_initialization() -> AbstractContextManager[None]:
    """Build models inside this without random values in their parameters, as ``from_pretrained`` builds them.

    Seen in: transformers 5.23.0.
    Upstream: no issue known; ``from_config`` has no argument for it.
    """
    from transformers.initialization import no_init_weights

    skipping: AbstractContextManager[None] = no_init_weights()
    return skipping


def compute_buffers(model: Any) -> None:  # its parts are marked with an attribute that no type of torch names
    """Compute the buffers again, as ``from_pretrained`` does: ``from_config`` in bf16 computes its tables in bf16.

    Seen in: transformers 5.23.0.
    Upstream: no issue known; huggingface/transformers#42309 lets ``initialize_weights`` restore buffers.
    """
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()


def initial_value(model: "PreTrainedModel", name: str) -> Tensor:
    """Return the flat value that the model gives one of its meta parameters at its start, from torch's seed.

    Seen in: transformers 5.23.0.
    Upstream: no issue known; ``_init_weights`` is the only place that knows.
    """
    module_name, _, attribute = name.rpartition(".")
    module = model.get_submodule(module_name)
    without_memory = module.get_parameter(attribute)
    value = nn.Parameter(torch.zeros_like(without_memory, device="cpu"), requires_grad=False)
    module._parameters[attribute] = value
    model._init_weights(module)
    module._parameters[attribute] = without_memory
    return value.detach().flatten()


def forgive_known_differences(model: "PreTrainedModel", report: Any) -> None:
    """Strike from a load report what the model's class says may be missing or be too much.

    Args:
        report: has ``missing_keys`` and ``unexpected_keys``, which are sets; changed.

    Seen in: transformers 5.23.0.
    Upstream: no issue known; the lists are attributes of the class, and their rules are in this method.
    """
    model._adjust_missing_and_unexpected_keys(report)


def converted_names(model: "PreTrainedModel", names: Iterable[str], skipped: list[str] | None) -> list[str]:
    """Return those of ``names`` that transformers quantizes.

    Args:
        model: not quantized yet; it may be on the meta device.
        names: of linears.
        skipped: ``llm_int8_skip_modules`` of the checkpoint; None where it has none.

    Seen in: transformers 5.23.0.
    Upstream: no issue known; quantized at ZeRO-3, every rank loads the whole base (huggingface/transformers#24395).
    """
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    in_fp32 = None if model._keep_in_fp32_modules is None else list(model._keep_in_fp32_modules)
    kept = HfQuantizer.get_modules_to_not_convert(model, skipped, in_fp32)
    return [name for name in names if should_convert_module(name, kept)]


def converters_of(model: "PreTrainedModel") -> list["WeightConverter"]:
    """Return the rules by which transformers splits and merges this model's stored tensors.

    Seen in: transformers 5.23.0.
    Upstream: no issue known; the rules came with version 5.0 and are not documented.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    return [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightConverter)]


def rearrangements(model: "PreTrainedModel") -> list["WeightTransform"]:
    """Return transformers' rules for this type of model, by which PEFT decides too; none for most types.

    Seen in: transformers 5.23.0.
    Upstream: no issue known, see ``converters_of``, which asks for this very model.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    return list(get_checkpoint_conversion_mapping(model.config.model_type) or [])


def stacks_modules(rule: object) -> bool:
    """Say whether a rule puts modules that are stored one by one, experts, into one parameter.

    Seen in: transformers 5.23.0.
    Upstream: no issue known, see ``converters_of``.
    """
    from transformers.core_model_loading import MergeModulelist

    return any(isinstance(step, MergeModulelist) for step in getattr(rule, "operations", ()))


def puts_experts_end_to_end(converter: "WeightConverter") -> bool:
    """Say whether a rule stacks experts, of which each is one matrix or several above one another.

    Seen in: transformers 5.23.0.
    Upstream: no issue known, see ``converters_of``.
    """
    from transformers.core_model_loading import Concatenate, MergeModulelist

    stack, *more = converter.operations
    if not (type(stack) is MergeModulelist and stack.dim == 0 and len(converter.target_patterns) == 1):
        return False
    if not more:
        return len(converter.source_patterns) == 1
    return len(more) == 1 and type(more[0]) is Concatenate and more[0].dim == 1


def translated_keys(model: "PreTrainedModel", keys: Iterable[str]) -> dict[str, tuple[str, str | None]]:
    """Return each stored key's name in the model, and the pattern by which transformers splits or merges the tensor.

    Seen in: transformers 5.23.0.
    Upstream: no issue known, see ``converters_of``.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    converters, prefix, own = converters_of(model), model.base_model_prefix, model.state_dict()
    found = {}
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, prefix, own)
        if name not in own and key in own:
            name, pattern = rename_source_key(key, [], [], prefix, own)
        found[key] = (name, pattern)
    return found
