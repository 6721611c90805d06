"""Batches for a rank: which rows, collated, on the device. Every rank knows the global batch, so nothing is sent."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from taso_ds.config import BatchSizes
from taso_ds.data.encode import EncodedRow
from taso_ds.data.plan import BatchPlan
from taso_ds.distributed import comm

Batch = dict[str, Tensor]
Collate = Callable[[Sequence[EncodedRow]], Batch]


@dataclass(frozen=True, eq=False)
class Step:
    """One optimizer step: this rank's micro-batches, and what the whole global batch holds.

    Attributes:
        micro_batches: row ids of each micro-batch of this rank; empty ones fill up the end of an epoch.
        rows: row ids of the global batch.
        units: supervised units of the global batch.
        tokens: input tokens of the global batch.
    """

    micro_batches: list[list[int]]
    rows: list[int]
    units: int
    tokens: int


@dataclass(frozen=True, eq=False)
class Feed:
    """The training rows in the plan's order."""

    rows: Sequence[EncodedRow]
    plan: BatchPlan
    sizes: BatchSizes
    collate: Collate
    filler: EncodedRow

    def step(self, step: int) -> Step:
        rows = self.plan.rows(step)
        return Step(
            micro_batches=[
                self.plan.micro_batch(
                    step,
                    micro_step,
                    rank=comm.rank(),
                    world_size=self.sizes.world_size,
                    micro_batch_size=self.sizes.micro_batch_size,
                )
                for micro_step in range(self.sizes.grad_accum_steps)
            ],
            rows=rows,
            units=sum(self.rows[row].num_supervised for row in rows),
            tokens=sum(len(self.rows[row].input_ids) for row in rows),
        )

    def batch(self, rows: Sequence[int]) -> Batch:
        return on_device(self.collate([self.rows[row] for row in rows] or [self.filler]))


def on_device(batch: Batch) -> Batch:
    device = comm.device()
    return {key: value.to(device) for key, value in batch.items()}


def dealt_batches(
    rows: Sequence[EncodedRow], *, batch_size: int, collate: Collate, filler: EncodedRow
) -> list[tuple[list[int], Batch]]:
    """Deal fixed batches of rows of similar length to the ranks in turn; each row counts exactly once.

    The batches are the same at every world size, so results are too. Every rank gets the same number, some fillers.
    Returns this rank's ``(row ids, batch)``, on the CPU.
    """
    by_length = sorted(range(len(rows)), key=lambda row: (len(rows[row].input_ids), row))
    batches = [by_length[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    rounds = -(-len(batches) // comm.world_size())
    mine = [batches[index] for index in range(comm.rank(), len(batches), comm.world_size())]
    mine += [[] for _ in range(rounds - len(mine))]
    return [(ids, collate([rows[row] for row in ids] or [filler])) for ids in mine]
