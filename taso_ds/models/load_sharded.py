"""Load a pretrained model straight into ZeRO-3 partitions: each rank reads only its own byte ranges.

In transformers' own ZeRO-3 path, rank 0 holds the merged checkpoint and broadcasts it tensor by tensor. Here the model
is built without parameter memory, and each rank fills its partitions from the safetensors files. transformers still
loads a checkpoint whose tensors must be rearranged on the way.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from taso_ds.console.bar import Bar
from taso_ds.distributed import comm
from taso_ds.distributed.sharded import Fill, Partitioner, parameters_without_memory, replace_parameters
from taso_ds.distributed.zero_config import ZeroConfig
from taso_ds.errors import UserError
from taso_ds.files.safetensors_ranges import SafetensorsCheckpoint, has_checkpoint
from taso_ds.models import transformers_fixes
from taso_ds.models.load_quantized import QuantizedLoad
from taso_ds.models.stored_names import converted_keys, open_for, stored_keys

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)


@dataclass
class LoadReport:
    """How a checkpoint and a model differ; the fields are those of ``from_pretrained(output_loading_info=True)``."""

    missing_keys: set[str] = field(default_factory=set)
    unexpected_keys: set[str] = field(default_factory=set)
    mismatched_keys: set[tuple[str, torch.Size, torch.Size]] = field(default_factory=set)


def some_of(names: Iterable[str]) -> str:
    """Return the first three names in order, and the number of all if there are more."""
    found = sorted(names)
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more ({len(found)} in all)" if len(found) > 3 else "")


def why_not_sharded(source: str, model: "PreTrainedModel") -> str | None:
    """Return why transformers must load this checkpoint; None when each rank can read its own part."""
    if not has_checkpoint(Path(source)):
        return "it is not a folder with safetensors files"
    with open_for(model, source) as checkpoint:
        converted = converted_keys(model, checkpoint)
    return f"transformers merges or splits {converted[0]} as it loads it" if converted else None


def build_without_memory(auto_class: Any, config: "PretrainedConfig", **options: object) -> "PreTrainedModel":
    """Return a model whose parameters are on the meta device and whose buffers are real; no weight is initialized.

    Args:
        auto_class: finds the class of the configuration.
        config: of the base; the model keeps it.
        options: of ``from_config``: dtype, attention kernel, remote code.
    """
    with transformers_fixes.skip_initialization(), parameters_without_memory():
        model: PreTrainedModel = auto_class.from_config(config, **options)
    transformers_fixes.compute_buffers(model)
    return model


def tie_weights(model: "PreTrainedModel", source: str) -> None:
    """Tie what the config ties, unless the checkpoint holds both tensors and they differ. A collective."""
    with open_for(model, source) as checkpoint:
        stored = stored_keys(model, checkpoint)
        pairs = [pair for pair in model.all_tied_weights_keys.items() if all(name in stored for name in pair)]
        different = [pair for pair in pairs if not _equal_ranges(checkpoint, stored[pair[0]], stored[pair[1]])]
    for target, other in sorted({pair for found in comm.gather_objects(different) for pair in found}):
        log.warning("%s: %s and %s differ although its config ties them: they stay apart", source, target, other)
        del model.all_tied_weights_keys[target]
    model.tie_weights(recompute_mapping=False)


def load_sharded(model: "PreTrainedModel", source: str, zero: ZeroConfig, loads: QuantizedLoad) -> LoadReport:
    """Fill a model of ``build_without_memory`` from its checkpoint, every parameter as a ZeRO-3 partition.

    The report names each parameter that the checkpoint lacks or holds in another shape. The model draws these from
    torch's seed, alike on every rank.

    Args:
        model: without memory for its parameters.
        source: a folder with safetensors files.
        zero: the resolved DeepSpeed configuration.
        loads: how each parameter is filled.

    Raises:
        UserError: when a weight to be quantized is missing, or has another shape.
    """
    report = LoadReport()
    aliases: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(parameter, []).append(name)
    partitioner = Partitioner(zero)
    replacements = {}
    with open_for(model, source) as checkpoint, _progress(aliases) as bar:
        stored = stored_keys(model, checkpoint)
        own = model.state_dict()
        report.unexpected_keys = loads.without_statistics(key for name, key in stored.items() if name not in own)
        keys = {}
        for parameter, names in aliases.items():
            key = next((stored[name] for name in names if name in stored), None)
            if key is None:
                report.missing_keys.update(names)
            elif (shape := checkpoint.tensors[key].shape) != (wanted := loads.shape(parameter, checkpoint, key)):
                report.mismatched_keys.add((names[0], shape, wanted))
                key = None
            keys[parameter] = key
        lost = [aliases[parameter][0] for parameter, key in keys.items() if key is None and parameter in loads]
        if lost:
            raise UserError(f"model_name_or_path: {source} lacks {some_of(lost)} in the model's shape")
        for parameter, names in aliases.items():
            key = keys[parameter]
            fill = (
                loads.fill(parameter, checkpoint, key)
                if key
                else _from_tensor(transformers_fixes.initial_value(model, names[0]))
            )
            replacements[parameter] = partitioner.partition(parameter, fill)
            bar.update(_share_of(parameter))
        replace_parameters(model, replacements)
        _load_buffers(model, checkpoint, stored, report)
    transformers_fixes.forgive_known_differences(model, report)
    model.eval()
    return report


def partition_whole(model: nn.Module, zero: ZeroConfig) -> None:
    """Turn a model that every rank holds whole into ZeRO-3 partitions, one parameter after the other."""
    partitioner = Partitioner(zero)
    waiting = list(dict.fromkeys(model.parameters()))
    while waiting:  # nothing else may hold on to a parameter: its memory is free when the next one is taken
        parameter = waiting.pop(0)
        partition = partitioner.partition(parameter, _from_tensor(parameter.detach().flatten()))
        replace_parameters(model, {parameter: partition})


def _equal_ranges(checkpoint: SafetensorsCheckpoint, one: str, other: str) -> bool:
    """Compare this rank's share of two stored tensors."""
    first, second = checkpoint.tensors[one], checkpoint.tensors[other]
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    size = -(-first.numel // comm.world_size())
    start = min(size * comm.rank(), first.numel)
    parts = []
    for key in (one, other):
        part = torch.empty(min(size, first.numel - start), dtype=first.dtype)
        checkpoint.read_into(part, key, first=start)
        parts.append(part)
    return torch.equal(parts[0], parts[1])


def _from_tensor(flat: Tensor) -> Fill:
    def fill(out: Tensor, first: int) -> None:
        out.copy_(flat[first : first + out.numel()])

    return fill


def _load_buffers(
    model: nn.Module, checkpoint: SafetensorsCheckpoint, stored: dict[str, str], report: LoadReport
) -> None:
    """Put every buffer on the device, with the checkpoint's value where it is a stored one."""
    persistent = model.state_dict()
    for name, buffer in model.named_buffers():
        module_name, _, attribute = name.rpartition(".")
        value = buffer
        if name in persistent and name not in stored:
            report.missing_keys.add(name)
        elif name in persistent and (shape := checkpoint.tensors[stored[name]].shape) != buffer.shape:
            report.mismatched_keys.add((name, shape, buffer.shape))
        elif name in persistent:
            value = checkpoint.read(stored[name]).to(buffer.dtype)
        model.get_submodule(module_name)._buffers[attribute] = value.to(comm.device())


def _share_of(parameter: nn.Parameter) -> int:
    return parameter.numel() * parameter.dtype.itemsize // comm.world_size()


def _progress(parameters: Iterable[nn.Parameter]) -> Bar:
    total = sum(map(_share_of, parameters))
    return Bar(total=total, desc="loading", unit="B", unit_scale=True)
