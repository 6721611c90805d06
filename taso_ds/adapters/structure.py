"""Sparse structures as data: where ΔW of one matrix may be non-zero, and how its compact parameters are laid out.

A structure is a list of branches; each branch is one low-rank pair ``B A`` whose ``B`` keeps either the core rows or
all rows and whose ``A`` keeps either the core columns or all columns (method section 3). All branches of a matrix are
stacked into one dense pair ``A (R, in)``, ``B (out, R)`` with ``R = rank · branches``, of which only the kept entries
are parameters. ``compact -> dense`` is therefore one list of positions, and nothing else depends on the structure.
"""

import torch
from torch import Tensor

from taso_ds.adapters.choices import STRUCTURES
from taso_ds.adapters.selection import CoreRegion, share


def dense_rank(structure: str, rank: int) -> int:
    """Return ``R``, the rank of the dense pair that holds every branch."""
    return rank * len(STRUCTURES[structure])


def count_parameters(structure: str, *, out_features: int, in_features: int, rank: int, core_fraction: float) -> int:
    """Return the trainable parameters of one matrix; needs shapes only, no region.

    Args:
        rank: of each branch.
        core_fraction: ``p``, the share of rows and of columns in the core region.
    """
    rows, cols = share(core_fraction, out_features), share(core_fraction, in_features)
    return rank * sum(
        (rows if branch.core_rows else out_features) + (cols if branch.core_cols else in_features)
        for branch in STRUCTURES[structure]
    )


def count_dense(structure: str, *, out_features: int, in_features: int, rank: int) -> int:
    """Return the entries of the dense pair, pruned ones included.

    Args:
        rank: of each branch.
    """
    return dense_rank(structure, rank) * (out_features + in_features)


def dense_positions(structure: str, region: CoreRegion, rank: int) -> Tensor:
    """Return the int64 positions of the compact parameters in the flattened dense pair ``[A (R, in), B (out, R)]``.

    Compact order: for each branch its ``A`` (rank × kept columns), then its ``B`` (kept rows × rank).

    Args:
        rank: of each branch.
    """
    total_rank = dense_rank(structure, rank)
    start_of_b = total_rank * region.in_features
    parts = []
    for number, branch in enumerate(STRUCTURES[structure]):
        rows = region.rows if branch.core_rows else torch.arange(region.out_features)
        cols = region.cols if branch.core_cols else torch.arange(region.in_features)
        ranks = torch.arange(number * rank, (number + 1) * rank)
        parts.append((ranks[:, None] * region.in_features + cols[None, :]).flatten())
        parts.append((start_of_b + rows[:, None] * total_rank + ranks[None, :]).flatten())
    return torch.cat(parts)
