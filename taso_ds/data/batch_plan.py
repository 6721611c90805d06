"""Which rows an optimizer step sees: a pure function of the step.

The global batch is fixed first, and only then cut into micro-batches and ranks. So a run sees the same rows in the same
steps on 1 device or 64, and resuming at a step needs nothing but its number.
"""

import functools
import hashlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BatchPlan:
    """The order of rows: every epoch a permutation of its own, cut into global batches."""

    num_rows: int
    global_batch_size: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("num_rows", "global_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in one pass over the rows; the last may be short."""
        return -(-self.num_rows // self.global_batch_size)

    def rows(self, step: int) -> list[int]:
        """Return the row ids of global batch ``step``, counted from 0 over all epochs."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        start = batch * self.global_batch_size
        stop = min(start + self.global_batch_size, self.num_rows)
        return _permutation(self.num_rows, self.seed, epoch)[start:stop].tolist()

    def micro_batch(
        self, step: int, micro_step: int, *, rank: int, world_size: int, micro_batch_size: int
    ) -> list[int]:
        """Return the ids of the rows that one rank takes in one micro-step; fewer, or none, at the end of an epoch.

        Over all micro-steps and ranks, every row of ``rows(step)`` is taken exactly once.

        Args:
            step: counted from 0 over all epochs.
            micro_step: counted from 0 in each step.
        """
        start = (micro_step * world_size + rank) * micro_batch_size
        return self.rows(step)[start : start + micro_batch_size]


@functools.lru_cache(maxsize=2)  # every step asks for its epoch's several times
def _permutation(num_rows: int, seed: int, epoch: int) -> torch.Tensor:
    # torch seeds with the low 32 bits, so seed and epoch are hashed into them: adding the two would give seed 1
    # in epoch 0 the order of seed 0 in epoch 1.
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    return torch.randperm(num_rows, generator=generator)  # (num_rows,)
