"""Ranks that are not in the same place say so, and who it is, before they compute."""

from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from taso_ds.distributed import comm
from taso_ds.errors import UserError
from taso_ds.training.agreement import Place, agree, digest

HERE = Place(step=7, micro_batches=2, rows=11, trained=13)


def agree_with(*others: tuple[Place, int], wishes: int = 0) -> int:
    """Agree as rank 0 of a job whose other ranks are in these places."""

    def gather_rows(row: Tensor) -> Tensor:
        rest = [[place.step, place.micro_batches, place.rows, place.trained, wish] for place, wish in others]
        return torch.stack([row, *(torch.tensor(values, dtype=torch.int64) for values in rest)])

    with patch.object(comm, "gather_rows", gather_rows):
        return agree(HERE, wishes=wishes)


def test_alone_everybody_agrees() -> None:
    assert agree(HERE, wishes=2) == 2


def test_wishes_of_all_ranks_count() -> None:
    assert agree_with((HERE, 1), (HERE, 0), wishes=2) == 3


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (Place(8, 2, 11, 13), "rank 2 is at step 8, the others at 7"),
        (Place(7, 3, 11, 13), "rank 2 is at micro_batches 3, the others at 2"),
        (Place(7, 2, 12, 13), "rank 2 is at rows 12, the others at 11"),
        (Place(7, 2, 11, 14), "rank 2 is at trained 14, the others at 13"),
    ],
)
def test_the_rank_that_differs_from_most_is_named(other: Place, words: str) -> None:
    with pytest.raises(UserError, match=words):
        agree_with((HERE, 0), (other, 0))


def test_rank_0_can_be_the_one_that_differs() -> None:
    other = Place(8, 2, 11, 13)
    with pytest.raises(UserError, match="rank 0 is at step 7, the others at 8"):
        agree_with((other, 0), (other, 0))


def test_a_digest_is_a_function_of_all_parts_and_fits_into_an_integer_tensor() -> None:
    assert digest([b"a", b"b"]) == digest([b"a", b"b"]) != digest([b"a", b"c"])
    assert all(0 <= digest([bytes([value])]) < 2**62 for value in range(200))
