"""An engine of plain torch, for tests of the loop without DeepSpeed."""

from typing import Any

import torch
from torch import Tensor, nn


class PlainEngine:
    """What the trainer uses of a DeepSpeed engine, on one process; like stage 0 in fp32 it keeps no gradient norm.

    Args:
        accumulation: micro-batches of a step.
        module: the model, where the loss needs one.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, accumulation: int, module: nn.Module | None = None) -> None:
        self.optimizer, self.accumulation = optimizer, accumulation
        self.module = nn.Module() if module is None else module
        self.micro_steps = 0
        self.rates: list[list[float]] = []

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.module(*args, **options)

    def train(self) -> None:
        self.module.train()

    def backward(self, loss: Tensor, *, scale_wrt_gas: bool) -> None:
        assert not scale_wrt_gas
        loss.backward()

    def step(self) -> None:
        self.micro_steps += 1
        if self.micro_steps % self.accumulation == 0:
            self.rates.append([group["lr"] for group in self.optimizer.param_groups])
            self.optimizer.step()
            self.optimizer.zero_grad()

    def zero_optimization_stage(self) -> int:
        return 0

    def get_global_grad_norm(self) -> None:
        return None
