"""From element importance to the core region of a weight matrix (method section 2).

1. ``S[i, j] = 1`` where the importance is in the top ``element_fraction`` (the paper's k) of the matrix.
2. ``u_row``/``u_col`` count the core elements of each row/column.
3. The core rows and columns are the top ``core_fraction`` (the paper's p) by count; ties go to the larger summed
   importance, then to the lower index, so every rank cuts the same region.

The counts are kept for a small ladder of element fractions: a region can be cut again without scoring again.
"""

from collections.abc import Sequence
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


# A bucket holds the elements that agree in the upper 16 bits.
_BUCKET_BITS = 16
_NUM_BUCKETS = 1 << 15
# Elements worked on at a time: what selection takes beside the importance stays small, however large the matrix.
_BLOCK_ELEMENTS = 1 << 18


def _row_blocks(matrix: Tensor) -> tuple[Tensor, ...]:
    return matrix.split(_rows_per_block(matrix))


def _rows_per_block(matrix: Tensor) -> int:
    return max(1, _BLOCK_ELEMENTS // matrix.shape[1])


def _block_buffer(bits: Tensor) -> Tensor:
    """Return room for a block, used for all of them: memory that was touched before is several times as fast."""
    return torch.empty(_rows_per_block(bits), bits.shape[1], dtype=torch.int32, device=bits.device)


def _order_bits(importance: Tensor) -> Tensor:
    """Return non-negative fp32 values as int32, which orders like they do, subnormal ones included."""
    return importance.view(torch.int32)


@dataclass(frozen=True)
class _Boundary:
    """Where the ``k`` largest elements end: all from ``upper`` on belong to them, and ``wanted`` of the bucket below.

    Attributes:
        lower: the least value of that bucket, which holds the k-th largest element.
        upper: the least value of the next bucket.
    """

    lower: int
    upper: int
    wanted: int


def _boundaries(bits: Tensor, counts: Sequence[int]) -> list[_Boundary]:
    """Return the boundary of the ``k`` largest elements for each ``k`` of ``counts``."""
    histogram = torch.zeros(_NUM_BUCKETS, dtype=torch.int64, device=bits.device)
    for block in _row_blocks(bits):
        histogram += torch.bincount((block >> _BUCKET_BITS).flatten(), minlength=_NUM_BUCKETS)
    # How many elements lie in the highest bucket, the two highest, and so on.
    at_or_above = histogram.flip(0).cumsum(0).cpu()
    boundaries = []
    for count in counts:
        place = int(torch.searchsorted(at_or_above, count))
        higher = int(at_or_above[place - 1]) if place else 0
        bucket = _NUM_BUCKETS - 1 - place
        boundaries.append(_Boundary(bucket << _BUCKET_BITS, (bucket + 1) << _BUCKET_BITS, count - higher))
    return boundaries


def _add_from_upper(bits: Tensor, boundary: _Boundary, rows: Tensor, cols: Tensor) -> None:
    """Add the elements from ``upper`` on to the counts of their rows and columns.

    Comparing int32 into int32 and summing that is twice as fast as summing booleans.
    """
    buffer = _block_buffer(bits)
    for block, row_counts in zip(_row_blocks(bits), rows.split(_rows_per_block(bits)), strict=True):
        is_above = torch.ge(block, boundary.upper, out=buffer[: len(block)])
        row_counts += is_above.sum(1, dtype=torch.int32)
        cols += is_above.sum(0, dtype=torch.int32)


def _in_buckets(bits: Tensor, boundaries: Sequence[_Boundary]) -> tuple[Tensor, Tensor]:
    """Return the elements in the boundaries' buckets, and their flat positions, ascending.

    They are some thousandths of a matrix, unless many elements are equal.
    """
    values, positions, start = [], [], 0
    buffers = _block_buffer(bits), _block_buffer(bits)
    for block in _row_blocks(bits):
        inside, edge = (buffer[: len(block)] for buffer in buffers)
        inside.zero_()
        for boundary in boundaries:
            inside += torch.ge(block, boundary.lower, out=edge)
            inside -= torch.ge(block, boundary.upper, out=edge)
        found = inside.flatten().nonzero().flatten()
        values.append(block.flatten()[found])
        positions.append(found + start)
        start += block.numel()
    return torch.cat(values), torch.cat(positions)


def _wanted(boundary: _Boundary, values: Tensor, positions: Tensor) -> Tensor:
    """Return the positions of the ``wanted`` largest elements of a boundary's bucket; ties go to the lower position."""
    inside = (values >= boundary.lower) & (values < boundary.upper)
    order = values[inside].argsort(descending=True, stable=True)
    return positions[inside][order[: boundary.wanted]]


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
    bits = _order_bits(importance)
    boundaries = _boundaries(bits, [share(fraction, importance.numel()) for fraction in ladder])
    values, positions = _in_buckets(bits, boundaries)
    for boundary, rows, cols in zip(boundaries, row_counts, col_counts, strict=True):
        _add_from_upper(bits, boundary, rows, cols)
        wanted = _wanted(boundary, values, positions)
        rows += (wanted // num_cols).bincount(minlength=num_rows)
        cols += (wanted % num_cols).bincount(minlength=num_cols)
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

    Args:
        element_fraction: ``k``, the share of elements that count as core, one of the ladder.
        core_fraction: ``p``, the share of rows and of columns to keep.

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


def concentration(scores: RegionScores, region: CoreRegion, element_fraction: float) -> tuple[float, float]:
    """Return the shares of the core elements that lie in the core rows and in the core columns.

    Importance that does not concentrate leaves both near ``core_fraction``, a failure sign of the method (section 2).

    Args:
        element_fraction: ``k``, as the region was cut with.
    """
    step = scores.ladder.index(element_fraction)
    rows, cols = scores.row_counts[step], scores.col_counts[step]
    total = float(rows.sum())
    return float(rows[region.rows].sum()) / total, float(cols[region.cols].sum()) / total
