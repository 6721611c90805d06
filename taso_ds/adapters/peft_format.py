"""The adapter on disk: PEFT's LoRA layout, and the compact form beside it.

``adapter_config.json`` + ``adapter_model.safetensors`` hold the dense pair of every matrix with the scaling folded into
``B`` and ``lora_alpha = r``, one rank for all modules: servers such as vLLM ignore per-module rank and alpha patterns.
A ``union`` adapter is LoRA of rank ``2 · rank``. ``taso_adapter.safetensors`` holds the trained values and their rows
and columns only, from which the adapter is built again.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taso_ds.adapters.adapter import TasoAdapter
from taso_ds.adapters.files import dtype_name, read_tensors, write_json, write_tensors
from taso_ds.adapters.selection import CoreRegion
from taso_ds.adapters.structure import STRUCTURES, dense_rank
from taso_ds.errors import UserError

COMPACT_FILE = "taso_adapter.safetensors"
PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG_FILE = "adapter_config.json"
KIND = "taso_adapter"
_PREFIX = "base_model.model."


def peft_tensors(adapter: TasoAdapter, flat: Tensor) -> dict[str, Tensor]:
    """Return PEFT's tensors: ``….lora_A.weight (R, in)`` and ``….lora_B.weight (out, R)``, scaling folded into B."""
    dense = torch.zeros(adapter.num_dense, dtype=flat.dtype).index_copy(0, adapter.positions.cpu(), flat.cpu())
    tensors = {}
    for name, pair in adapter.factors(dense).items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = pair.A
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = pair.B * adapter.scaling
    return tensors


def peft_config(
    adapter: TasoAdapter,
    *,
    base_model_name_or_path: str,
    task_type: str,
    linear_names: Sequence[str],
    fan_in_fan_out: bool,
    modules_to_save: Sequence[str],
) -> dict[str, Any]:
    """Return ``adapter_config.json``.

    Args:
        linear_names: every linear of the model, to know whether the short names select exactly the adapted ones.
        fan_in_fan_out: whether the targets store their weight transposed (GPT-2's ``Conv1D``).
        modules_to_save: modules trained in full (a task head).
    """
    total_rank = dense_rank(adapter.structure, adapter.rank)
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model_name_or_path,
        "r": total_rank,
        "lora_alpha": total_rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _short_names(list(adapter.regions), linear_names),
        "fan_in_fan_out": fan_in_fan_out,
        "modules_to_save": list(modules_to_save) or None,
        "inference_mode": True,
    }


def _short_names(adapted: Sequence[str], linear_names: Sequence[str]) -> list[str]:
    """Return the last path components if they select exactly the adapted modules, else the full paths."""
    short = {name.rsplit(".", 1)[-1] for name in adapted}
    selected = {name for name in linear_names if name.rsplit(".", 1)[-1] in short}
    return sorted(short if selected == set(adapted) else adapted)


def save_adapter(
    folder: Path, adapter: TasoAdapter, flat: Tensor, *, config: Mapping[str, Any], head: Mapping[str, Tensor]
) -> None:
    """Write the PEFT files and the compact file into ``folder``.

    Args:
        flat: the full flat parameter, gathered.
        config: what ``peft_config`` returned.
        head: tensors of modules trained in full, by parameter name.

    Raises:
        FloatingPointError: when the adapter is not finite or still all zero in every ``B``: nothing was trained.
    """
    tensors = peft_tensors(adapter, flat)
    if not torch.isfinite(flat).all():
        raise FloatingPointError("the adapter holds NaN or infinity")
    if not any(bool(tensor.any()) for name, tensor in tensors.items() if ".lora_B." in name):
        raise FloatingPointError("every lora_B of the adapter is zero: nothing was trained")
    folder.mkdir(parents=True, exist_ok=True)
    compact: dict[str, Tensor] = {}
    for name, values in adapter.compact(flat).items():
        compact[f"{name}.values"] = values
        compact[f"{name}.rows"], compact[f"{name}.cols"] = (
            adapter.regions[name].rows,
            adapter.regions[name].cols,
        )
    for name, tensor in head.items():
        tensors[_PREFIX + name] = tensor
        compact[f"head.{name}"] = tensor
    metadata = {
        "kind": KIND,
        "structure": adapter.structure,
        "rank": adapter.rank,
        "scaling": adapter.scaling,
        "dtype": dtype_name(flat.dtype),
        "shapes": {name: [region.out_features, region.in_features] for name, region in adapter.regions.items()},
    }
    write_tensors(folder / COMPACT_FILE, compact, metadata)
    write_tensors(folder / PEFT_FILE, tensors, {"kind": "peft_lora"})
    write_json(folder / PEFT_CONFIG_FILE, dict(config))


def load_adapter(folder: Path) -> tuple[TasoAdapter, dict[str, Tensor]]:
    """Build the adapter again from its compact file; also returns the tensors of the task head, by parameter name.

    Raises:
        UserError: missing, damaged or inconsistent file.
    """
    path = folder / COMPACT_FILE
    tensors, metadata = read_tensors(path, kind=KIND)
    try:
        regions = {
            name: CoreRegion(tensors[f"{name}.rows"], tensors[f"{name}.cols"], out_features, in_features)
            for name, (out_features, in_features) in metadata["shapes"].items()
        }
        if metadata["structure"] not in STRUCTURES or not regions:
            raise UserError(f"{path}: unknown structure {metadata['structure']!r}")
        adapter = TasoAdapter(
            regions,
            structure=metadata["structure"],
            rank=metadata["rank"],
            scaling=metadata["scaling"],
            seed=0,
            dtype=getattr(torch, metadata["dtype"]),
        )
        flat = torch.cat([tensors[f"{name}.values"] for name in regions])
    except (KeyError, AttributeError, TypeError, IndexError) as error:
        raise UserError(f"{path}: incomplete or inconsistent ({error})") from error
    if flat.shape != adapter.flat.shape:
        raise UserError(f"{path}: {flat.numel()} values for {adapter.flat.numel()} positions")
    with torch.no_grad():
        adapter.flat.copy_(flat)
    head = {name.removeprefix("head."): tensor for name, tensor in tensors.items() if name.startswith("head.")}
    return adapter, head
