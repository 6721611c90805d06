"""From the trained engine to files anyone can open, and the proof that they say what the live model says."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taso_ds.adapters.adapter import TasoAdapter, merge_into
from taso_ds.adapters.files import dtype_name, write_json, write_tensors
from taso_ds.adapters.fused_experts import ExpertMatrix, fused_parameters, fused_sizes
from taso_ds.adapters.peft_format import PEFT_CONFIG_FILE, PEFT_FILE, peft_config, save_adapter
from taso_ds.adapters.targets import get_target, matrix_shape
from taso_ds.distributed import comm, zero
from taso_ds.errors import UserError
from taso_ds.training.disk_tensors import DiskTensors
from taso_ds.training.lora_baseline import lora_tensors
from taso_ds.training.prove import MERGE_ROUNDING, relative_distance
from taso_ds.training.run_folder import ADAPTER, MODEL, RunFolder

_MODEL_FILE_SIZE = "2GB"


def task_type(*, head: bool) -> str:
    """Return PEFT's name of what the model is for."""
    return "SEQ_CLS" if head else "CAUSAL_LM"


def linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if matrix_shape(module) is not None]


def head_modules(head: Mapping[str, nn.Parameter]) -> list[str]:
    """Return the top modules the head's parameters belong to (``score``, ``classifier``)."""
    return sorted({name.split(".", 1)[0] for name in head})


def save_taso(
    folder: RunFolder, model: nn.Module, adapter: TasoAdapter, *, base_name: str, head: Mapping[str, nn.Parameter]
) -> None:
    """Write ``adapter/``: PEFT's files and the compact file. A collective; rank 0 writes.

    Raises:
        UserError: on every rank, when the adapter is not finite or was never trained.
    """
    flat = zero.full_copy(adapter.flat)
    head_tensors = {name: zero.full_copy(parameter) for name, parameter in head.items()}
    experts = fused_sizes(model, adapter.regions)
    config = peft_config(
        adapter,
        base_model_name_or_path=base_name,
        task_type=task_type(head=bool(head)),
        linear_names=linear_names(model),
        fan_in_fan_out=_any_transposed(model, list(adapter.regions)),
        modules_to_save=head_modules(head),
        experts=list(experts),
        has_fused_experts=any(map(fused_parameters, model.modules())),
    )

    def write() -> None:
        try:
            folder.write_folder(
                ADAPTER,
                lambda path: save_adapter(path, adapter, flat, config=config, head=head_tensors, experts=experts),
            )
        except FloatingPointError as error:
            raise UserError(f"export: {error}") from error

    comm.on_main(write)


def save_lora(
    folder: RunFolder,
    parameters: Mapping[str, nn.Parameter],
    *,
    config: Any,
    base_name: str,
    head: Mapping[str, nn.Parameter],
) -> None:
    """Write the baseline's ``adapter/`` in PEFT's layout. A collective; rank 0 writes."""
    tensors = lora_tensors(parameters)
    tensors |= {f"base_model.model.{name}": zero.full_copy(parameter) for name, parameter in head.items()}
    settings = config.to_dict()
    settings |= {
        "base_model_name_or_path": base_name,
        "task_type": task_type(head=bool(head)),
        "modules_to_save": head_modules(head) or None,
        "inference_mode": True,
        "target_modules": sorted(settings["target_modules"]),
        "peft_type": "LORA",
    }

    def write() -> None:
        if not any(bool(tensor.any()) for name, tensor in tensors.items() if ".lora_B." in name):
            raise UserError("export: every lora_B of the adapter is zero: nothing was trained")

        def fill(path: Path) -> None:
            write_tensors(path / PEFT_FILE, tensors, {"kind": "peft_lora"})
            write_json(path / PEFT_CONFIG_FILE, settings)

        folder.write_folder(ADAPTER, fill)

    comm.on_main(write)


