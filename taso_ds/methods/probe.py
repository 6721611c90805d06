"""What an exported model is compared on with the live one: the logits of a few short rows, and how far they may differ.

Two computations of the same logits add in another order. In fp32 that stays below 1e-4 of them; in bf16 it makes what
one hidden element does that is rounded to its other neighbour.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from taso_ds.data.encode import EncodedRow

# Largest relative error of logits that are the same sums in another order, layer after layer.
ROUNDING = {"float32": 1e-4, "bfloat16": 2.0**-7}
# Largest relative error of logits after every adapted weight was rounded once more.
MERGE_ROUNDING = {"float32": 1e-4, "bfloat16": 6e-2}


def probe_rows(rows: Sequence[EncodedRow], *, number: int = 2, length: int = 64) -> list[list[int]]:
    """Return the first ``length`` tokens of the first ``number`` rows."""
    return [list(row.input_ids[:length]) for row in rows[:number]]


def probe_logits(model: nn.Module, rows: Sequence[list[int]]) -> list[Tensor]:
    """Return the logits of each row run alone: fp32, on the CPU; ``(tokens, vocabulary)`` or ``(labels,)``."""
    probed: list[Tensor] = []
    device = next(model.parameters()).device
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row], device=device)).logits[0]
            probed.append(logits.float().cpu())
    return probed


def relative_distance(values: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Return ``‖values − wanted‖ / ‖wanted‖`` over all tensors together."""
    differences = torch.cat([(one - other).flatten() for one, other in zip(values, wanted, strict=True)])
    return float(differences.norm() / torch.cat([value.flatten() for value in wanted]).norm())
