"""Batches for a rank: which rows, collated, on the device. Every rank knows the global batch, so nothing is sent."""

from collections.abc import Sequence
from dataclasses import dataclass

from taso_ds.data.batch_plan import BatchPlan
from taso_ds.data.encode import EncodedRow
from taso_ds.distributed import comm
from taso_ds.objectives.batches import Batch, Collate, on_device
from taso_ds.training.arguments import BatchSizes


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
        return on_device(self.collate([self.rows[row] for row in rows]))