def save_full(folder: RunFolder, model: Any, tokenizer: Any) -> None:
    """Write ``model/``, a plain Hugging Face model. A collective: weights go one by one through rank 0 to its disk."""
    with DiskTensors(folder.path) as disk:
        kept: dict[nn.Parameter, Tensor] = {}
        state: dict[str, Tensor] = {}

        def keep(parameter: nn.Parameter, whole: Tensor) -> None:
            kept[parameter] = disk.keep(whole)

        for parameter in model.parameters():
            whole = zero.full_copy(parameter, to_rank=0)
            comm.on_main(partial(keep, parameter, whole))  # a full disk is every rank's error
        if comm.is_main():
            state = {name: kept[value] for name, value in model.named_parameters(remove_duplicate=False)}
            persistent = model.state_dict().keys()
            state |= {name: value.cpu() for name, value in model.named_buffers() if name in persistent}
        comm.on_main(lambda: save_model(folder, model, state, tokenizer))


def save_model(folder: RunFolder, model: Any, state: dict[str, Tensor], tokenizer: Any) -> None:
    """Write ``model/`` from ``state``, one file's tensors in memory at a time."""

    def fill(path: Path) -> None:
        model.save_pretrained(path, state_dict=state, max_shard_size=_MODEL_FILE_SIZE)
        try:
            tokenizer.save_pretrained(path)
        except ValueError as error:  # chat templates whose names would lead out of the folder
            raise UserError(f"{MODEL}: cannot save the tokenizer: {error}") from error

    folder.write_folder(MODEL, fill)


def load_head(model: nn.Module, head: Mapping[str, Tensor]) -> None:
    """Put a trained head into the model, in place."""
    for name, tensor in head.items():
        parameter = dict(model.named_parameters()).get(name)
        if parameter is None or zero.full_shape(parameter) != tensor.shape:
            raise UserError(f"run: the adapter has a trained {name}, which this base does not have in that shape")
        with zero.gathered([parameter], write=True), torch.no_grad():
            parameter.copy_(tensor)


def merge_adapter(model: nn.Module, adapter: TasoAdapter, disk: DiskTensors) -> None:
    """Replace every adapted weight by ``W + ΔW`` on disk. One process, whole weights.

    Raises:
        UserError: two matrices are one weight, which cannot take up both of their deltas.
    """
    _check_not_shared(model, list(adapter.regions))
    on_disk: set[nn.Parameter] = set()
    for name in adapter.regions:
        target: Any = get_target(model, name)
        shape = matrix_shape(target)
        assert shape is not None
        merged = merge_into(target.weight.detach(), adapter.delta_weight(name), transposed=shape.transposed)
        if not isinstance(target, ExpertMatrix):
            target.weight.data = disk.keep(merged)
            continue
        if target.parameter not in on_disk:
            target.parameter.data = disk.keep(target.parameter.detach())
            on_disk.add(target.parameter)
        target.parameter.data[target.index] = merged


def _check_not_shared(model: nn.Module, names: Sequence[str]) -> None:
    owners: dict[nn.Parameter, str] = {}
    for name in names:
        target: Any = get_target(model, name)
        if isinstance(target, ExpertMatrix):
            continue
        first = owners.setdefault(target.weight, name)
        if first != name:
            raise UserError(
                f"merge: {type(model).__name__} uses one weight as {first} and as {name}, and the adapter changes each"
                " in its own way; open the adapter with peft instead"
            )


def check_merged(merged: Sequence[Tensor], live: Sequence[Tensor], *, dtype: Any) -> float:
    """Return how far the merged model's logits are from the adapter's; UserError when it is more than rounding."""
    error = relative_distance(merged, live)
    if not error <= MERGE_ROUNDING[dtype_name(dtype)]:
        raise UserError(f"export: the merged model differs from the adapter by {error:.1e} of its logits")
    return error


def probe_rows(rows: Sequence[Any], *, number: int = 2, length: int = 64) -> list[list[int]]:
    """Return a few short token rows for comparing logits."""
    return [list(row.input_ids[:length]) for row in rows[:number]]


def _any_transposed(model: nn.Module, names: Sequence[str]) -> bool:
    targets = [get_target(model, name) for name in names]
    shapes = [matrix_shape(target) for target in targets if not isinstance(target, ExpertMatrix)]
    return any(shape is not None and shape.transposed for shape in shapes)
