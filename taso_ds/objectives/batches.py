"""Batches of a rank: rows collated, dealt to the ranks, and brought to the device."""

from collections.abc import Callable, Sequence

from torch import Tensor

from taso_ds.data.encode import EncodedRow
from taso_ds.distributed import comm

Batch = dict[str, Tensor]
Collate = Callable[[Sequence[EncodedRow]], Batch]  # of no rows it makes a batch that counts nothing


def on_device(batch: Batch) -> Batch:
    device = comm.device()
    return {key: value.to(device) for key, value in batch.items()}


def dealt_batches(rows: Sequence[EncodedRow], *, batch_size: int, collate: Collate) -> list[tuple[list[int], Batch]]:
    """Deal batches of rows of similar length to the ranks in turn; each row counts exactly once.

    The batches are the same at every world size, so the results are too. Every rank gets the same number of batches;
    some have no rows.

    Args:
        batch_size: rows of a batch.

    Returns:
        This rank's batches on the CPU, each with the numbers of its rows.
    """
    by_length = sorted(range(len(rows)), key=lambda row: (len(rows[row].input_ids), row))
    batches = [by_length[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    rounds = -(-len(batches) // comm.world_size())
    mine = [batches[index] for index in range(comm.rank(), len(batches), comm.world_size())]
    mine += [[] for _ in range(rounds - len(mine))]
    return [(ids, collate([rows[row] for row in ids])) for ids in mine]
