"""Do all ranks agree on where they are? One gather of a few integers at the start of every step.

Ranks that differ in their number of micro-batches, say, would otherwise meet in the wrong collectives: a hang without a
name, or worse, a result.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields

import torch

from taso_ds.distributed import comm
from taso_ds.errors import UserError


@dataclass(frozen=True)
class Place:
    """What must be the same on every rank before a step.

    Attributes:
        trained: digest of what is trained: names, shapes, core regions.
    """

    step: int
    micro_batches: int
    rows: int
    trained: int


def digest(parts: Iterable[bytes]) -> int:
    """Return 62 bits of the SHA-256 of all parts."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return int.from_bytes(total.digest()[:8], "big") >> 2


def agree(place: Place, *, wishes: int) -> int:
    """Compare places and return the bits that any rank wishes. A collective.

    Args:
        wishes: bits of this rank.

    Raises:
        UserError: on every rank, naming the first rank that differs from most and in what.
    """
    own = torch.tensor([*astuple(place), wishes], dtype=torch.int64, device=comm.device())
    rows = comm.gather_rows(own).tolist()
    for column, field in enumerate(fields(Place)):
        values = [row[column] for row in rows]
        usual = max(values, key=values.count)
        for rank, value in enumerate(values):
            if value != usual:
                raise UserError(
                    f"training: rank {rank} is at {field.name} {value}, the others at {usual}; do all nodes have the"
                    " same data, model and version of this program?"
                )
    combined = 0
    for row in rows:
        combined |= row[-1]
    return combined
