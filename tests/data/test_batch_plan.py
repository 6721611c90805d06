"""The order of rows: every row once an epoch, the same at any number of ranks, a function of the step alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taso_ds.data import batch_plan
from taso_ds.data.batch_plan import BatchPlan

sizes = st.integers(1, 40)


def test_by_hand_without_shuffling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_plan, "_permutation", lambda num_rows, _seed, _epoch: torch.arange(num_rows))
    plan = BatchPlan(num_rows=7, global_batch_size=4, seed=0)
    assert plan.steps_per_epoch == 2
    assert [plan.rows(step) for step in range(3)] == [[0, 1, 2, 3], [4, 5, 6], [0, 1, 2, 3]]

    # Positions of the short batch [4, 5, 6] with 2 ranks and micro-batches of 1: (micro_step * 2 + rank) * 1.
    def take(micro_step: int, rank: int) -> list[int]:
        return plan.micro_batch(1, micro_step, rank=rank, world_size=2, micro_batch_size=1)

    assert [take(0, 0), take(0, 1), take(1, 0), take(1, 1)] == [[4], [5], [6], []]


@given(sizes, sizes, st.integers(-3, 2**40), st.integers(0, 3))
def test_every_epoch_sees_every_row_once(num_rows: int, batch: int, seed: int, epoch: int) -> None:
    plan = BatchPlan(num_rows, batch, seed)
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    batches = [plan.rows(step) for step in steps]
    assert sorted(row for rows in batches for row in rows) == list(range(num_rows))
    assert all(len(rows) == batch for rows in batches[:-1])
    assert 0 < len(batches[-1]) <= batch


@settings(max_examples=200)
@given(sizes, st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.integers(0, 200))
def test_any_factorisation_takes_the_same_rows(
    num_rows: int, world_size: int, micro_batch_size: int, accumulation: int, step: int
) -> None:
    plan = BatchPlan(num_rows, world_size * micro_batch_size * accumulation, seed=1)
    taken = [
        row
        for micro_step in range(accumulation)
        for rank in range(world_size)
        for row in plan.micro_batch(
            step, micro_step, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size
        )
    ]
    assert taken == plan.rows(step)  # not only the same rows: also in the same order


def test_pure_function_of_the_step() -> None:
    plan = BatchPlan(50, 8, seed=3)
    forwards = [plan.rows(step) for step in range(20)]
    backwards = [BatchPlan(50, 8, seed=3).rows(step) for step in reversed(range(20))]
    assert forwards == backwards[::-1]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    # One batch an epoch: 9 orders of 50 rows, and equal ones by chance have a probability of about 36/50!.
    orders = [tuple(BatchPlan(50, 50, seed).rows(epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9


@pytest.mark.parametrize(("rows", "batch", "name"), [(0, 1, "num_rows"), (1, 0, "global_batch_size")])
def test_sizes_are_checked(rows: int, batch: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        BatchPlan(rows, batch, seed=0)
