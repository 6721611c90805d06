"""``--method full``, the baseline that trains every weight: plain fine-tuning, and the model it leaves."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from torch import Tensor, nn

from taso_ds.adapters.selection import CoreRegion
from taso_ds.adapters.targets import Targets
from taso_ds.distributed import comm, zero
from taso_ds.errors import UserError
from taso_ds.files.atomic import replacing_folder
from taso_ds.methods.disk_tensors import DiskTensors
from taso_ds.methods.method import Count, MethodSettings
from taso_ds.models.load import BaseModel
from taso_ds.models.spec import BaseSpec
from taso_ds.training.optim import Group, make_group

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FILE_SIZE = "2GB"


@dataclass(frozen=True)
class Full:
    """Trains all weights at the base rate; vectors (norms, biases) without weight decay."""

    settings: MethodSettings

    needs_regions: ClassVar[bool] = False
    trains_base: ClassVar[bool] = True
    adapts_experts: ClassVar[bool] = False

    def count(self, base: BaseSpec, targets: Targets) -> Count:
        return Count(self._groups(base.meta, base.head_parameters))

    def attach(self, base: BaseModel, targets: Targets, regions: Mapping[str, CoreRegion]) -> list[Group]:
        base.model.requires_grad_(True)
        return self._groups(base.model, base.head_parameters)

    def _groups(self, model: nn.Module, head_parameters: Mapping[str, nn.Parameter]) -> list[Group]:
        in_head = {id(parameter) for parameter in head_parameters.values()}
        matrices: list[nn.Parameter] = []
        vectors: list[nn.Parameter] = []
        for parameter in model.parameters():
            if id(parameter) not in in_head:
                (vectors if _is_vector(parameter) else matrices).append(parameter)
        make = partial(make_group, self.settings.training)
        groups = [
            make("head", list(head_parameters.values())),
            make("weights", matrices),
            make("norms_and_biases", vectors, decays=False),
        ]
        return [group for group in groups if group.parameters]

    def save(self, folder: Path, base: BaseModel) -> None:
        """Write a plain Hugging Face model. The weights go through rank 0 to its disk one by one."""
        model = base.model
        with DiskTensors(folder.parent) as disk:
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
            comm.on_main(lambda: save_model(folder, model, state, base.spec.tokenizer))

    @staticmethod
    def open(folder: Path) -> None:
        return None


class SavableTokenizer(Protocol):
    """What is saved beside a model."""

    def save_pretrained(self, folder: Path, /) -> object: ...


def save_model(folder: Path, model: "PreTrainedModel", state: dict[str, Tensor], tokenizer: SavableTokenizer) -> None:
    """Write a Hugging Face model, with the tensors of one file in memory at a time.

    Args:
        folder: replaced whole, or not at all.
        model: gives the configuration and the names.
        state: the tensors by name, which may lie on disk.
        tokenizer: saved beside the model.

    Raises:
        UserError: the tokenizer has chat templates whose names would lead out of the folder.
    """
    with replacing_folder(folder) as path:
        model.save_pretrained(path, state_dict=state, max_shard_size=_FILE_SIZE)
        try:
            tokenizer.save_pretrained(path)
        except ValueError as error:
            raise UserError(f"{folder.name}: cannot save the tokenizer: {error}") from error


def _is_vector(parameter: nn.Parameter) -> bool:
    shape = zero.full_shape(parameter)
    return shape.numel() == max(shape, default=1)
