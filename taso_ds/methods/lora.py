"""``--method lora``, the baseline: the peft library's own layers in the same loop, read back from PEFT's files."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor, nn

from taso_ds.adapters.peft_format import PEFT_CONFIG_FILE, PEFT_FILE, peft_targets
from taso_ds.adapters.selection import CoreRegion
from taso_ds.adapters.targets import Targets, get_target, matrix_shape
from taso_ds.distributed import comm, zero
from taso_ds.errors import UserError
from taso_ds.files.atomic import replacing_folder, write_json
from taso_ds.files.json_text import parse_json
from taso_ds.files.tensors import read_tensors, write_tensors
from taso_ds.methods.method import Count, Deltas, MethodSettings, adapter_groups, counted
from taso_ds.methods.peft_names import fuses_experts
from taso_ds.methods.task_head import head_modules, task_type
from taso_ds.models.load import BaseModel
from taso_ds.models.spec import BaseSpec
from taso_ds.training.optim import Group

if TYPE_CHECKING:  # peft loads when a LoRA is made
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

KIND = "peft_lora"
_ADAPTER = "default"
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Lora:
    """Trains PEFT's LoRA on whole matrices."""

    settings: MethodSettings

    needs_regions: ClassVar[bool] = False
    trains_base: ClassVar[bool] = False
    adapts_experts: ClassVar[bool] = False

    def count(self, base: BaseSpec, targets: Targets) -> Count:
        rank = self.settings.rank
        return Count(adapter_groups(self.settings.training, base, [counted(rank * targets.edges, rank=rank)]))

    def attach(self, base: BaseModel, targets: Targets, regions: Mapping[str, CoreRegion]) -> list[Group]:
        torch.manual_seed(self.settings.seed)
        attach_lora(
            base.model,
            list(targets),
            rank=self.settings.rank,
            scaling=self.settings.scaling,
            transposed=targets.any_transposed,
        )
        return adapter_groups(self.settings.training, base, list(lora_parameters(base.model).values()))

    def save(self, folder: Path, base: BaseModel) -> None:
        """Write PEFT's files."""
        model, head_parameters = base.model, base.head_parameters
        tensors = lora_tensors(lora_parameters(model))
        tensors |= {f"{_PREFIX}{name}": zero.full_copy(parameter) for name, parameter in head_parameters.items()}
        config = _config_of(model)
        settings = config.to_dict()
        modules = [name for name, _ in model.named_modules()]
        settings |= peft_targets(sorted(config.target_modules or ()), modules, fuses_experts=fuses_experts(model))
        settings |= {
            "base_model_name_or_path": base.spec.name,
            "task_type": task_type(head=bool(head_parameters)),
            "modules_to_save": head_modules(model, head_parameters) or None,
            "inference_mode": True,
            "peft_type": "LORA",
        }

        def write() -> None:
            if not any(bool(tensor.any()) for name, tensor in tensors.items() if ".lora_B." in name):
                raise UserError("export: every lora_B of the adapter is zero: nothing was trained")
            with replacing_folder(folder) as path:
                write_tensors(path / PEFT_FILE, tensors, {"kind": KIND})
                write_json(path / PEFT_CONFIG_FILE, settings)

        comm.on_main(write)

    @staticmethod
    def open(folder: Path) -> "LoraFiles":
        return read_lora(folder)


def attach_lora(model: nn.Module, targets: Sequence[str], *, rank: int, scaling: float, transposed: bool) -> None:
    """Put PEFT's LoRA on the targets, in place and in the model's dtype. A head that was trainable stays trainable.

    Args:
        targets: names of the linears.
        scaling: ``lora_alpha / r``.
        transposed: whether the linears store ``(in_features, out_features)``, as GPT-2's do.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=rank,
        lora_alpha=rank * scaling,  # type: ignore[arg-type]
        target_modules=list(targets),
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=transposed,
    )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # PEFT freezes what is not its own. For models of some types it takes other targets, so it sees a module of no type.
    inject_adapter_in_model(config, nn.ModuleDict({"model": model}), adapter_name=_ADAPTER)
    model.peft_config = {_ADAPTER: config}  # type: ignore[assignment]  # PEFT keeps it there in its own models
    for parameter in trainable:
        parameter.requires_grad_(True)
    for parameter in lora_parameters(model).values():
        parameter.data = parameter.data.to(model.dtype)  # type: ignore[arg-type]


def _config_of(model: nn.Module) -> "LoraConfig":
    """Return the PEFT configuration that ``attach_lora`` used."""
    configs = cast("Mapping[str, LoraConfig]", model.peft_config)
    return configs[_ADAPTER]


def detach_lora(model: nn.Module, targets: Sequence[str]) -> None:
    """Undo ``attach_lora``: the model has its own modules again."""
    for name in targets:
        layer = cast("LoraLayer", model.get_submodule(name))
        model.set_submodule(name, layer.get_base_layer())
    del model.peft_config


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return PEFT's trainable tensors by parameter name."""
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}


