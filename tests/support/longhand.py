"""The method written out in the simplest way, which the quick one is compared with."""

import torch
from torch import Tensor


def region(importance: Tensor, *, element_fraction: float, core_fraction: float) -> tuple[list[int], list[int]]:
    """Method section 2 by sorting: the top elements, then rows and columns by count, sum and index."""
    order = importance.flatten().sort(descending=True, stable=True).indices
    core = torch.zeros(importance.numel(), dtype=torch.bool)
    core[order[: int(element_fraction * importance.numel())]] = True
    core = core.view_as(importance)

    def top(dim: int) -> list[int]:
        counts, sums = core.sum(dim).tolist(), importance.double().sum(dim).tolist()
        best = sorted(range(len(counts)), key=lambda index: (-counts[index], -sums[index], index))
        return sorted(best[: max(1, int(core_fraction * len(counts)))])

    return top(1), top(0)
