"""Makes rectangular tensors of encoded rows. Padding never changes a result: it is masked and its labels are -100.

Of no rows, every function makes a batch of one empty row (``empty_row``), which takes part in every collective.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from taso_ds.data.encode import IGNORED, EncodedRow


def collate(rows: Sequence[EncodedRow], *, pad_id: int) -> dict[str, Tensor]:
    """Pad rows on the right to the length of the longest.

    Returns:
        ``input_ids``, ``attention_mask``, ``labels``, all ``(batch, tokens)`` int64; ``token_type_ids`` when the rows
        have them.
    """
    rows = rows or [empty_row(pad_id)]
    width = max(len(row.input_ids) for row in rows)
    return _inputs(rows, pad_id, width) | {"labels": _right([row.labels for row in rows], IGNORED, width)}


def collate_left(rows: Sequence[EncodedRow], *, pad_id: int) -> dict[str, Tensor]:
    """Pad the rows' prompts on the left, so that generation continues every row at the same last position.

    The answer, which is what is supervised, is left out.

    Returns:
        ``input_ids`` and ``attention_mask``, ``(batch, tokens)`` int64.
    """
    prompts = [_prompt(row) for row in rows or [empty_row(pad_id)]]
    width = max(len(prompt) for prompt in prompts)
    ids = [[pad_id] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def collate_head(rows: Sequence[EncodedRow], *, pad_id: int, is_regression: bool) -> dict[str, Tensor]:
    """Pad rows on the right for a classification head.

    The label of a row without a target (``empty_row``) is -100 as a class and nan as a score: the loss leaves both out.

    Args:
        is_regression: whether the targets are scores, and not classes.

    Returns:
        As ``collate``, but ``labels (batch,)`` are int64 classes or float32 scores.
    """
    rows = rows or [empty_row(pad_id)]
    nothing = float("nan") if is_regression else IGNORED
    targets = [nothing if row.target is None else row.target for row in rows]
    labels = torch.tensor(targets, dtype=torch.float32 if is_regression else torch.int64)
    return _inputs(rows, pad_id, max(len(row.input_ids) for row in rows)) | {"labels": labels}


# Long enough for models that shorten sequences on the way (Funnel).
_EMPTY_LENGTH = 16


def empty_row(pad_id: int) -> EncodedRow:
    """Return a row that takes part in every collective and counts nothing.

    A rank without rows at the end of an epoch runs it. It is attended to like any text: softmax makes nan of a row
    whose whole attention mask is 0, and nan times a weight of 0 is still nan.
    """
    return EncodedRow([pad_id] * _EMPTY_LENGTH, [IGNORED] * _EMPTY_LENGTH)


def _inputs(rows: Sequence[EncodedRow], pad_id: int, width: int) -> dict[str, Tensor]:
    batch = {
        "input_ids": _right([row.input_ids for row in rows], pad_id, width),
        "attention_mask": _right([[1] * len(row.input_ids) for row in rows], 0, width),
    }
    if any(row.token_type_ids is not None for row in rows):  # an empty row among BERT's has none: all zero
        batch["token_type_ids"] = _right([row.token_type_ids or [] for row in rows], 0, width)
    return batch


def _right(sequences: Sequence[Sequence[int]], fill: int, width: int) -> Tensor:
    return torch.tensor([[*sequence, *[fill] * (width - len(sequence))] for sequence in sequences])


def _prompt(row: EncodedRow) -> list[int]:
    answer = next((i for i, label in enumerate(row.labels) if label != IGNORED), len(row.input_ids))
    return row.input_ids[:answer]
