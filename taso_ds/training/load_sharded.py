"""Load a pretrained model straight into ZeRO-3 partitions: each rank reads only its own byte ranges.

transformers' own ZeRO-3 path has rank 0 hold the merged checkpoint and broadcast it tensor by tensor. Here the model is
built without parameter memory and each rank fills its partitions from the safetensors files. Names are translated by
transformers' own rules; a checkpoint whose tensors must be split or merged on their way is left to transformers.
"""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from taso_ds.distributed import comm
from taso_ds.distributed.safetensors_files import SafetensorsCheckpoint, has_checkpoint, open_checkpoint
from taso_ds.distributed.sharded import Fill, Partitioner, parameters_without_memory, replace_parameters
from taso_ds.errors import UserError
from taso_ds.training.load_quantized import QuantizedLoad

log = logging.getLogger(__name__)


@dataclass
class LoadReport:
    """How checkpoint and model differ, in the words of ``from_pretrained(output_loading_info=True)``."""

    missing_keys: set[str] = field(default_factory=set)
    unexpected_keys: set[str] = field(default_factory=set)
    mismatched_keys: set[tuple[str, torch.Size, torch.Size]] = field(default_factory=set)


def why_not_sharded(source: str, model: nn.Module) -> str | None:
    """Return why this checkpoint must be loaded by transformers; None when it can be loaded in shards."""
    if not has_checkpoint(Path(source)):
        return "it is not a folder with safetensors files"
    with open_checkpoint(Path(source)) as checkpoint:
        converted = [name for name, (_, changed) in _translated(model, checkpoint.tensors).items() if changed]
    return f"transformers merges or splits {converted[0]} as it loads it" if converted else None


def build_without_memory(model_class: Any, config: Any, **options: Any) -> nn.Module:
    """Return the model with meta parameters and real buffers; its weights are not initialized."""
    from transformers.initialization import no_init_weights

    with no_init_weights(), parameters_without_memory():
        model: nn.Module = model_class.from_config(config, **options)
    return model


def tie_weights(model: Any, source: str) -> None:
    """Tie what the config ties, unless the checkpoint holds both tensors and they differ. A collective."""
    with open_checkpoint(Path(source)) as checkpoint:
        stored = stored_keys(model, checkpoint)
        pairs = [pair for pair in model.all_tied_weights_keys.items() if all(name in stored for name in pair)]
        different = [pair for pair in pairs if not _equal_ranges(checkpoint, stored[pair[0]], stored[pair[1]])]
    for target, other in sorted({pair for found in comm.gather_objects(different) for pair in found}):
        log.warning("%s: %s and %s differ although its config ties them: they stay apart", source, target, other)
        del model.all_tied_weights_keys[target]
    model.tie_weights(recompute_mapping=False)


def load_sharded(model: Any, source: str, ds_config: dict[str, Any], loads: QuantizedLoad) -> LoadReport:
    """Fill a model of ``build_without_memory`` from its checkpoint, every parameter as a ZeRO-3 partition.

    A parameter that the checkpoint lacks, or has in another shape, is reported and initialized as the model does it,
    from torch's seed, alike on every rank.

    Raises:
        UserError: when a weight that ``loads`` quantizes is not there in its shape.
    """
    report = LoadReport()
    aliases: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(parameter, []).append(name)
    partitioner = Partitioner(ds_config)
    replacements = {}
    with open_checkpoint(Path(source)) as checkpoint, _progress(aliases) as bar:
        stored = stored_keys(model, checkpoint)
        own = model.state_dict()
        report.unexpected_keys = loads.without_statistics(key for name, key in stored.items() if name not in own)
        for parameter, names in aliases.items():
            key = next((stored[name] for name in names if name in stored), None)
            if key is None:
                report.missing_keys.update(names)
            elif (shape := checkpoint.tensors[key].shape) != (wanted := loads.shape(parameter, checkpoint, key)):
                report.mismatched_keys.add((names[0], shape, wanted))
                key = None
            if key is None and parameter in loads:
                raise UserError(f"model_name_or_path: {source} lacks {names[0]} in the model's shape")
            fill = loads.fill(parameter, checkpoint, key) if key else _from_tensor(_initialized(model, names[0]))
            replacements[parameter] = partitioner.partition(parameter, fill)
            bar.update(_share_of(parameter))
        replace_parameters(model, replacements)
        _load_buffers(model, checkpoint, stored, report)
    model._adjust_missing_and_unexpected_keys(report)
    model.eval()
    return report