def lora_tensors(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the gathered tensors under the names of PEFT's file. A collective."""
    return {_stored_name(name): zero.full_copy(parameter) for name, parameter in parameters.items()}


def _stored_name(parameter: str) -> str:
    return _PREFIX + parameter.replace(f".{_ADAPTER}.", ".")


@dataclass(frozen=True, eq=False)
class LoraFiles:
    """What the files of a LoRA hold.

    Attributes:
        tensors: by name in the file: ``….lora_A.weight (rank, in)``, ``….lora_B.weight (out, rank)``, and the head's.
        scaling: ``lora_alpha / r``.
    """

    tensors: Mapping[str, Tensor]
    rank: int
    scaling: float

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The adapted matrices by name: ``(out_features, in_features)``."""
        return {name: (self._of(name, _B).shape[0], self._of(name, _A).shape[1]) for name in self._names}

    @property
    def head_tensors(self) -> dict[str, Tensor]:
        """The tensors of the task head by parameter name."""
        return {
            name.removeprefix(_PREFIX): tensor for name, tensor in self.tensors.items() if not name.endswith((_A, _B))
        }

    @property
    def _names(self) -> list[str]:
        return [name.removeprefix(_PREFIX).removesuffix(_A) for name in self.tensors if name.endswith(_A)]

    def _of(self, name: str, side: str) -> Tensor:
        return self.tensors[f"{_PREFIX}{name}{side}"]

    def check(self) -> None:
        """Raise ValueError or KeyError when the tensors are no pairs of this rank."""
        for name in self._names:
            A, B = self._of(name, _A), self._of(name, _B)
            if A.ndim != 2 or B.ndim != 2 or A.shape[0] != self.rank or B.shape[1] != self.rank:
                raise ValueError(f"{name} is {tuple(A.shape)} and {tuple(B.shape)} at rank {self.rank}")
        alone = {name for name in self.tensors if name.endswith(_B)} - {f"{_PREFIX}{name}{_B}" for name in self._names}
        if alone or not self._names:
            raise ValueError(f"no lora_A for {min(alone)}" if alone else "no lora_A")
        if not all(tensor.is_floating_point() for tensor in self.tensors.values()):
            raise ValueError("values that are no floating-point numbers")

    def attach(self, model: nn.Module) -> None:
        """Make ``model``, which may be partitioned, compute with the LoRA, in the model's dtype."""
        shapes = [matrix_shape(get_target(model, name)) for name in self._names]
        transposed = any(shape is not None and shape.transposed for shape in shapes)
        attach_lora(model, self._names, rank=self.rank, scaling=self.scaling, transposed=transposed)
        for name, parameter in lora_parameters(model).items():
            zero.assign(parameter, self.tensors[_stored_name(name)])

    def detach(self, model: nn.Module) -> Deltas:
        """Undo ``attach``; returns what gives ``ΔW`` of each matrix, in fp32."""
        detach_lora(model, self._names)
        dtype = cast(torch.dtype, model.dtype)
        return {name: partial(self._delta_weight, name, dtype) for name in self._names}

    def _delta_weight(self, name: str, dtype: torch.dtype) -> Tensor:
        A, B = (self._of(name, side).to(dtype).float() for side in (_A, _B))
        return self.scaling * (B @ A)


def read_lora(folder: Path) -> LoraFiles:
    """Read an ``adapter/`` that ``--method lora`` wrote.

    Raises:
        UserError: missing, damaged or inconsistent files.
    """
    tensors, _ = read_tensors(folder / PEFT_FILE, kind=KIND)
    file = folder / PEFT_CONFIG_FILE
    try:
        settings = parse_json(file.read_text(encoding="utf-8"), str(file))
        rank, alpha = settings["r"], settings["lora_alpha"]
        if type(rank) is not int or type(alpha) not in (int, float) or rank <= 0 or not math.isfinite(alpha):
            raise ValueError(f"r {rank!r}, lora_alpha {alpha!r}")
        files = LoraFiles(tensors, rank, alpha / rank)
        files.check()
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: incomplete or inconsistent ({error}): copy it again") from error
    return files
