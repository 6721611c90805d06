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


_NUM_BUCKETS = 1 << 15


def _at_or_above(bucket: Tensor) -> Tensor:
    """Return how many elements lie in the highest bucket, the two highest, and so on."""
    return torch.bincount(bucket, minlength=_NUM_BUCKETS).flip(0).cumsum(0)


def _kth_largest(values: Tensor, ks: Sequence[int]) -> list[float]:
    """Return the k-th largest of non-negative fp32 ``values`` for each k, exactly.

    Non-negative floats order like their bits, so a histogram of the upper 16 bits finds the bucket and only that
    bucket is sorted: linear time, where ``topk`` sorts the whole tail.
    """
    bits = values.view(torch.int32)
    bucket = bits >> 16
    above = _at_or_above(bucket)
    thresholds = []
    for k in ks:
        position = int(torch.searchsorted(above, k))
        higher = int(above[position - 1]) if position else 0
        candidates = bits[bucket == _NUM_BUCKETS - 1 - position].sort(descending=True).values
        thresholds.append(candidates[k - higher - 1 : k - higher].view(torch.float32).item())
    return thresholds


def core_elements(importance: Tensor, element_fraction: float) -> Tensor:
    """Return the boolean element mask ``S``: exactly ``share(element_fraction)`` elements, ties to the lower index."""
    mask = torch.zeros_like(importance, dtype=torch.bool)
    ((rows, cols),) = _core_positions(importance, [share(element_fraction, importance.numel())])
    mask[rows, cols] = True
    return mask


def _core_positions(importance: Tensor, counts: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Return rows and columns of the ``count`` most important elements, for each count; ties go to the lower index."""
    values = importance.flatten()
    # One histogram of the whole matrix leaves the part that can matter, in index order.
    bucket = values.view(torch.int32) >> 16
    lowest = _NUM_BUCKETS - 1 - int(torch.searchsorted(_at_or_above(bucket), max(counts)))
    positions = (bucket >= lowest).nonzero().flatten()
    values = values[positions]
    thresholds = _kth_largest(values, counts)
    rows, cols = positions // importance.shape[1], positions % importance.shape[1]
    found = []
    for threshold, count in zip(thresholds, counts, strict=True):
        chosen = values > threshold
        ties = (values == threshold).nonzero().flatten()
        chosen[ties[: count - int(chosen.sum())]] = True
        found.append((rows[chosen], cols[chosen]))
    return found


def score_rows_and_cols(importance: Tensor, ladder: Sequence[float]) -> RegionScores:
    """Count the core elements of every row and column of an fp32 ``(out_features, in_features)`` importance.

    Raises:
        FloatingPointError: when the importance holds NaN or infinity.
    """
    if not torch.isfinite(importance.amax()):  # NaN propagates
        raise FloatingPointError("importance is not finite")
    num_rows, num_cols = importance.shape
    core = _core_positions(importance, [share(fraction, importance.numel()) for fraction in ladder])
    return RegionScores(
        ladder=tuple(ladder),
        row_counts=torch.stack([rows.bincount(minlength=num_rows).int() for rows, _ in core]).cpu(),
        col_counts=torch.stack([cols.bincount(minlength=num_cols).int() for _, cols in core]).cpu(),
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
