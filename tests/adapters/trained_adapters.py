"""Adapters with something in them, and what a few steps make of one."""

from typing import Any

import torch
from torch import Tensor

from taso_ds.adapters.adapter import TasoAdapter
from taso_ds.adapters.selection import CoreRegion, cut_region, score_rows_and_cols, share
from taso_ds.adapters.targets import find_targets


def select_core_region(importance: Tensor, *, element_fraction: float, core_fraction: float) -> CoreRegion:
    scores = score_rows_and_cols(importance, [element_fraction])
    return cut_region(scores, element_fraction=element_fraction, core_fraction=core_fraction)


def trained_adapter(
    model: Any, targets: list[str] | None = None, *, experts: bool = False, **changes: Any
) -> TasoAdapter:
    """An adapter on 30 % of the rows and columns of linears and experts, with random values everywhere."""
    generator = torch.Generator().manual_seed(1)
    regions = {}
    for name, shape in find_targets(model, targets, experts=experts).shapes.items():
        rows, cols = (
            torch.randperm(size, generator=generator)[: share(0.3, size)].sort().values
            for size in (shape.out_features, shape.in_features)
        )
        regions[name] = CoreRegion(rows, cols, shape.out_features, shape.in_features)
    options: dict[str, Any] = {"structure": "union", "rank": 1, "scaling": 1.0, "seed": 0, "dtype": torch.float32}
    adapter = TasoAdapter(regions, **(options | changes))
    with torch.no_grad():
        adapter.flat.copy_(0.2 * torch.randn(adapter.flat.shape, generator=generator))
    return adapter


def losses_of_steps(model: Any, adapter: TasoAdapter, batch: dict[str, Tensor], *, steps: int = 30) -> list[float]:
    """Train the attached adapter on one batch."""
    optimizer = torch.optim.AdamW([adapter.flat], lr=0.01, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
