"""Batches for ranks: every row once, whatever the number of ranks; monkeypatched ranks, one process."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taso_ds.data.batch_plan import BatchPlan
from taso_ds.data.collate import collate, empty_row
from taso_ds.data.encode import EncodedRow
from taso_ds.distributed import comm
from taso_ds.objectives.batches import Batch, dealt_batches
from taso_ds.training.arguments import BatchSizes
from taso_ds.training.feed import Feed

FILLER = empty_row(0)  # which stands in where a batch has no rows
COLLATE = partial(collate, pad_id=0)


def rows_of(lengths: list[int]) -> list[EncodedRow]:
    """Row n holds n + 3 at every position, so that it is known again in a batch; its first token is prompt."""
    return [EncodedRow([n + 3] * length, [-100] + [n + 3] * (length - 1)) for n, length in enumerate(lengths)]


@contextmanager
def as_rank(rank: int, world_size: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comm, "rank", lambda: rank)
        patch.setattr(comm, "world_size", lambda: world_size)
        patch.setattr(comm, "device", lambda: torch.device("cpu"))
        yield


def deal(rows: list[EncodedRow], batch_size: int, world_size: int) -> list[list[tuple[list[int], Batch]]]:
    found = []
    for rank in range(world_size):
        with as_rank(rank, world_size):
            found.append(dealt_batches(rows, batch_size=batch_size, collate=COLLATE))
    return found


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=25), st.integers(1, 6), st.integers(1, 4))
def test_every_row_is_dealt_once(lengths: list[int], batch_size: int, world_size: int) -> None:
    rows = rows_of(lengths)
    dealt = deal(rows, batch_size, world_size)
    assert sorted(row for mine in dealt for ids, _ in mine for row in ids) == list(range(len(rows)))
    assert len({len(mine) for mine in dealt}) == 1  # every rank takes part in as many forwards
    for ids, batch in (entry for mine in dealt for entry in mine):
        if ids:
            assert batch["input_ids"].max(1).values.tolist() == [row + 3 for row in ids]
        else:
            assert (batch["labels"] == -100).all()  # a filler counts nothing


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=25), st.integers(1, 6))
def test_the_batches_are_the_same_at_every_world_size(lengths: list[int], batch_size: int) -> None:
    rows = rows_of(lengths)

    def batches(world_size: int) -> set[tuple[int, ...]]:
        return {tuple(ids) for mine in deal(rows, batch_size, world_size) for ids, _ in mine if ids}

    assert batches(1) == batches(2) == batches(3) == batches(4)


def test_dealing_by_hand() -> None:
    # Sorted by length, then by number: rows 1, 3 (2 tokens), 0, 4 (5), 2 (9). In twos: [1, 3], [0, 4], [2].
    dealt = deal(rows_of([5, 2, 9, 2, 5]), batch_size=2, world_size=2)
    assert [[ids for ids, _ in mine] for mine in dealt] == [[[1, 3], [2]], [[0, 4], []]]
    assert dealt[0][0][1]["input_ids"].shape == (2, 2)  # rows of one length need no padding
    assert dealt[1][1][1]["input_ids"].tolist() == [FILLER.input_ids]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 12))
def test_a_step_deals_the_rows_of_its_global_batch(
    num_rows: int, world_size: int, micro: int, accumulation: int, step: int
) -> None:
    rows = rows_of([2 + n % 5 for n in range(num_rows)])
    sizes = BatchSizes(micro, accumulation, world_size)
    plan = BatchPlan(num_rows, sizes.global_batch_size, seed=1)
    steps = []
    for rank in range(world_size):
        with as_rank(rank, world_size):
            steps.append(Feed(rows, plan, sizes, COLLATE).step(step))
    taken = [row for found in steps for batch in found.micro_batches for row in batch]
    assert sorted(taken) == sorted(plan.rows(step))
    assert all(len(found.micro_batches) == accumulation for found in steps)
    for found in steps:  # what every rank knows of the whole batch
        assert found.rows == plan.rows(step)
        assert found.units == sum(len(rows[row].input_ids) - 1 for row in found.rows)
        assert found.tokens == sum(len(rows[row].input_ids) for row in found.rows)


def test_an_empty_micro_batch_is_a_filler() -> None:
    feed = Feed(rows_of([3, 4]), BatchPlan(2, 2, seed=0), BatchSizes(1, 1, 2), COLLATE)
    with as_rank(0, 1):
        assert feed.batch([1])["input_ids"].tolist() == [[4, 4, 4, 4]]
        assert feed.batch([])["labels"].tolist() == [FILLER.labels]
        assert feed.batch([])["attention_mask"].all()  # a row of zeros would make softmax NaN
