"""Who trains at which rate: parameter groups with the compensated rate, and the schedule as a function of the step.

The schedule multiplies every group's peak, so the ratio between groups, which is TASO's compensation, never changes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import nn

from taso_ds.adapters.compensation import learning_rate_factor
from taso_ds.distributed import zero
from taso_ds.training.arguments import TrainArguments


@dataclass(frozen=True, eq=False)
class Group:
    """Parameters trained at one rate.

    Attributes:
        rho: pruned share the rate is compensated for; 0 where nothing is pruned.
        factor: ``√(1 / (1 − rho))``.
        peak: ``learning_rate · factor``.
    """

    name: str
    parameters: Sequence[nn.Parameter]
    rho: float
    factor: float
    peak: float
    weight_decay: float


@dataclass(frozen=True)
class Schedule:
    """Share of the peak learning rate at each 0-based step.

    Rises linearly over the warm-up, whose last step is at the peak, then follows ``kind``; no step runs at zero.
    """

    kind: str
    total_steps: int
    warmup_steps: int

    def __call__(self, step: int) -> float:
        if self.kind == "constant":
            return 1.0
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.kind == "constant_with_warmup":
            return 1.0
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        if self.kind == "linear":
            return 1.0 - progress
        return 0.5 * (1.0 + math.cos(math.pi * progress))


def make_schedule(training: TrainArguments, total_steps: int) -> Schedule:
    return Schedule(training.lr_scheduler_type, total_steps, math.ceil(training.warmup_ratio * total_steps))


def total_steps(training: TrainArguments, steps_per_epoch: int) -> int:
    """Return the number of steps of a run."""
    if training.max_steps > 0:
        return training.max_steps
    return max(1, math.ceil(training.num_train_epochs * steps_per_epoch))


class GroupRow(TypedDict):
    """One group in ``run.json``: its size, and its learning rate at the first step, at the peak and at the last."""

    group: str
    parameters: int
    rho: float
    factor: float
    first: float
    peak: float
    last: float
    weight_decay: float


def learning_rate_table(groups: Sequence[Group], schedule: Schedule) -> list[GroupRow]:
    """Return first, peak and last learning rate of every group, with its ρ and factor."""
    highest = schedule(max(0, schedule.warmup_steps - 1))
    return [
        {
            "group": group.name,
            "parameters": sum(zero.full_numel(value) for value in group.parameters),
            "rho": group.rho,
            "factor": group.factor,
            "first": group.peak * schedule(0),
            "peak": group.peak * highest,
            "last": group.peak * schedule(schedule.total_steps - 1),
            "weight_decay": group.weight_decay,
        }
        for group in groups
    ]


def describe_groups(table: Sequence[GroupRow]) -> list[str]:
    """Return one line per group of a learning-rate table."""
    return [
        f"group {row['group']}: {row['parameters']:,} parameters, rho {row['rho']:.4f}, factor {row['factor']:.4f},"
        f" learning rate first {row['first']:.3e}, peak {row['peak']:.3e}, last {row['last']:.3e}"
        for row in table
    ]


def make_optimizer(groups: Sequence[Group], training: TrainArguments) -> torch.optim.AdamW:
    """Return AdamW over the groups, in their order."""
    return torch.optim.AdamW(
        [
            {"params": list(group.parameters), "lr": group.peak, "weight_decay": group.weight_decay, "name": group.name}
            for group in groups
        ],
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
    )


def make_group(
    training: TrainArguments,
    name: str,
    parameters: Sequence[nn.Parameter],
    *,
    rho: float = 0.0,
    decays: bool = True,
) -> Group:
    """Return a group at the run's learning rate, compensated for the pruned share ``rho``.

    Args:
        decays: whether the run's weight decay applies.
    """
    factor = learning_rate_factor(rho)
    decay = training.weight_decay if decays else 0.0
    return Group(name, list(parameters), rho, factor, training.learning_rate * factor, decay)
