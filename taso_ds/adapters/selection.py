"""From element importance to the core region of a weight matrix (method section 2).

1. ``S[i, j] = 1`` where the importance is in the top ``element_fraction`` (the paper's k) of the matrix.
2. ``u_row``/``u_col`` count the core elements of each row/column.
3. The core rows and columns are the top ``core_fraction`` (the paper's p) by count; ties go to the larger summed
   importance, then to the lower index, so every rank cuts the same region.

The counts are kept for a small ladder of element fractions: a region can be cut again without scoring again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

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
# Elements worked on at a time: what selection takes beside the importance stays small, however large the matrix.
_BLOCK_ELEMENTS = 1 << 18


def _row_blocks(importance: Tensor) -> tuple[Tensor, ...]:
    return importance.split(max(1, _BLOCK_ELEMENTS // importance.shape[1]))


def _bucket(values: Tensor) -> Tensor:
    """Return the upper 16 bits of non-negative fp32 values, which order like the values do."""
    return values.view(torch.int32) >> 16


def _at_or_above(importance: Tensor) -> Tensor:
    """Return how many elements lie in the highest bucket, the two highest, and so on."""
    histogram = torch.zeros(_NUM_BUCKETS, dtype=torch.int64, device=importance.device)
    for block in _row_blocks(importance):
        histogram += torch.bincount(_bucket(block).flatten(), minlength=_NUM_BUCKETS)
    return histogram.flip(0).cumsum(0)


def _kth_largest(blocks: Sequence[Tensor], above: Tensor, k: int) -> float:
    """Return the k-th largest value exactly: the histogram names its bucket, and only that bucket is sorted.

    Linear time, where ``topk`` sorts the whole tail.
    """
    place = int(torch.searchsorted(above, k))
    higher = int(above[place - 1]) if place else 0
    candidates = torch.cat([values[_bucket(values) == _NUM_BUCKETS - 1 - place] for values in blocks])
    return candidates.sort(descending=True).values[k - higher - 1].item()


def _core_positions(importance: Tensor, counts: Sequence[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield rows and columns of the ``counts[step]`` most important elements as ``(step, rows, cols)``, block by block.

    Ties go to the lower index.
    """
    above = _at_or_above(importance)
    lowest = _NUM_BUCKETS - 1 - int(torch.searchsorted(above, max(counts)))
    # What can matter at all, in index order: positions fit 32 bits up to two billion elements.
    values, positions, start = [], [], 0
    for block in _row_blocks(importance):
        flat = block.flatten()
        found = (_bucket(flat) >= lowest).nonzero().flatten()
        values.append(flat[found])
        positions.append((found + start).int() if importance.numel() < 1 << 31 else found + start)
        start += flat.numel()
    for step, count in enumerate(counts):
        threshold = _kth_largest(values, above, count)
        ties_left = count - sum(int((part > threshold).sum()) for part in values)
        for part, where in zip(values, positions, strict=True):
            chosen = part > threshold
            ties = (part == threshold).nonzero().flatten()[:ties_left]
            ties_left -= ties.numel()
            chosen[ties] = True
            core = where[chosen]
            yield step, core // importance.shape[1], core % importance.shape[1]


def core_elements(importance: Tensor, element_fraction: float) -> Tensor:
    """Return the boolean element mask ``S``: exactly ``share(element_fraction)`` elements, ties to the lower index."""
    mask = torch.zeros_like(importance, dtype=torch.bool)
    for _, rows, cols in _core_positions(importance, [share(element_fraction, importance.numel())]):
        mask[rows, cols] = True
    return mask


def score_rows_and_cols(importance: Tensor, ladder: Sequence[float]) -> RegionScores:
    """Count the core elements of every row and column of an fp32 ``(out_features, in_features)`` importance.

    Raises:
        FloatingPointError: when the importance holds NaN or infinity.
    """
    if not torch.isfinite(importance.amax()):  # NaN propagates
        raise FloatingPointError("importance is not finite")
    num_rows, num_cols = importance.shape
    zeros = partial(torch.zeros, device=importance.device)
    row_counts = zeros(len(ladder), num_rows, dtype=torch.int32)
    col_counts = zeros(len(ladder), num_cols, dtype=torch.int32)
    for step, rows, cols in _core_positions(importance, [share(fraction, importance.numel()) for fraction in ladder]):
        row_counts[step] += rows.bincount(minlength=num_rows)
        col_counts[step] += cols.bincount(minlength=num_cols)
    # Block by block, because a sum in another dtype first copies its input.
    row_importance = torch.cat([block.sum(1, dtype=torch.float64) for block in _row_blocks(importance)])
    col_importance = zeros(num_cols, dtype=torch.float64)
    for block in _row_blocks(importance):
        col_importance += block.sum(0, dtype=torch.float64)
    return RegionScores(
        ladder=tuple(ladder),
        row_counts=row_counts.cpu(),
        col_counts=col_counts.cpu(),
        row_importance=row_importance.float().cpu(),
        col_importance=col_importance.float().cpu(),
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