def partition_whole(model: nn.Module, ds_config: dict[str, Any]) -> None:
    """Turn a model that every rank holds whole into ZeRO-3 partitions, one parameter after the other."""
    partitioner = Partitioner(ds_config)
    waiting = list(dict.fromkeys(model.parameters()))
    while waiting:  # nothing else may hold on to a parameter: its memory is free when the next one is taken
        parameter = waiting.pop(0)
        partition = partitioner.partition(parameter, _from_tensor(parameter.detach().flatten()))
        replace_parameters(model, {parameter: partition})


def merged_names(model: Any, source: Path) -> list[str]:
    """Return the parameters of a model, on the meta device too, that transformers merges or splits as it loads them.

    By the names in the checkpoint; where ``source`` has none yet, by the rules for the architecture.
    """
    own = [name for name, _ in model.named_parameters()]
    if has_checkpoint(source):
        with open_checkpoint(source) as checkpoint:
            changed = {name for name, is_changed in _translated(model, checkpoint.tensors).values() if is_changed}
        return [name for name in own if name in changed]
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    converters = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightConverter)]
    patterns = [re.escape(target).replace(r"\*", r"\d+") for entry in converters for target in entry.target_patterns]
    return [name for name in own if any(re.search(pattern, name) for pattern in patterns)]


def _translated(model: Any, keys: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Return each checkpoint key's name in the model, and whether transformers would split or merge the tensor."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix, own = model.base_model_prefix, model.state_dict()
    found = {}
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, prefix, own)
        if name not in own and key in own:
            name, pattern = rename_source_key(key, [], [], prefix, own)
        found[key] = (name, pattern is not None)
    return found


def stored_keys(model: nn.Module, checkpoint: SafetensorsCheckpoint) -> dict[str, str]:
    """Return the checkpoint's key of each name the model would give it."""
    return {name: key for key, (name, _) in _translated(model, checkpoint.tensors).items()}


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


def _initialized(model: Any, name: str) -> Tensor:
    """Return the flat initial value that the model gives a parameter."""
    module_name, _, attribute = name.rpartition(".")
    module = model.get_submodule(module_name)
    without_memory = module._parameters[attribute]
    value = nn.Parameter(torch.empty_like(without_memory, device="cpu"), requires_grad=False)
    module._parameters[attribute] = value
    model._init_weights(module)
    module._parameters[attribute] = without_memory
    return value.detach().flatten()


def _load_buffers(
    model: nn.Module, checkpoint: SafetensorsCheckpoint, stored: dict[str, str], report: LoadReport
) -> None:
    """Put every buffer on the device, with the checkpoint's value where it is a stored one."""
    persistent = model.state_dict()
    for name, buffer in model.named_buffers():
        module_name, _, attribute = name.rpartition(".")
        value = buffer
        if name in stored:
            value = checkpoint.read(stored[name]).to(buffer.dtype)
        elif name in persistent:
            report.missing_keys.add(name)
        model.get_submodule(module_name)._buffers[attribute] = value.to(comm.device())


def _share_of(parameter: nn.Parameter) -> int:
    return parameter.numel() * parameter.dtype.itemsize // comm.world_size()


def _progress(parameters: Iterable[nn.Parameter]) -> Any:
    total = sum(map(_share_of, parameters))
    return tqdm(total=total, desc="loading", unit="B", unit_scale=True, disable=not comm.is_main())
