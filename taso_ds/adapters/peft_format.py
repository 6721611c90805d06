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
_MOST_FEATURES = 1 << 24  # far wider than any matrix: what is damaged must not ask for the memory of a wider one


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


def _region(rows: Tensor, cols: Tensor, out_features: int, in_features: int) -> CoreRegion:
    """Return the region; ValueError when the indices are not what selection gives: ascending and inside the matrix."""
    for indices, size in ((rows, out_features), (cols, in_features)):
        if not isinstance(size, int) or not 0 < size < _MOST_FEATURES:
            raise ValueError(f"{size!r} features")
        if indices.dtype != torch.int64 or indices.ndim != 1 or not len(indices):
            raise ValueError(f"indices are {indices.dtype} of shape {tuple(indices.shape)}")
        if int(indices[0]) < 0 or int(indices[-1]) >= size or not bool((indices.diff() > 0).all()):
            raise ValueError(f"indices do not ascend within {size}")
    return CoreRegion(rows, cols, out_features, in_features)


def _kept(structure: str, region: CoreRegion) -> int:
    """Return the compact parameters of one matrix at rank 1."""
    return sum(
        (len(region.rows) if branch.core_rows else region.out_features)
        + (len(region.cols) if branch.core_cols else region.in_features)
        for branch in STRUCTURES[structure]
    )


def load_adapter(folder: Path) -> tuple[TasoAdapter, dict[str, Tensor]]:
    """Build the adapter again from its compact file; also returns the tensors of the task head, by parameter name.

    Raises:
        UserError: missing, damaged or inconsistent file.
    """
    path = folder / COMPACT_FILE
    tensors, metadata = read_tensors(path, kind=KIND)
    try:
        regions = {
            name: _region(tensors[f"{name}.rows"], tensors[f"{name}.cols"], out_features, in_features)
            for name, (out_features, in_features) in metadata["shapes"].items()
        }
        structure, rank, scaling = metadata["structure"], metadata["rank"], metadata["scaling"]
        if structure not in STRUCTURES or not regions:
            raise ValueError(f"unknown structure {structure!r}")
        if not isinstance(rank, int) or not 0 < rank < _MOST_FEATURES or not isinstance(scaling, (int, float)):
            raise ValueError(f"rank {rank!r}, scaling {scaling!r}")
        flat = torch.cat([tensors[f"{name}.values"] for name in regions])
        positions = rank * sum(_kept(structure, region) for region in regions.values())
        if flat.shape != (positions,) or not flat.is_floating_point():
            raise ValueError(f"{flat.numel()} values for {positions} positions")
        dtype = getattr(torch, metadata["dtype"])
        adapter = TasoAdapter(regions, structure=structure, rank=rank, scaling=scaling, seed=0, dtype=dtype)
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        # RuntimeError: tensors that cannot be joined, and shapes no memory holds.
        raise UserError(f"{path}: incomplete or inconsistent ({error})") from error
    with torch.no_grad():
        adapter.flat.copy_(flat)
    head = {name.removeprefix("head."): tensor for name, tensor in tensors.items() if name.startswith("head.")}
    return adapter, head
