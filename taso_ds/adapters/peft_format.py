"""The adapter on disk: PEFT's LoRA layout, and the compact form beside it.

``adapter_config.json`` + ``adapter_model.safetensors`` hold the dense pair of every matrix with the scaling folded into
``B`` and ``lora_alpha = r``, one rank for all modules: servers such as vLLM ignore per-module rank and alpha patterns.
A ``union`` adapter is LoRA of rank ``2 · rank``. The pairs of all experts in a fused parameter are one pair of tensors,
as PEFT reads them for its ``target_parameters``. ``taso_adapter.safetensors`` holds the trained values and their rows
and columns only, from which the adapter is built again.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from taso_ds.adapters.adapter import Factors, TasoAdapter
from taso_ds.adapters.selection import CoreRegion
from taso_ds.adapters.structure import STRUCTURES, dense_rank
from taso_ds.errors import UserError
from taso_ds.files.atomic import write_json
from taso_ds.files.tensors import dtype_name, read_tensors, write_tensors

COMPACT_FILE = "taso_adapter.safetensors"
PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG_FILE = "adapter_config.json"
KIND = "taso_adapter"
_PREFIX = "base_model.model."
# What experts were called before transformers fused them. In a model of a type whose experts it fuses, PEFT takes these
# names in ``target_modules`` for fused parameters, even where a linear of a dense layer or a shared expert has them.
_NAMES_OF_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
_MOST_FEATURES = 1 << 24  # far wider than any matrix: a damaged file must not ask for the memory of a wider one


class PeftTargets(TypedDict):
    """The adapted matrices in ``adapter_config.json``."""

    target_modules: list[str]
    target_parameters: list[str] | None


class PeftConfig(PeftTargets):
    """What is written to ``adapter_config.json``."""

    peft_type: str
    task_type: str
    base_model_name_or_path: str
    r: int
    lora_alpha: int
    lora_dropout: float
    bias: str
    fan_in_fan_out: bool
    modules_to_save: list[str] | None
    inference_mode: bool


def peft_tensors(adapter: TasoAdapter, flat: Tensor, *, experts: Mapping[str, int] | None = None) -> dict[str, Tensor]:
    """Return PEFT's tensors: ``….lora_A.weight (R, in)`` and ``….lora_B.weight (out, R)``, scaling folded into B.

    Args:
        experts: number of experts of every fused parameter with adapted experts, in the model's order.
    """
    dense = torch.zeros(adapter.num_dense, dtype=flat.dtype).index_copy(0, adapter.positions.cpu(), flat.cpu())
    pairs = adapter.factors(dense)
    tensors: dict[str, Tensor] = {}
    for parameter, number in (experts or {}).items():
        found = [pairs.pop(f"{parameter}.{index}", None) for index in range(number)]
        module = _wrapper_of(parameter, list(experts or {}))
        tensors |= {f"{_PREFIX}{module}.{key}": value for key, value in _stacked(found, adapter.scaling).items()}
    for name, pair in pairs.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = pair.A
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = pair.B * adapter.scaling
    return tensors


def _wrapper_of(parameter: str, parameters: Sequence[str]) -> str:
    """Return what PEFT calls its wrapper of one parameter: those of a module's later parameters are put around it."""
    module = parameter.rpartition(".")[0]
    siblings = [name for name in parameters if name.rpartition(".")[0] == module]
    return module + ".base_layer" * (len(siblings) - 1 - siblings.index(parameter))


def _stacked(pairs: Sequence[Factors | None], scaling: float) -> dict[str, Tensor]:
    """Return the pairs of all experts as PEFT stores them, zero where an expert has none.

    ``A (E · R, in)`` holds the rows of one expert after the other, ``B (out, R · E)`` the columns of one rank after the
    other.
    """
    empty = next(Factors(torch.zeros_like(pair.A), torch.zeros_like(pair.B)) for pair in pairs if pair is not None)
    A = torch.stack([(pair or empty).A for pair in pairs])
    B = torch.stack([(pair or empty).B for pair in pairs])
    return {"lora_A.weight": A.flatten(0, 1), "lora_B.weight": scaling * B.permute(1, 2, 0).flatten(1)}


def peft_config(
    adapter: TasoAdapter,
    *,
    base_model_name_or_path: str,
    task_type: str,
    module_names: Sequence[str],
    fan_in_fan_out: bool,
    modules_to_save: Sequence[str],
    experts: Sequence[str] = (),
    fuses_experts: bool = False,
) -> PeftConfig:
    """Return ``adapter_config.json``.

    Args:
        module_names, experts, fuses_experts: as for ``peft_targets``.
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
        **peft_targets(list(adapter.regions), module_names, experts=experts, fuses_experts=fuses_experts),
        "fan_in_fan_out": fan_in_fan_out,
        "modules_to_save": list(modules_to_save) or None,
        "inference_mode": True,
    }


def peft_targets(
    adapted: Sequence[str], module_names: Sequence[str], *, experts: Sequence[str] = (), fuses_experts: bool = False
) -> PeftTargets:
    """Return what PEFT's configuration says of the adapted matrices: ``target_modules``, ``target_parameters``.

    Args:
        module_names: every module of the model, to know whether the short names select exactly the adapted ones.
        experts: every fused parameter with adapted experts.
        fuses_experts: whether transformers fuses the experts of this type of model, if this one has any.
    """
    linears = [name for name in adapted if name.rpartition(".")[0] not in experts]
    by_weight = [name for name in linears if fuses_experts and name.rpartition(".")[2] in _NAMES_OF_EXPERTS]
    by_name = [name for name in linears if name not in set(by_weight)]
    return {
        "target_modules": _short_names(by_name, module_names),
        "target_parameters": [*experts, *(f"{name}.weight" for name in by_weight)] or None,
    }


def _short_names(adapted: Sequence[str], module_names: Sequence[str]) -> list[str]:
    """Return the last path components if they select exactly the adapted modules, else the full paths.

    PEFT looks for them among all modules: ``0`` would name a block as well as a linear in a list.
    """
    short = {name.rsplit(".", 1)[-1] for name in adapted}
    selected = {name for name in module_names if name.rsplit(".", 1)[-1] in short}
    return sorted(short if selected == set(adapted) else adapted)


def save_adapter(
    folder: Path,
    adapter: TasoAdapter,
    flat: Tensor,
    *,
    config: Mapping[str, object],
    head: Mapping[str, Tensor],
    experts: Mapping[str, int] | None = None,
) -> None:
    """Write the PEFT files and the compact file into ``folder``.

    Args:
        flat: the full flat parameter, gathered.
        config: what ``peft_config`` returned.
        head: tensors of modules trained in full, by parameter name.
        experts: as for ``peft_tensors``.

    Raises:
        FloatingPointError: when the adapter is not finite or still all zero in every ``B``: nothing was trained.
    """
    tensors = peft_tensors(adapter, flat, experts=experts)
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
    """Return the region.

    Raises:
        ValueError: the indices are not what selection gives, ascending and inside the matrix.
    """
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
