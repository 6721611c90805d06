"""From the trained engine to files anyone can open, and the proof that they say what the live model says."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from taso_ds.adapters.adapter import TasoAdapter, merge_into
from taso_ds.adapters.fused_experts import ExpertMatrix, fused_sizes
from taso_ds.adapters.peft_format import PEFT_CONFIG_FILE, PEFT_FILE, peft_config, peft_targets, save_adapter
from taso_ds.adapters.targets import get_target, matrix_shape
from taso_ds.distributed import comm, zero
from taso_ds.errors import UserError
from taso_ds.files.atomic import write_json
from taso_ds.files.tensors import dtype_name, write_tensors
from taso_ds.methods.disk_tensors import DiskTensors
from taso_ds.methods.lora import KIND, lora_parameters, lora_tensors
from taso_ds.methods.peft_names import fuses_experts
from taso_ds.methods.prove import MERGE_ROUNDING, relative_distance
from taso_ds.methods.saved import Deltas
from taso_ds.runs.folder import ADAPTER, MODEL, RunFolder

_MODEL_FILE_SIZE = "2GB"


def task_type(*, head: bool) -> str:
    """Return PEFT's name of what the model is for."""
    return "SEQ_CLS" if head else "CAUSAL_LM"


def head_modules(model: nn.Module, head: Mapping[str, nn.Parameter]) -> list[str]:
    """Return PEFT's ``modules_to_save`` for the head: top modules (``score``, ``classifier``), and a pooler below.

    PEFT takes every module whose path ends so. Where that would be one more, the name is the whole path within PEFT's.
    """
    parts = {name: name.partition(".pooler.") for name in head}
    found = {f"{body}.pooler" if pooler else name.split(".", 1)[0] for name, (body, pooler, _) in parts.items()}
    others = [path for path, _ in model.named_modules() if path not in found]
    return sorted(
        name if not any(path.endswith(name) for path in others) else f"base_model.model.{name}" for name in found
    )


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
        module_names=[name for name, _ in model.named_modules()],
        fan_in_fan_out=_any_transposed(model, list(adapter.regions)),
        modules_to_save=head_modules(model, head),
        experts=list(experts),
        fuses_experts=fuses_experts(model),
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
    folder: RunFolder, model: nn.Module, *, config: Any, base_name: str, head: Mapping[str, nn.Parameter]
) -> None:
    """Write the baseline's ``adapter/`` in PEFT's layout. A collective; rank 0 writes."""
    tensors = lora_tensors(lora_parameters(model))
    tensors |= {f"base_model.model.{name}": zero.full_copy(parameter) for name, parameter in head.items()}
    settings = config.to_dict()
    modules = [name for name, _ in model.named_modules()]
    settings |= peft_targets(sorted(config.target_modules), modules, fuses_experts=fuses_experts(model))
    settings |= {
        "base_model_name_or_path": base_name,
        "task_type": task_type(head=bool(head)),
        "modules_to_save": head_modules(model, head) or None,
        "inference_mode": True,
        "peft_type": "LORA",
    }

    def write() -> None:
        if not any(bool(tensor.any()) for name, tensor in tensors.items() if ".lora_B." in name):
            raise UserError("export: every lora_B of the adapter is zero: nothing was trained")

        def fill(path: Path) -> None:
            write_tensors(path / PEFT_FILE, tensors, {"kind": KIND})
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
    """Put a trained head into the model, which may be partitioned, in the model's dtype. A collective."""
    for name, tensor in head.items():
        zero.assign(model.get_parameter(name), tensor)


def merge_adapter(model: nn.Module, deltas: Deltas, disk: DiskTensors) -> None:
    """Replace every adapted weight by ``W + ΔW`` on disk. One process, whole weights.

    Raises:
        UserError: two matrices are one weight, which cannot take up both of their deltas.
    """
    _check_not_shared(model, list(deltas))
    on_disk: set[nn.Parameter] = set()
    for name, delta_weight in deltas.items():
        target: Any = get_target(model, name)
        shape = matrix_shape(target)
        assert shape is not None
        merged = merge_into(target.weight.detach(), delta_weight(), transposed=shape.transposed)
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


def describe_merged(error: float, effect: float, *, dtype: Any) -> str:
    """Return one line about a merge, with the remedy where rounding takes away much of what was trained.

    Args:
        error: how far the merged model's logits are from the adapter's.
        effect: how far the adapter moves them.
    """
    line = f"merged: logits differ from the adapter's by {error:.1e}, the adapter moves them by {effect:.1e}"
    if dtype_name(dtype) == "bfloat16" and 2 * error > effect:
        line += "; bfloat16 rounds much of that away, --no_bf16 merges in float32"
    return line


def probe_rows(rows: Sequence[Any], *, number: int = 2, length: int = 64) -> list[list[int]]:
    """Return a few short token rows for comparing logits."""
    return [list(row.input_ids[:length]) for row in rows[:number]]


def _any_transposed(model: nn.Module, names: Sequence[str]) -> bool:
    targets = [get_target(model, name) for name in names]
    shapes = [matrix_shape(target) for target in targets if not isinstance(target, ExpertMatrix)]
    return any(shape is not None and shape.transposed for shape in shapes)
