"""From element importance to the core region of a weight matrix (method section 2).

1. ``S[i, j] = 1`` where the importance is in the top ``element_fraction`` (the paper's k) of the matrix.
2. ``u_row``/``u_col`` count the core elements of each row/column.
3. The core rows and columns are the top ``core_fraction`` (the paper's p) by count; ties go to the larger summed
   importance, then to the lower index, so every rank cuts the same region.

The counts are kept for a small ladder of element fractions: a region can be cut again without scoring again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ELEMENT_FRACTION_LADDER = (0.01, 0.02, 0.05, 0.10, 0.20)


@dataclass(frozen=True, eq=False)
class CoreRegion:
    """The core rows and columns of one matrix: sorted int64 indices, and the shape they index."""

    rows: Tensor
    cols: Tensor
    out_features: int
    in_features: int


@dataclass(frozen=True, eq=False)
class RegionScores:
    """Everything needed to cut a region of one matrix at any core fraction and any element fraction of the ladder.

    Attributes:
        ladder: element fractions, ascending.
        row_counts: int32 ``(len(ladder), out_features)``, core elements per row.
        col_counts: int32 ``(len(ladder), in_features)``, core elements per column.
        row_importance: fp32 ``(out_features,)``, summed importance, the tie-break.
        col_importance: fp32 ``(in_features,)``.
    """

    ladder: tuple[float, ...]
    row_counts: Tensor
    col_counts: Tensor
    row_importance: Tensor
    col_importance: Tensor


def share(fraction: float, total: int) -> int:
    """Return how many of ``total`` a fraction selects: ``max(1, floor(fraction · total))``."""
    return max(1, int(fraction * total))


def ladder_with(element_fraction: float) -> tuple[float, ...]:
    """Return the ladder of element fractions with the one in use included."""
    return tuple(sorted({*ELEMENT_FRACTION_LADDER, element_fraction}))


def _kth_largest(values: Tensor, ks: Sequence[int]) -> list[float]:
    """Return the k-th largest of non-negative fp32 ``values`` for each k, exactly.

    Non-negative floats order like their bits, so a histogram of the upper 16 bits finds the bucket and only that
    bucket is sorted: linear time, where ``topk`` sorts the whole tail.
    """
    bits = values.flatten().view(torch.int32)
    bucket = bits >> 16
    above = torch.bincount(bucket, minlength=1 << 15).flip(0).cumsum(0)  # elements in this bucket or a higher one
    thresholds = []
    for k in ks:
        position = int(torch.searchsorted(above, k))
        higher = int(above[position - 1]) if position else 0
        candidates = bits[bucket == (1 << 15) - 1 - position].sort(descending=True).values
        thresholds.append(candidates[k - higher - 1 : k - higher].view(torch.float32).item())
    return thresholds


def core_elements(importance: Tensor, element_fraction: float) -> Tensor:
    """Return the boolean element mask ``S``: exactly ``share(element_fraction)`` elements, ties to the lower index."""
    count = share(element_fraction, importance.numel())
    return _mask_above(importance, _kth_largest(importance, [count])[0], count)


def _mask_above(importance: Tensor, threshold: float, count: int) -> Tensor:
    mask = importance > threshold
    missing = count - int(mask.sum())
    ties = (importance.flatten() == threshold).nonzero().flatten()[:missing]
    mask.view(-1)[ties] = True
    return mask


def score_rows_and_cols(importance: Tensor, ladder: Sequence[float]) -> RegionScores:
    """Count the core elements of every row and column of an fp32 ``(out_features, in_features)`` importance.

    Raises:
        FloatingPointError: when the importance holds NaN or infinity.
    """
    if not torch.isfinite(importance).all():
        raise FloatingPointError("importance is not finite")
    importance = importance.contiguous()
    counts = [share(fraction, importance.numel()) for fraction in ladder]
    masks = [
        _mask_above(importance, threshold, count)
        for threshold, count in zip(_kth_largest(importance, counts), counts, strict=True)
    ]
    return RegionScores(
        ladder=tuple(ladder),
        row_counts=torch.stack([mask.sum(1, dtype=torch.int32) for mask in masks]).cpu(),
        col_counts=torch.stack([mask.sum(0, dtype=torch.int32) for mask in masks]).cpu(),
        row_importance=importance.sum(1, dtype=torch.float64).float().cpu(),
        col_importance=importance.sum(0, dtype=torch.float64).float().cpu(),
    )


def _top(counts: Tensor, importance: Tensor, number: int) -> Tensor:
    """Return the sorted indices of the ``number`` best by count, then importance, then lower index."""
    order = torch.argsort(importance, descending=True, stable=True)
    order = order[torch.argsort(counts[order], descending=True, stable=True)]
    return order[:number].sort().values


def cut_region(scores: RegionScores, *, element_fraction: float, core_fraction: float) -> CoreRegion:
    """Cut the core region out of the row and column scores.

    Raises:
        KeyError: when ``element_fraction`` is not on the ladder the scores were made for.
    """
    if element_fraction not in scores.ladder:
        raise KeyError(element_fraction)
    step = scores.ladder.index(element_fraction)
    out_features, in_features = scores.row_counts.shape[1], scores.col_counts.shape[1]
    return CoreRegion(
        rows=_top(scores.row_counts[step], scores.row_importance, share(core_fraction, out_features)),
        cols=_top(scores.col_counts[step], scores.col_importance, share(core_fraction, in_features)),
        out_features=out_features,
        in_features=in_features,
    )


def select_core_region(importance: Tensor, *, element_fraction: float, core_fraction: float) -> CoreRegion:
    """Select the core region of one matrix from its element importance (method section 2, steps 1-3)."""
    scores = score_rows_and_cols(importance, [element_fraction])
    return cut_region(scores, element_fraction=element_fraction, core_fraction=core_fraction)


def concentration(scores: RegionScores, region: CoreRegion, element_fraction: float) -> tuple[float, float]:
    """Return the shares of the core elements that lie in the core rows and in the core columns.

    Importance that does not concentrate leaves both near ``core_fraction``, a failure sign of the method (section 2).
    """
    step = scores.ladder.index(element_fraction)
    rows, cols = scores.row_counts[step], scores.col_counts[step]
    total = float(rows.sum())
    return float(rows[region.rows].sum()) / total, float(cols[region.cols].sum()) / total
