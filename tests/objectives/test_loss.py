"""Losses are sums over supervised units: against cross entropy written out, position by position."""

import math
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from taso_ds.data.encode import IGNORED
from taso_ds.objectives.loss import head_loss_sum, keeps_logits, lm_loss_sum, supervised_logits

BATCH = tiny_models.token_batch()


class WithoutSelection(nn.Module):
    """A model that always computes logits at every position, as models outside transformers do."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


def longhand(logits: Tensor, labels: Tensor) -> tuple[float, int]:
    """-log softmax(logits at position t - 1)[label at t], summed over supervised t ≥ 1."""
    total, number = 0.0, 0
    for row in range(labels.shape[0]):
        for position in range(1, labels.shape[1]):
            label = int(labels[row, position])
            if label == -100:
                continue
            scores = logits[row, position - 1].double().tolist()
            total += math.log(math.fsum(math.exp(score) for score in scores)) - scores[label]
            number += 1
    return total, number


@pytest.mark.parametrize("make", [tiny_models.llama, tiny_models.gpt2])
@pytest.mark.parametrize("selecting", [True, False], ids=["logits_to_keep", "all logits"])
def test_the_sum_is_cross_entropy_written_out(make: Any, selecting: bool) -> None:
    model = make()
    tested = model if selecting else WithoutSelection(model)
    assert keeps_logits(tested) is selecting
    full = model(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"]).logits
    expected, number = longhand(full, BATCH["labels"])
    loss, units = lm_loss_sum(tested, BATCH)
    # 3 rows of 12 tokens, 4 of them prompt: 8 supervised, less 3 of padding in the last row.
    assert units == number == 8 + 8 + 5
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_logits_are_computed_where_some_row_is_supervised_and_nowhere_else() -> None:
    seen: list[int] = []
    model = tiny_models.llama()
    model.lm_head.register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[1]))
    logits, targets = supervised_logits(model, BATCH)
    # Positions 3 to 10 predict tokens 4 to 11.
    assert seen == [8]
    assert logits.shape == (3, 8, tiny_models.VOCABULARY)
    assert targets.shape == (3, 8)
    assert (targets != IGNORED).sum() == 21


def test_the_first_label_is_predicted_by_nothing() -> None:
    batch = {**BATCH, "labels": BATCH["input_ids"].clone()}
    batch["labels"][:, 2:] = IGNORED
    loss, units = lm_loss_sum(tiny_models.llama(), batch)
    assert units == 3  # token 1 of three rows; token 0 has a label too
    logits = tiny_models.llama()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert loss.item() == pytest.approx(longhand(logits, batch["labels"])[0], rel=1e-5)


def test_an_empty_batch_is_zero_with_a_gradient() -> None:
    """It runs the output layer once all the same: ranks must issue the same collectives."""
    calls: list[int] = []
    model = tiny_models.llama()
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    loss, units = lm_loss_sum(model, {**BATCH, "labels": torch.full_like(BATCH["labels"], IGNORED)})
    assert (loss.item(), units) == (0.0, 0)
    assert calls == [1]
    loss.backward()
    gradients = [value.grad for value in model.parameters()]
    assert all(value is not None and not value.any() for value in gradients)


def test_bf16_logits_are_summed_in_fp32() -> None:
    model = tiny_models.llama().bfloat16()
    loss, _ = lm_loss_sum(model, BATCH)
    logits = model(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"]).logits
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(longhand(logits.float(), BATCH["labels"])[0], rel=1e-3)


@pytest.mark.parametrize("head", [False, True])
def test_sums_add_up_over_any_split(head: bool) -> None:
    if head:
        batch = {key: BATCH[key] for key in ("input_ids", "attention_mask")} | {"labels": torch.tensor([1, 0, 1])}
        model, loss_sum = tiny_models.bert(), head_loss_sum
    else:
        batch, model, loss_sum = BATCH, tiny_models.llama(), lm_loss_sum
    whole, units = loss_sum(model, batch)
    parts = [loss_sum(model, {key: value[row : row + 1] for key, value in batch.items()}) for row in range(3)]
    assert sum(number for _, number in parts) == units
    assert sum(loss.item() for loss, _ in parts) == pytest.approx(whole.item(), rel=1e-5)


# Classification heads -------------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """A head that answers what it was told to."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, input_ids: Tensor) -> Any:
        return type("Output", (), {"logits": self.logits})


def batch_of(labels: Tensor) -> dict[str, Tensor]:
    return {"input_ids": torch.zeros(len(labels), 2, dtype=torch.long), "labels": labels}


def test_classes_by_hand_with_a_filler() -> None:
    model = Fixed([[0.0, 0.0], [math.log(3.0), 0.0], [9.0, -9.0]])
    loss, units = head_loss_sum(model, batch_of(torch.tensor([0, 1, IGNORED])))
    # -log(1/2) - log(1/4); the third row only fills up.
    assert units == 2
    assert loss.item() == pytest.approx(math.log(2.0) + math.log(4.0))


def test_regression_by_hand_with_a_filler() -> None:
    model = Fixed([[1.0], [2.5], [7.0]])
    loss, units = head_loss_sum(model, batch_of(torch.tensor([3.0, 2.0, float("nan")])))
    # (1 - 3)² + (2.5 - 2)²
    assert units == 2
    assert loss.item() == pytest.approx(4.25)
    loss.backward()
    assert model.logits.grad is not None
    assert model.logits.grad.tolist() == [[-4.0], [1.0], [0.0]]  # 2 (y - t); the filler pulls at nothing


def test_only_fillers() -> None:
    for labels in (torch.tensor([IGNORED]), torch.tensor([float("nan")])):
        loss, units = head_loss_sum(Fixed([[0.5, 1.0]]), batch_of(labels))
        assert (loss.item(), units) == (0.0, 0)
