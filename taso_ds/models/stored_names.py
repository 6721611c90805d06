"""What a checkpoint's tensors are called in the model, by transformers' own rules.

Mixtures of experts are published expert by expert, and a model holds all experts of a block in one parameter: their
matrices end to end, which is how they are read. Other tensors that transformers splits or merges are left to it.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from taso_ds.files.safetensors_ranges import SafetensorsCheckpoint, has_checkpoint, open_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter, WeightTransform


@contextmanager
def open_for(model: "PreTrainedModel", source: str) -> Iterator[SafetensorsCheckpoint]:
    """Open a folder's checkpoint. The experts of each block are joined to the one tensor that they are in the model."""
    with open_checkpoint(Path(source)) as checkpoint:
        _join_experts(model, checkpoint)
        yield checkpoint


def stored_keys(model: "PreTrainedModel", checkpoint: SafetensorsCheckpoint) -> dict[str, str]:
    """Return the checkpoint's key of each name the model would give it."""
    return {name: key for key, (name, _) in _translated(model, checkpoint.tensors).items()}


def converted_keys(model: "PreTrainedModel", checkpoint: SafetensorsCheckpoint) -> list[str]:
    """Return the keys of tensors that transformers would split or merge."""
    return [key for key, (_, pattern) in _translated(model, checkpoint.tensors).items() if pattern is not None]


def merged_names(model: "PreTrainedModel", source: Path, *, experts: bool = True) -> list[str]:
    """Return the parameters that transformers merges or splits as it loads them.

    The tensors of the checkpoint tell them; where ``source`` has none yet, the rules for the architecture do.

    Args:
        model: on the meta device, or loaded.
        source: the checkpoint's folder.
        experts: count the parameters whose experts are put end to end, which loading in shards does by itself.
    """
    own = [name for name, _ in model.named_parameters()]
    if has_checkpoint(source):
        with open_checkpoint(source) if experts else open_for(model, str(source)) as checkpoint:
            found = {name for name, pattern in _translated(model, checkpoint.tensors).values() if pattern is not None}
        return [name for name in own if name in found]
    rules = [rule for rule in _converters(_mapping(model)) if experts or not _puts_experts_end_to_end(rule)]
    patterns = [re.escape(target).replace(r"\*", r"\d+") for rule in rules for target in rule.target_patterns]
    return [name for name in own if any(re.search(pattern, name) for pattern in patterns)]


def _translated(model: "PreTrainedModel", keys: Iterable[str]) -> dict[str, tuple[str, str | None]]:
    """Return each key's name in the model, and the pattern by which transformers splits or merges the tensor."""
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    mapping = _mapping(model)
    renamings, converters = [entry for entry in mapping if isinstance(entry, WeightRenaming)], _converters(mapping)
    prefix, own = model.base_model_prefix, model.state_dict()
    found = {}
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, prefix, own)
        if name not in own and key in own:
            name, pattern = rename_source_key(key, [], [], prefix, own)
        found[key] = (name, pattern)
    return found


def _mapping(model: "PreTrainedModel") -> Sequence["WeightTransform"]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    mapping: Sequence[WeightTransform] = get_model_conversion_mapping(model)
    return mapping


def _converters(mapping: Sequence["WeightTransform"]) -> list["WeightConverter"]:
    from transformers.core_model_loading import WeightConverter

    return [entry for entry in mapping if isinstance(entry, WeightConverter)]


def _join_experts(model: "PreTrainedModel", checkpoint: SafetensorsCheckpoint) -> None:
    by_pattern = {
        pattern: converter
        for converter in _converters(_mapping(model))
        if _puts_experts_end_to_end(converter)
        for pattern in converter.source_patterns
    }
    if not by_pattern:
        return
    groups: dict[str, dict[str, list[str]]] = {}
    for key, (name, pattern) in _translated(model, checkpoint.tensors).items():
        if pattern is not None and pattern in by_pattern:
            groups.setdefault(name, {}).setdefault(pattern, []).append(key)
    for name, found in groups.items():
        (converter,) = {id(by_pattern[pattern]): by_pattern[pattern] for pattern in found}.values()
        columns = [sorted(found.get(pattern, []), key=_in_numbers) for pattern in converter.source_patterns]
        keys = [key for expert in zip(*columns, strict=False) for key in expert]
        stored = [checkpoint.tensors[key] for key in keys]
        is_whole = len(keys) == sum(map(len, found.values()))
        if is_whole and len({(part.shape, part.dtype) for part in stored}) == 1 and stored[0].shape[1:]:
            rows, *rest = stored[0].shape
            checkpoint.join(name, keys, torch.Size((len(columns[0]), len(columns) * rows, *rest)))


def _puts_experts_end_to_end(converter: "WeightConverter") -> bool:
    """Say whether a rule stacks experts; each may be one matrix, or several above one another."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    stack, *more = converter.operations
    if not (type(stack) is MergeModulelist and stack.dim == 0 and len(converter.target_patterns) == 1):
        return False
    if not more:
        return len(converter.source_patterns) == 1
    return len(more) == 1 and type(more[0]) is Concatenate and more[0].dim == 1


def _in_numbers(key: str) -> list[int | str]:
    """Return a key that sorts expert 10 behind expert 9."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", key)]
