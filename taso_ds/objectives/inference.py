"""Forwards of an evaluation: its rows are shared out over the ranks, and the results are brought together again.

Batches are formed before they are dealt to the ranks, so the numbers do not depend on the world size.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from taso_ds.console.bar import Bar
from taso_ds.data.encode import EncodedRow
from taso_ds.distributed import comm
from taso_ds.objectives.batches import Batch, Collate, dealt_batches, on_device

Key = TypeVar("Key")
Value = TypeVar("Value")


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Run the model without gradients and dropout."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def evaluation_batches(
    rows: Sequence[EncodedRow], *, batch_size: int, collate: Collate
) -> Iterator[tuple[list[int], Batch]]:
    """Yield this rank's batches on the device, each with the numbers of its rows; a batch without rows has none."""
    batches = dealt_batches(rows, batch_size=batch_size, collate=collate)
    for ids, batch in Bar(batches, desc="evaluating", unit="batch", leave=False):
        yield ids, on_device(batch)


def gathered(found: Mapping[Key, Value]) -> dict[Key, Value]:
    """Return what all ranks found, on every rank. A collective."""
    parts = comm.gather_objects(dict(found))
    merged = {key: value for part in parts for key, value in part.items()}
    assert sum(map(len, parts)) == len(merged), "a row was counted twice"
    return merged


def in_order(found: Mapping[int, Value], number: int) -> list[Value]:
    """Return what all ranks found for rows 0 to ``number - 1``, in this order. A collective."""
    merged = gathered(found)
    assert len(merged) == number, "a row was not counted"
    return [merged[row] for row in range(number)]
