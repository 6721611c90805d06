"""Padding by hand: where it goes, what it holds and that it counts nothing."""

import math
from functools import partial

import torch
from families import FAMILIES, build

from taso_ds.data.collate import collate, collate_head, collate_left, empty_row
from taso_ds.data.encode import EncodedRow

LONG = EncodedRow([5, 6, 7], [-100, 6, 7])
SHORT = EncodedRow([8, 9], [-100, 9])


def test_right_padding() -> None:
    batch = collate([LONG, SHORT], pad_id=3)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 3]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[-100, 6, 7], [-100, 9, -100]],
    }
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_left_padding_holds_prompts_only() -> None:
    prompt_only = EncodedRow([1, 2, 4], [-100, -100, -100])
    answered = EncodedRow([8, 9, 5, 6], [-100, -100, 5, 6])
    batch = collate_left([prompt_only, answered], pad_id=0)
    assert batch["input_ids"].tolist() == [[1, 2, 4], [0, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]


def test_head_labels() -> None:
    rows = [EncodedRow([5, 6, 7], [], 1), EncodedRow([8], [], 0)]
    batch = collate_head(rows, pad_id=3, is_regression=False)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 3, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert torch.equal(batch["labels"], torch.tensor([1, 0]))
    assert "token_type_ids" not in batch
    scores = collate_head([EncodedRow([5], [], 2.5)], pad_id=3, is_regression=True)["labels"]
    assert torch.equal(scores, torch.tensor([2.5], dtype=torch.float32))


def test_token_types_are_padded_too() -> None:
    rows = [EncodedRow([5, 6, 7], [], 1, token_type_ids=[0, 1, 1]), EncodedRow([8], [], 0, token_type_ids=[1])]
    batch = collate_head([*rows, empty_row(3)], pad_id=3, is_regression=False)
    assert batch["token_type_ids"][:, :3].tolist() == [[0, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert not batch["token_type_ids"][:, 3:].any()


def test_an_empty_row_counts_nothing() -> None:
    row = empty_row(7)
    assert row.num_supervised == 0
    batch = collate([row], pad_id=7)
    assert (batch["labels"] == -100).all()
    assert batch["attention_mask"].all()  # nothing attended to would make softmax nan
    assert collate_head([row], pad_id=7, is_regression=False)["labels"].tolist() == [-100]
    assert math.isnan(collate_head([row], pad_id=7, is_regression=True)["labels"].item())


def test_an_empty_row_stands_in_for_no_rows() -> None:
    for collated in (
        partial(collate, pad_id=7),
        partial(collate_left, pad_id=7),
        partial(collate_head, pad_id=7, is_regression=False),
    ):
        batch, expected = collated([]), collated([empty_row(7)])
        assert batch.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in batch.items())


def test_an_empty_row_suits_a_model_that_shortens_sequences() -> None:
    """A rank without rows of a short evaluation runs it."""
    model = build(next(family for family in FAMILIES if family.name == "funnel"))
    batch = collate_head([empty_row(0)], pad_id=0, is_regression=False)
    assert model(**batch).logits.isfinite().all()
