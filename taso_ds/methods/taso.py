"""``--method taso``: the sparse adapter inside the core regions, and the files it leaves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from taso_ds.adapters.adapter import ADAPTER_MODULE, TasoAdapter
from taso_ds.adapters.compensation import parse_rho, pruned_share
from taso_ds.adapters.fused_experts import ExpertMatrix, fused_sizes
from taso_ds.adapters.peft_format import load_adapter, peft_config, save_adapter
from taso_ds.adapters.selection import CoreRegion
from taso_ds.adapters.targets import Targets, get_target, matrix_shape
from taso_ds.distributed import comm, zero
from taso_ds.errors import UserError
from taso_ds.files.atomic import replacing_folder
from taso_ds.methods.method import Count, Deltas, MethodSettings, adapter_groups, counted
from taso_ds.methods.peft_names import fuses_experts
from taso_ds.methods.task_head import head_modules, task_type
from taso_ds.models.load import BaseModel
from taso_ds.models.spec import BaseSpec
from taso_ds.training.optim import Group


@dataclass(frozen=True)
class Taso:
    """Trains the kept entries of low-rank pairs, at a rate that makes up for the pruned ones."""

    settings: MethodSettings

    needs_regions: ClassVar[bool] = True
    trains_base: ClassVar[bool] = False
    adapts_experts: ClassVar[bool] = True

    def count(self, base: BaseSpec, targets: Targets) -> Count:
        settings = self.settings
        trainable = self._trainable(targets)
        dense = targets.count_dense(settings.structure, rank=settings.rank)
        flat = counted(trainable, rank=settings.rank)
        rho = self._rho(trainable, dense)
        return Count(adapter_groups(settings.training, base, [flat], rho=rho), dense)

    def attach(self, base: BaseModel, targets: Targets, regions: Mapping[str, CoreRegion]) -> list[Group]:
        settings = self.settings
        adapter = TasoAdapter(
            regions,
            structure=settings.structure,
            rank=settings.rank,
            scaling=settings.scaling,
            seed=settings.seed,
            dtype=base.model.dtype,
        ).to(comm.device())
        adapter.attach(base.model)
        trainable = adapter.flat.numel()
        assert trainable == self._trainable(targets)
        rho = self._rho(trainable, targets.count_dense(settings.structure, rank=settings.rank))
        return adapter_groups(settings.training, base, [adapter.flat], rho=rho)

    def _trainable(self, targets: Targets) -> int:
        settings = self.settings
        return targets.count(settings.structure, rank=settings.rank, core_fraction=settings.core_fraction)

    def _rho(self, trainable: int, dense: int) -> float:
        """Return the pruned share that the learning rate makes up for."""
        return pruned_share(
            parse_rho(self.settings.rho),
            core_fraction=self.settings.core_fraction,
            num_trainable=trainable,
            num_dense=dense,
        )

    def save(self, folder: Path, base: BaseModel) -> None:
        """Write PEFT's files and the compact one."""
        model, head_parameters = base.model, base.head_parameters
        adapter = model.get_submodule(ADAPTER_MODULE)
        assert isinstance(adapter, TasoAdapter)
        flat = zero.full_copy(adapter.flat)
        head_tensors = {name: zero.full_copy(parameter) for name, parameter in head_parameters.items()}
        experts = fused_sizes(model, adapter.regions)
        config = peft_config(
            adapter,
            base_model_name_or_path=base.spec.name,
            task_type=task_type(head=bool(head_parameters)),
            module_names=[name for name, _ in model.named_modules()],
            fan_in_fan_out=_any_transposed(model, list(adapter.regions)),
            modules_to_save=head_modules(model, head_parameters),
            experts=list(experts),
            fuses_experts=fuses_experts(model),
        )

        def write() -> None:
            try:
                with replacing_folder(folder) as path:
                    save_adapter(path, adapter, flat, config=config, head=head_tensors, experts=experts)
            except FloatingPointError as error:
                raise UserError(f"export: {error}") from error

        comm.on_main(write)

    @staticmethod
    def open(folder: Path) -> "SavedTaso":
        return SavedTaso(*load_adapter(folder))


@dataclass(frozen=True, eq=False)
class SavedTaso:
    """TASO's adapter, built again from its compact file."""

    adapter: TasoAdapter
    head_tensors: Mapping[str, Tensor]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {name: (region.out_features, region.in_features) for name, region in self.adapter.regions.items()}

    def attach(self, model: nn.Module) -> None:
        self.adapter.to(comm.device(), cast(torch.dtype, model.dtype)).attach(model)

    def detach(self, model: nn.Module) -> Deltas:
        self.adapter.detach(model)
        return {name: partial(self.adapter.delta_weight, name) for name in self.adapter.regions}


def _any_transposed(model: nn.Module, names: Sequence[str]) -> bool:
    targets = [get_target(model, name) for name in names]
    shapes = [matrix_shape(target) for target in targets if not isinstance(target, ExpertMatrix)]
    return any(shape is not None and shape.transposed for shape in shapes)
