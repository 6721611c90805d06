"""Log-likelihoods of the options of choice tasks, from as few forwards as they need."""

from collections.abc import Sequence

import torch
from torch import nn

from taso_ds.data.encode import IGNORED, EncodedRow
from taso_ds.objectives.batches import Collate
from taso_ds.objectives.inference import evaluation_batches, gathered
from taso_ds.objectives.loss import supervised_logits

# An option's place in the forwards: its row, and the token to read there (None: the row's own supervised tokens).
Reading = tuple[int, int | None]


def log_likelihoods(
    model: nn.Module, options: Sequence[Sequence[EncodedRow]], *, batch_size: int, collate: Collate
) -> list[list[float]]:
    """Return the log-likelihood of every option of every example. A collective.

    Options that are one token after the same prompt are read off one row. Each of the others takes a row of its own.

    Args:
        options: the encoded options of every example.
        batch_size: rows of one forward.
    """
    rows, readings = _share_rows(options)
    wanted: dict[int, list[int | None]] = {}
    for reading in readings:
        for row, token in reading:
            wanted.setdefault(row, []).append(token)
    found: dict[Reading, float] = {}
    for ids, batch in evaluation_batches(rows, batch_size=batch_size, collate=collate):
        logits, targets = supervised_logits(model, batch)
        for number, row in enumerate(ids):
            kept = targets[number] != IGNORED
            log_probabilities = logits[number][kept].float().log_softmax(-1)  # (supervised, vocabulary)
            for token in wanted[row]:
                tokens = targets[number][kept] if token is None else torch.tensor([token], device=targets.device)
                found[row, token] = float(log_probabilities.gather(1, tokens[:, None]).sum())
    merged = gathered(found)
    return [[merged[reading] for reading in reading_of_example] for reading_of_example in readings]


def most_likely(values: Sequence[float]) -> int:
    """Return the position of the option with the highest likelihood; of equal ones, the first."""
    return max(range(len(values)), key=values.__getitem__)


def rating(values: Sequence[float]) -> float:
    """Return the mean position of the options, weighted by likelihood: the rating of a decoder that answers 0 to 5."""
    weights = torch.tensor(values).softmax(0)
    return float((weights * torch.arange(len(values))).sum())


def _share_rows(options: Sequence[Sequence[EncodedRow]]) -> tuple[list[EncodedRow], list[list[Reading]]]:
    """Return the rows to run, and per example where each of its options is read."""
    rows: list[EncodedRow] = []
    readings: list[list[Reading]] = []
    for encoded in options:
        if _differ_in_last_token(encoded):
            readings.append([(len(rows), row.input_ids[-1]) for row in encoded])
            rows.append(encoded[0])
        else:
            readings.append([(len(rows) + number, None) for number in range(len(encoded))])
            rows.extend(encoded)
    return rows, readings


def _differ_in_last_token(rows: Sequence[EncodedRow]) -> bool:
    prompt = rows[0].input_ids[:-1]
    return all(row.num_supervised == 1 and row.input_ids[:-1] == prompt for row in rows)
