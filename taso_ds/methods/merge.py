"""An adapter merged into its base: ``W + ΔW`` replaces every adapted weight, and rounding moves the logits a little."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from taso_ds.adapters.adapter import merge_into
from taso_ds.adapters.fused_experts import ExpertMatrix
from taso_ds.adapters.targets import get_target, matrix_shape
from taso_ds.errors import UserError
from taso_ds.files.tensors import dtype_name
from taso_ds.methods.disk_tensors import DiskTensors
from taso_ds.methods.method import Deltas
from taso_ds.methods.probe import MERGE_ROUNDING, relative_distance


def merge_adapter(model: nn.Module, deltas: Deltas, disk: DiskTensors) -> None:
    """Replace every adapted weight by ``W + ΔW`` on disk. One process, whole weights.

    Args:
        model: the base without the adapter, on the CPU; changed.
        deltas: what gives the ΔW of each matrix, by the matrix's name.
        disk: where the merged weights are kept.

    Raises:
        UserError: two matrices are one weight, which cannot take up both of their deltas.
    """
    _check_not_shared(model, list(deltas))
    on_disk: set[nn.Parameter] = set()
    for name, delta_weight in deltas.items():
        target = get_target(model, name)
        shape = matrix_shape(target)
        assert shape is not None
        if not isinstance(target, ExpertMatrix):
            weight = target.get_parameter("weight")
            weight.data = disk.keep(merge_into(weight.detach(), delta_weight(), transposed=shape.transposed))
            continue
        merged = merge_into(target.weight.detach(), delta_weight(), transposed=shape.transposed)
        if target.parameter not in on_disk:
            target.parameter.data = disk.keep(target.parameter.detach())
            on_disk.add(target.parameter)
        target.parameter.data[target.index] = merged


def _check_not_shared(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse two adapted matrices that are one weight."""
    owners: dict[nn.Parameter, str] = {}
    for name in names:
        target = get_target(model, name)
        if isinstance(target, ExpertMatrix):
            continue
        first = owners.setdefault(target.get_parameter("weight"), name)
        if first != name:
            raise UserError(
                f"merge: {type(model).__name__} uses one weight as {first} and as {name}, and the adapter changes each"
                " in its own way; open the adapter with peft instead"
            )


def check_merged(merged: Sequence[Tensor], live: Sequence[Tensor], *, dtype: torch.dtype) -> float:
    """Return how far the merged model's logits are from the adapter's.

    Args:
        merged: the merged model's logits on the probes.
        live: the logits of base and adapter on the same probes.
        dtype: of the merged weights.

    Raises:
        UserError: the distance is more than the rounding of the weights can make.
    """
    error = relative_distance(merged, live)
    if not error <= MERGE_ROUNDING[dtype_name(dtype)]:
        raise UserError(f"export: the merged model differs from the adapter by {error:.1e} of its logits")
    return error


def describe_merged(error: float, effect: float, *, dtype: torch.dtype) -> str:
    """Return one line about a merge, with the remedy where rounding takes away much of what was trained.

    Args:
        error: how far the merged model's logits are from the adapter's.
        effect: how far the adapter moves them.
        dtype: of the merged weights.
    """
    line = f"merged: logits differ from the adapter's by {error:.1e}, the adapter moves them by {effect:.1e}"
    if dtype_name(dtype) == "bfloat16" and 2 * error > effect:
        line += "; bfloat16 rounds much of that away, --no_bf16 merges in float32"
    return line
