"""The case that one process and several ranks compute alike: rows, batch splits and settings, used by both sides."""

from dataclasses import dataclass

import torch
from tiny_models import VOCABULARY

from taso_ds.data.encode import EncodedRow
from taso_ds.training.arguments import BatchSizes, TrainArguments

ELEMENT_FRACTION, CORE_FRACTION = 0.05, 0.25
PASSES = 3  # groups of matrices scored one after the other
LADDER = (0.05, 0.1)
STEPS, GLOBAL_BATCH = 5, 8
MAX_GRAD_NORM = 0.1  # below every norm that occurs, so that clipping takes part
SEED = 3
TRAINING = TrainArguments(
    learning_rate=5e-3, weight_decay=0.1, lr_scheduler_type="linear", warmup_ratio=0.3, max_grad_norm=MAX_GRAD_NORM
)
RHO = 0.9  # the adapter's learning rate is √10 times the base rate


def lm_rows(number: int, *, seed: int) -> list[EncodedRow]:
    """Rows of 4 to 14 random tokens, whose first 1 to 3 tokens are an unsupervised prompt."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(number):
        length, prompt = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((4, 15), (1, 4)))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        rows.append(EncodedRow(ids, [-100] * prompt + ids[prompt:]))
    return rows


def head_rows(number: int, *, seed: int) -> list[EncodedRow]:
    rows = lm_rows(number, seed=seed)
    return [EncodedRow(row.input_ids, [], target=sum(row.input_ids) % 2) for row in rows]


CALIBRATION = lm_rows(13, seed=1)
# Batches of 8, 8 and 5 rows an epoch: with 2 ranks of micro-batch 2 the last one is 2 + 2, then 1 + none.
TRAIN = lm_rows(21, seed=2)
HEAD_TRAIN = head_rows(21, seed=4)


@dataclass(frozen=True)
class Split:
    """One way to cut the global batch of 8."""

    micro: int
    accumulation: int

    def sizes(self, world_size: int) -> BatchSizes:
        assert self.micro * self.accumulation * world_size == GLOBAL_BATCH
        return BatchSizes(self.micro, self.accumulation, world_size)


SPLITS = {1: [Split(8, 1), Split(2, 4)], 2: [Split(4, 1), Split(2, 2), Split(1, 4)], 4: [Split(2, 1), Split(1, 2)]}
STAGES = {1: [0, 1, 2, 3], 2: [0, 1, 2, 3], 4: [0, 2, 3]}
SMALL_WORLD = 2  # up to here every variant runs; beyond, those where more ranks can make a difference
