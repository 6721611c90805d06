"""Core regions against a longhand selection by plain sorting, and their structural properties."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from trained_adapters import select_core_region

from taso_ds.adapters.selection import (
    ELEMENT_FRACTION_LADDER,
    CoreRegion,
    concentration,
    cut_region,
    ladder_with,
    score_rows_and_cols,
    share,
)


def reference_mask(importance: Tensor, k: float) -> list[list[bool]]:
    """Step 1 of method section 2 by sorting all elements: largest first, then lower index."""
    rows, cols = importance.shape
    values = importance.flatten().tolist()
    order = sorted(range(rows * cols), key=lambda index: (-values[index], index))
    chosen = set(order[: max(1, math.floor(k * (rows * cols)))])
    return [[row * cols + col in chosen for col in range(cols)] for row in range(rows)]


def reference_region(importance: Tensor, k: float, p: float) -> tuple[list[int], list[int]]:
    """Steps 2 and 3 by sorting rows and columns: count, then summed importance, then lower index."""
    mask, values = reference_mask(importance, k), importance.tolist()
    rows, cols = importance.shape

    def top(counts: list[int], sums: list[float]) -> list[int]:
        order = sorted(range(len(counts)), key=lambda index: (-counts[index], -sums[index], index))
        return sorted(order[: max(1, math.floor(p * len(counts)))])

    return (
        top([sum(mask[i]) for i in range(rows)], [math.fsum(values[i]) for i in range(rows)]),
        top(
            [sum(mask[i][j] for i in range(rows)) for j in range(cols)],
            [math.fsum(values[i][j] for i in range(rows)) for j in range(cols)],
        ),
    )


def as_lists(region: CoreRegion) -> tuple[list[int], list[int]]:
    return region.rows.tolist(), region.cols.tolist()


# Few whole numbers: ties among elements, counts and sums are the rule, and sums are exact.
whole_matrices = st.tuples(st.integers(1, 12), st.integers(1, 12)).flatmap(
    lambda shape: st.lists(
        st.lists(st.integers(0, 4), min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]
    ).map(lambda rows: torch.tensor(rows, dtype=torch.float32))
)
fractions = st.floats(0.001, 1.0)


@settings(max_examples=300, deadline=None)
@given(whole_matrices, fractions, fractions)
# 1/3 of 63 elements is 21 (not (k · 7) · 9 = 20.99...): 15 ones and the first 6 zeros, so row 0 counts 6 like row 6.
@example((torch.arange(9)[None, :] >= torch.tensor([9, 9, 9, 9, 5, 4, 3])[:, None]).float(), 1 / 3, 0.375)
def test_equals_the_longhand_selection_whatever_the_ties(importance: Tensor, k: float, p: float) -> None:
    region = select_core_region(importance, element_fraction=k, core_fraction=p)
    assert as_lists(region) == reference_region(importance, k, p)
    assert (region.out_features, region.in_features) == importance.shape
    assert region.rows.dtype == region.cols.dtype == torch.int64


@pytest.mark.parametrize("k", ELEMENT_FRACTION_LADDER)
@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (96, 96)])
def test_equals_the_longhand_selection_on_real_valued_importance(shape: tuple[int, int], k: float) -> None:
    importance = torch.randn(shape).abs() * torch.randn(shape[1]).abs()
    for p in (0.05, 0.1, 0.5):
        region = select_core_region(importance, element_fraction=k, core_fraction=p)
        assert as_lists(region) == reference_region(importance, k, p)


@settings(max_examples=300, deadline=None)
@given(whole_matrices, fractions)
def test_exactly_the_share_of_elements_counts_and_ties_go_to_the_lower_index(importance: Tensor, k: float) -> None:
    scores, mask = score_rows_and_cols(importance, [k]), torch.tensor(reference_mask(importance, k))
    assert int(mask.sum()) == share(k, importance.numel()) == max(1, math.floor(k * importance.numel()))
    assert scores.row_counts[0].tolist() == mask.sum(1).tolist()
    assert scores.col_counts[0].tolist() == mask.sum(0).tolist()
    # A matrix of one row: the columns' counts are the mask itself.
    flat = score_rows_and_cols(importance.flatten()[None], [k])
    assert flat.col_counts[0].tolist() == mask.flatten().int().tolist()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0.0, width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60), st.data())
def test_the_largest_are_found_among_any_floats(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    mask = score_rows_and_cols(torch.tensor([values]), [(k + 0.5) / len(values)]).col_counts
    largest = sorted(range(len(values)), key=lambda index: (-values[index], index))[:k]
    assert mask[0].nonzero().flatten().tolist() == sorted(largest)


@settings(max_examples=100, deadline=None)
@given(whole_matrices, fractions, fractions, fractions, st.sampled_from((0.125, 2.0, 1024.0)))
def test_a_larger_share_keeps_the_smaller_one_and_units_do_not_matter(
    importance: Tensor, k: float, p: float, larger: float, unit: float
) -> None:
    small, large = sorted((p, larger))
    inner = select_core_region(importance, element_fraction=k, core_fraction=small)
    outer = select_core_region(importance, element_fraction=k, core_fraction=large)
    for one, other, size in ((inner.rows, outer.rows, len(importance)), (inner.cols, outer.cols, importance.shape[1])):
        assert set(one.tolist()) <= set(other.tolist()) <= set(range(size))
        assert one.tolist() == sorted(set(one.tolist()))
        assert len(one) == share(small, size)
    scaled = select_core_region(unit * importance, element_fraction=k, core_fraction=small)
    assert as_lists(scaled) == as_lists(inner)


# Ties by hand ---------------------------------------------------------------------------------------------------------


def test_equal_counts_go_to_the_larger_sum_then_to_the_lower_index() -> None:
    # k = 0.34 of 12 elements, floored: 4 core elements, the 9s, one in each row. So the rows tie at 1; their sums are
    # 9, 10, 11, 10: one row of four (p = 0.25) is row 2, two rows (p = 0.5) add row 1, whose sum ties with row 3's.
    importance = torch.tensor([[9.0, 0.0, 0.0], [9.0, 1.0, 0.0], [2.0, 9.0, 0.0], [0.0, 1.0, 9.0]])
    one = select_core_region(importance, element_fraction=0.34, core_fraction=0.25)
    two = select_core_region(importance, element_fraction=0.34, core_fraction=0.5)
    assert one.rows.tolist() == [2]
    assert two.rows.tolist() == [1, 2]
    assert one.cols.tolist() == [0]  # columns count 2, 1, 1


def test_counts_come_before_sums() -> None:
    # k = 0.25 of 8: the 5s, both in row 0 (sum 10). Row 1 sums to 16, but holds no core element.
    importance = torch.tensor([[5.0, 5.0, 0.0, 0.0], [4.0, 4.0, 4.0, 4.0]])
    assert select_core_region(importance, element_fraction=0.25, core_fraction=0.5).rows.tolist() == [0]


def test_without_any_difference_the_first_indices_are_taken() -> None:
    region = select_core_region(torch.zeros(20, 10), element_fraction=1.0, core_fraction=0.2)
    assert as_lists(region) == ([0, 1, 2, 3], [0, 1])
    assert score_rows_and_cols(torch.ones(1, 20), [0.25]).col_counts[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4]


# Shares ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fraction", "total", "expected"),
    [(0.1, 2048, 204), (0.1, 11008, 1100), (0.1, 256, 25), (0.05, 19, 1), (0.1, 9, 1), (1.0, 7, 7), (0.001, 5, 1)],
)
def test_shares_are_floored_and_never_empty(fraction: float, total: int, expected: int) -> None:
    assert share(fraction, total) == expected


def test_everything_is_selected_at_one() -> None:
    region = select_core_region(torch.randn(6, 9).abs(), element_fraction=1.0, core_fraction=1.0)
    assert as_lists(region) == (list(range(6)), list(range(9)))
    assert score_rows_and_cols(torch.randn(1, 54).abs(), [1.0]).col_counts.all()


# Structure ------------------------------------------------------------------------------------------------------------


def test_finds_a_planted_region() -> None:
    rows, cols = [3, 17, 30, 44], [5, 6, 31]
    importance = torch.rand(48, 32)
    importance[rows] += 10.0
    importance[:, cols] += 10.0
    # 4 * 32 + 3 * 48 - 12 = 260 planted elements of 1536: k = 0.16 (245) picks from them alone.
    region = select_core_region(importance, element_fraction=0.16, core_fraction=0.1)
    assert as_lists(region) == (rows, cols)  # floor(4.8) = 4 rows, floor(3.2) = 3 columns


@given(st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_permuted_rows_and_columns_give_the_permuted_region(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(24, 16, generator=generator)
    rows, cols = torch.randperm(24, generator=generator), torch.randperm(16, generator=generator)
    plain = select_core_region(importance, element_fraction=0.1, core_fraction=0.2)
    moved = select_core_region(importance[rows][:, cols], element_fraction=0.1, core_fraction=0.2)
    assert sorted(rows[moved.rows].tolist()) == plain.rows.tolist()
    assert sorted(cols[moved.cols].tolist()) == plain.cols.tolist()


def test_a_transposed_view_is_scored_like_its_copy() -> None:
    importance = torch.rand(12, 20)
    view = select_core_region(importance.t(), element_fraction=0.2, core_fraction=0.3)
    copy = select_core_region(importance.t().clone(), element_fraction=0.2, core_fraction=0.3)
    assert as_lists(view) == as_lists(copy)
    assert as_lists(view) == reference_region(importance.t(), 0.2, 0.3)


def test_one_scoring_serves_every_cut_of_the_ladder() -> None:
    importance = torch.rand(40, 30)
    scores = score_rows_and_cols(importance, ladder_with(0.07))
    assert scores.ladder == (0.01, 0.02, 0.05, 0.07, 0.1, 0.2)
    for k in scores.ladder:
        for p in (0.05, 0.3):
            again = cut_region(scores, element_fraction=k, core_fraction=p)
            assert as_lists(again) == as_lists(select_core_region(importance, element_fraction=k, core_fraction=p))
    counts = scores.row_counts.sum(1).tolist()
    assert counts == scores.col_counts.sum(1).tolist()
    assert counts == [12, 24, 60, 84, 120, 240]  # k · 1200
    with pytest.raises(KeyError):
        cut_region(scores, element_fraction=0.03, core_fraction=0.1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_importance_that_is_not_finite_is_refused(bad: float) -> None:
    importance = torch.rand(4, 4)
    importance[2, 1] = bad
    with pytest.raises(FloatingPointError):
        score_rows_and_cols(importance, [0.1])


def test_concentration_by_hand() -> None:
    # The four 9s are the core elements (k = 0.25 of 16). One core row (p = 0.25): row 1 holds 3 of 4; one core
    # column: column 2 holds 2 of 4.
    importance = torch.tensor([[0.0, 1.0, 9.0, 1.0], [9.0, 9.0, 9.0, 0.0], [1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    scores = score_rows_and_cols(importance, [0.25])
    region = cut_region(scores, element_fraction=0.25, core_fraction=0.25)
    assert as_lists(region) == ([1], [2])
    assert concentration(scores, region, 0.25) == (0.75, 0.5)


def test_noise_does_not_concentrate_and_structure_does() -> None:
    noise = torch.rand(200, 200)
    scores = score_rows_and_cols(noise, [0.05])
    rows, cols = concentration(scores, cut_region(scores, element_fraction=0.05, core_fraction=0.1), 0.05)
    # Counts are binomial(200, 0.05): mean 10, deviation 3.1; the top tenth lies near mean + 1.75 deviations = 15.4.
    assert 0.12 < rows < 0.2
    assert 0.12 < cols < 0.2
    scores = score_rows_and_cols(noise + 10.0 * (torch.arange(200) < 20)[:, None], [0.05])
    rows, _ = concentration(scores, cut_region(scores, element_fraction=0.05, core_fraction=0.1), 0.05)
    assert rows == 1.0
