"""Where the compact parameters of each structure lie, by hand and against masks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taso_ds.adapters.selection import CoreRegion, share
from taso_ds.adapters.structure import STRUCTURES, count_dense, count_parameters, dense_positions, dense_rank


def region_of(out_features: int, in_features: int, p: float, seed: int = 0) -> CoreRegion:
    generator = torch.Generator().manual_seed(seed)
    return CoreRegion(
        rows=torch.randperm(out_features, generator=generator)[: share(p, out_features)].sort().values,
        cols=torch.randperm(in_features, generator=generator)[: share(p, in_features)].sort().values,
        out_features=out_features,
        in_features=in_features,
    )


def test_positions_by_hand() -> None:
    region = CoreRegion(torch.tensor([1]), torch.tensor([0, 2]), out_features=2, in_features=3)
    # intersection, rank 1: A (1, 3) at 0..2 keeps columns 0 and 2; B (2, 1) at 3..4 keeps row 1.
    assert dense_positions("intersection", region, 1).tolist() == [0, 2, 4]
    # union, R = 2: A (2, 3) at 0..5, B (2, 2) at 6..9 with B[row, r] at 6 + 2 row + r.
    # Branch 0 (core rows): all of A's row 0, then B[1, 0]. Branch 1 (core columns): A's row 1 at columns 0 and 2,
    # then B[:, 1].
    assert dense_positions("union", region, 1).tolist() == [0, 1, 2, 8, 3, 5, 7, 9]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(list(STRUCTURES)), st.integers(1, 12), st.integers(1, 12), st.integers(1, 3), st.floats(0.05, 1.0),
    st.integers(0, 99),
)  # fmt: skip
def test_positions_are_exactly_the_kept_entries(
    structure: str, out_features: int, in_features: int, rank: int, p: float, seed: int
) -> None:
    region = region_of(out_features, in_features, p, seed)
    total = dense_rank(structure, rank)
    kept_a, kept_b = torch.zeros(total, in_features), torch.zeros(out_features, total)
    if structure == "union":
        kept_a[:rank] = 1  # (B1 ⊙ m_row) A1
        kept_b[region.rows, :rank] = 1
        kept_a[rank:, region.cols] = 1  # B2 (A2 ⊙ m_col)
        kept_b[:, rank:] = 1
    else:
        kept_a[:, region.cols] = 1
        kept_b[region.rows] = 1
    positions = dense_positions(structure, region, rank)
    expected = torch.cat([kept_a.flatten(), kept_b.flatten()]).nonzero().flatten()
    assert positions.sort().values.tolist() == expected.tolist()  # every entry once
    shapes = {"out_features": out_features, "in_features": in_features, "rank": rank}
    assert len(positions) == count_parameters(structure, **shapes, core_fraction=p)
    assert kept_a.numel() + kept_b.numel() == count_dense(structure, **shapes)


@pytest.mark.parametrize(
    ("structure", "expected"),
    [
        # (1 + p)(out + in) at p = 0.1: 40 + 30 + floor(4) + floor(3)
        ("union", 77),
        # p (out + in)
        ("intersection", 7),
    ],
)
def test_counts_by_hand(structure: str, expected: int) -> None:
    shapes = {"out_features": 40, "in_features": 30}
    assert count_parameters(structure, **shapes, rank=1, core_fraction=0.1) == expected
    assert count_parameters(structure, **shapes, rank=4, core_fraction=0.1) == 4 * expected
