"""What a run trains: the protocol of ``--method``, and what every method builds upon.

A new method is one class in a file of this room and one entry of ``table.METHODS``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from taso_ds.adapters.selection import CoreRegion
from taso_ds.adapters.targets import Targets
from taso_ds.errors import UserError
from taso_ds.methods.folders import ADAPTER, MODEL
from taso_ds.models.load import BaseModel
from taso_ds.models.spec import BaseSpec
from taso_ds.training.arguments import TrainArguments
from taso_ds.training.optim import Group, make_group

# By matrix, a function that returns its ΔW: (out_features, in_features), in fp32.
Deltas = Mapping[str, Callable[[], Tensor]]


@dataclass(frozen=True)
class MethodSettings:
    """The run's numbers that a method may use.

    Attributes:
        scaling: ``s`` in ``W + s · B A``.
        rho: the pruned share for the learning rate, as the flag says it.
        core_fraction: ``p``, the share of rows and of columns in a core region.
        training: the peak learning rate and the weight decay.
    """

    structure: str
    rank: int
    scaling: float
    rho: str
    core_fraction: float
    seed: int
    training: TrainArguments


@dataclass(frozen=True, eq=False)
class Count:
    """What a method would train on a base, known before there are weights.

    Attributes:
        groups: the groups as ``attach`` returns them, in its order; parameters may lie on the meta device.
        dense: how many numbers each forward expands the adapter to; 0 where it expands nothing.
    """

    groups: list[Group]
    dense: int = 0

    @property
    def trainable(self) -> int:
        return sum(parameter.numel() for group in self.groups for parameter in group.parameters)


class SavedAdapter(Protocol):
    """An adapter as its files hold it."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """The adapted matrices by name: ``(out_features, in_features)``."""

    @property
    def head_tensors(self) -> Mapping[str, Tensor]:
        """The trained task head by parameter name."""

    def attach(self, model: nn.Module) -> None:
        """Make a loaded base, which may be partitioned, compute with the adapter, in the base's dtype."""

    def detach(self, model: nn.Module) -> Deltas:
        """Undo ``attach``; returns what the adapter adds to each matrix."""


class Method(Protocol):
    """What is trained, how it is saved, and how it is opened again.

    Attributes:
        needs_regions: whether it trains inside core regions, which are scored or read first.
        trains_base: whether it trains the base's own weights: the run then leaves a model in place of an adapter.
        adapts_experts: whether it takes in experts that lie in fused parameters.
    """

    needs_regions: ClassVar[bool]
    trains_base: ClassVar[bool]
    adapts_experts: ClassVar[bool]

    def __init__(self, settings: MethodSettings) -> None: ...

    def count(self, base: BaseSpec, targets: Targets) -> Count:
        """Return what ``attach`` would train.

        Args:
            base: the base without weights.
            targets: the matrices to adapt.
        """

    def attach(self, base: BaseModel, targets: Targets, regions: Mapping[str, CoreRegion]) -> list[Group]:
        """Add the method's trainable parameters to the frozen base; returns the groups that train, its head among them.

        Args:
            base: frozen but for its head; changed.
            targets: the matrices to adapt.
            regions: their core regions; empty where the method needs none.
        """

    def save(self, folder: Path, base: BaseModel) -> None:
        """Write what ``attach`` added to ``folder``, whole or not at all. A collective; rank 0 writes.

        Raises:
            UserError: on every rank, when it was never trained or cannot be written.
        """

    @staticmethod
    def open(folder: Path) -> SavedAdapter | None:
        """Read what ``save`` wrote; None where that is a model of its own.

        Raises:
            UserError: missing, damaged or inconsistent files.
        """


def folder_name(method: type[Method] | Method) -> str:
    """Return the name of the folder in a run that holds what the method trained."""
    return MODEL if method.trains_base else ADAPTER


def adapter_groups(
    training: TrainArguments, base: BaseModel | BaseSpec, parameters: Sequence[nn.Parameter], *, rho: float = 0.0
) -> list[Group]:
    """Return the group of an adapter at the compensated rate and, if the base has a head, its group at the base rate.

    Args:
        training: the base rate and the weight decay.
        parameters: of the adapter.
        rho: the pruned share that the rate makes up for.
    """
    groups = [
        make_group(training, "adapter", parameters, rho=rho),
        make_group(training, "head", list(base.head_parameters.values())),
    ]
    return [group for group in groups if group.parameters]


def counted(number: int, *, rank: int) -> nn.Parameter:
    """Return a parameter of ``number`` elements that takes no memory.

    Raises:
        UserError: a tensor cannot have so many elements.
    """
    if number >= 2**63:
        raise UserError(f"rank: {rank} makes {number:,} parameters, more than a tensor can have: lower it")
    return nn.Parameter(torch.empty(1, device="meta").expand(number))
