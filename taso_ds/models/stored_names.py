"""What a checkpoint's tensors are called in the model, by transformers' own rules.

Mixtures of experts are published expert by expert, but a model holds all experts of a block in one parameter: their
matrices end to end. They are read as that one tensor. transformers itself loads others that it splits or merges.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from taso_ds.files.safetensors_ranges import SafetensorsCheckpoint, has_checkpoint, open_checkpoint
from taso_ds.models.transformers_fixes import converters_of, puts_experts_end_to_end, translated_keys

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def open_for(model: "PreTrainedModel", source: str) -> Iterator[SafetensorsCheckpoint]:
    """Open a folder's checkpoint. The experts of each block are joined to the one tensor that they are in the model."""
    with open_checkpoint(Path(source)) as checkpoint:
        _join_experts(model, checkpoint)
        yield checkpoint


def stored_keys(model: "PreTrainedModel", checkpoint: SafetensorsCheckpoint) -> dict[str, str]:
    """Return the checkpoint's key of each name the model would give it."""
    return {name: key for key, (name, _) in translated_keys(model, checkpoint.tensors).items()}


def converted_keys(model: "PreTrainedModel", checkpoint: SafetensorsCheckpoint) -> list[str]:
    """Return the keys of tensors that transformers would split or merge."""
    return [key for key, (_, pattern) in translated_keys(model, checkpoint.tensors).items() if pattern is not None]


def merged_names(model: "PreTrainedModel", source: Path, *, experts: bool = True) -> list[str]:
    """Return the parameters that transformers merges or splits as it loads them.

    The names in the checkpoint tell which. If ``source`` has no checkpoint yet, the rules for the architecture do.

    Args:
        model: on the meta device, or loaded.
        source: the checkpoint's folder.
        experts: count also parameters whose experts are put end to end; each rank can read its part of these.
    """
    own = [name for name, _ in model.named_parameters()]
    if has_checkpoint(source):
        with open_checkpoint(source) if experts else open_for(model, str(source)) as checkpoint:
            found = {
                name for name, pattern in translated_keys(model, checkpoint.tensors).values() if pattern is not None
            }
        return [name for name in own if name in found]
    rules = [rule for rule in converters_of(model) if experts or not puts_experts_end_to_end(rule)]
    patterns = [re.escape(target).replace(r"\*", r"\d+") for rule in rules for target in rule.target_patterns]
    return [name for name in own if any(re.search(pattern, name) for pattern in patterns)]


def _join_experts(model: "PreTrainedModel", checkpoint: SafetensorsCheckpoint) -> None:
    """Let the experts of one block, stored one by one in equal shapes, be read as one tensor by the model's name."""
    by_pattern = {
        pattern: converter
        for converter in converters_of(model)
        if puts_experts_end_to_end(converter)
        for pattern in converter.source_patterns
    }
    if not by_pattern:
        return
    groups: dict[str, dict[str, list[str]]] = {}
    for key, (name, pattern) in translated_keys(model, checkpoint.tensors).items():
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


def _in_numbers(key: str) -> list[int | str]:
    """Return a key that sorts expert 10 behind expert 9."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", key)]
