"""Losses as sums over supervised units, so that any split of a batch over micro-batches and ranks gives the same mean.

A unit is a supervised token for a language model and a row for a classification head. The trainer divides by the units
of the whole global batch. A classification head learns by ``head_loss_sum``. A language model learns by
``chunked_loss``, which never holds the logits of a whole micro-batch; where the output layer does not allow that, it
calls ``lm_loss_sum``.
"""

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taso_ds.data.encode import IGNORED
from taso_ds.objectives.batches import Batch

LossSum = Callable[[nn.Module, Batch], tuple[Tensor, int]]  # of a model, or an engine around it, on a batch


def keeps_logits(model: nn.Module) -> bool:
    """Say whether the model can compute logits at chosen positions only."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def supervised_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the logits and the targets of the columns that are supervised in some row.

    Most of a prompt never meets the vocabulary. The output layer runs once for every batch, an empty one too, so that
    all ranks issue the same collectives.

    Returns:
        ``(batch, kept, vocabulary)`` and ``(batch, kept)``.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    targets = batch["labels"][:, 1:]
    kept = (targets != IGNORED).any(0).nonzero().flatten()
    if not len(kept):
        kept = torch.zeros(1, dtype=torch.long, device=targets.device)
    if keeps_logits(getattr(model, "module", model)):
        logits = model(**inputs, logits_to_keep=kept, use_cache=False).logits
    else:
        logits = model(**inputs, use_cache=False).logits[:, kept]
    return logits, targets[:, kept]


def lm_loss_sum(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Return a language model's fp32 loss summed over the batch's supervised tokens, and their number.

    It computes the logits of the whole batch at once; ``chunked_loss`` does not.

    Args:
        model: the model, or an engine around it.
        batch: ``input_ids``, ``attention_mask`` and ``labels``, each ``(batch, tokens)``.
    """
    logits, targets = supervised_logits(model, batch)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss, int((targets != IGNORED).sum())


def head_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return the head's outputs, ``(batch, num_labels)``, in fp32."""
    logits: Tensor = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    return logits.float()


def head_loss_sum(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Return a classification head's fp32 loss summed over the batch's rows, and the number that count.

    Args:
        model: the model, or an engine around it.
        batch: ``input_ids``, ``attention_mask`` ``(batch, tokens)``; ``labels`` ``(batch,)``, class ids or scores
            (``IGNORED`` or NaN where a row only fills up).
    """
    logits, labels = head_logits(model, batch), batch["labels"]
    if labels.is_floating_point():
        counted = ~labels.isnan()
        loss = ((logits[:, 0] - labels.nan_to_num()) ** 2 * counted).sum()
    else:
        counted = labels != IGNORED
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return loss, int(counted.sum())
