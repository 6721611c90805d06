"""The loop with an engine made of plain torch: what it logs, when it calls its hooks, and how it stops."""

import math
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import tiny_models
import torch
from plain_engine import PlainEngine
from torch import Tensor, nn

from taso_ds.data import batch_plan
from taso_ds.data.batch_plan import BatchPlan
from taso_ds.data.collate import collate
from taso_ds.data.encode import EncodedRow
from taso_ds.errors import UserError
from taso_ds.reports.observer import Observer, StepMetrics
from taso_ds.training.arguments import BatchSizes, TrainArguments
from taso_ds.training.feed import Feed
from taso_ds.training.optim import Schedule, make_group, make_optimizer
from taso_ds.training.trainer import Diverged, Trainer

pytestmark = pytest.mark.usefixtures("on_cpu")

ROWS = [EncodedRow([3 + n, 4 + n, 5], [-100, 4 + n, 5]) for n in range(7)]  # two supervised tokens each
SIZES = BatchSizes(2, 2, 1)  # 4 rows a step: an epoch is a step of 4 and a step of 3


@pytest.fixture(autouse=True)
def _in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows come as they stand, for losses by hand."""
    monkeypatch.setattr(batch_plan, "_permutation", lambda num_rows, _seed, _epoch: torch.arange(num_rows))


class Seen(Observer):
    """The engine of a run, and what was seen of it."""

    trainer: Trainer

    def __init__(self, engine: PlainEngine) -> None:
        self.engine = engine
        self.logs: list[StepMetrics] = []
        self.evals: list[int] = []
        self.saves: list[int] = []

    def on_step(self, metrics: StepMetrics) -> None:
        self.logs.append(metrics)

    def on_eval(self, step: int, scores: Mapping[str, float]) -> None:
        assert scores == {"loss": 0.0}
        self.evals.append(step)


def run(loss_sum: Any, weight: nn.Parameter, *, steps: int = 4, **changes: Any) -> Seen:
    """Train one weight on whatever ``loss_sum`` says; returns the engine and what was seen."""
    training = TrainArguments(learning_rate=0.1)
    groups = [make_group(training, "adapter", [weight], rho=0.75)]
    engine = PlainEngine(make_optimizer(groups, training), SIZES.grad_accum_steps)
    seen = Seen(engine)
    plan = BatchPlan(len(ROWS), SIZES.global_batch_size, seed=0)
    options = {"logging_steps": 1, "eval_steps": None} | changes
    trainer = Trainer(
        engine, Feed(ROWS, plan, SIZES, partial(collate, pad_id=0)), loss_sum=loss_sum, groups=groups,
        schedule=Schedule("linear", steps, 0), observer=seen, evaluate=lambda: {"loss": 0.0}, **options,
    )  # fmt: skip
    seen.trainer = trainer
    trainer.fit(save=seen.saves.append)
    return seen


def quadratic(weight: Tensor, _engine: Any, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Each supervised token with label t costs (w - t)² / 2."""
    labels = batch["labels"][:, 1:]
    counted = labels != -100
    return (0.5 * (weight - labels) ** 2 * counted).sum(), int(counted.sum())


def test_logs_the_mean_over_supervised_units() -> None:
    weight = nn.Parameter(torch.zeros(()))
    seen = run(partial(quadratic, weight), weight, steps=1)
    # Rows 0 to 3 hold the labels 4, 5 | 5, 5 | 6, 5 | 7, 5: their half squares at w = 0 sum to 113 over 8 units, and
    # the gradient is minus their mean, 42 / 8.
    labels = [4, 5, 5, 5, 6, 5, 7, 5]
    assert seen.logs[0]["loss"] == pytest.approx(sum(label**2 for label in labels) / 2 / 8)
    assert seen.logs[0]["grad_norm"] == pytest.approx(sum(labels) / 8)
    assert seen.logs[0]["tokens"] == 12
    assert seen.logs[0]["learning_rate"] == {"adapter": pytest.approx(0.2)}  # 0.1 · √(1 / 0.25)


def test_a_short_last_batch_counts_its_own_units() -> None:
    weight = nn.Parameter(torch.zeros(()))
    seen = run(partial(quadratic, weight), weight, steps=2)
    labels = [8, 5, 9, 5, 10, 5]  # rows 4 to 6: 6 units, not 8
    moved = 0.2  # Adam's first step is the learning rate, 0.1 · 2
    assert seen.logs[1]["loss"] == pytest.approx(sum((moved - label) ** 2 for label in labels) / 2 / 6)
    assert seen.logs[1]["epoch"] == 1.0


def test_the_schedule_reaches_the_optimizer_before_each_step() -> None:
    weight = nn.Parameter(torch.zeros(()))
    seen = run(partial(quadratic, weight), weight, steps=4)
    # Linear without warm-up: 1, 3/4, 1/2, 1/4 of 0.2.
    assert seen.engine.rates == [[pytest.approx(rate)] for rate in (0.2, 0.15, 0.1, 0.05)]
    assert [line["learning_rate"]["adapter"] for line in seen.logs] == [rate for (rate,) in seen.engine.rates]
    assert seen.engine.micro_steps == 4 * SIZES.grad_accum_steps


def test_hooks_come_when_asked_for() -> None:
    weight = nn.Parameter(torch.zeros(()))
    seen = run(partial(quadratic, weight), weight, steps=7, logging_steps=3, eval_steps=2)
    assert [line["step"] for line in seen.logs] == [3, 6, 7]  # the last step always
    assert seen.evals == [2, 4, 6]
    seen = run(partial(quadratic, weight), weight, steps=4, eval_steps=2)
    assert seen.evals == [2]  # the run evaluates after the last step itself


def test_a_checkpoint_is_due_by_number_and_at_the_end() -> None:
    weight = nn.Parameter(torch.zeros(()))
    assert run(partial(quadratic, weight), weight, steps=5, save_steps=2).saves == [2, 4, 5]
    assert run(partial(quadratic, weight), weight, steps=4).saves == [4]


def test_a_checkpoint_is_due_once_the_minutes_have_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    def saves(**when: Any) -> list[int]:
        weight, now = nn.Parameter(torch.zeros(())), time.monotonic()

        def slow(engine: Any, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
            nonlocal now
            now += 30.0  # two micro-batches: a step takes a minute
            return quadratic(weight, engine, batch)

        with monkeypatch.context() as patch:
            patch.setattr(time, "monotonic", lambda: now)
            return run(slow, weight, steps=7, **when).saves

    assert saves(save_minutes=1.5) == [2, 4, 6, 7]
    assert saves(save_minutes=2.5, save_steps=5) == [3, 5, 7]  # one by number counts as well
    assert saves(save_minutes=None) == saves(save_minutes=60.0) == [7]


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_its_rows() -> None:
    weight = nn.Parameter(torch.zeros(()))
    seen: list[float] = []

    def poisoned(_engine: Any, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        seen.append(weight.item())
        loss, units = quadratic(weight, None, batch)
        return (loss * math.nan if (batch["input_ids"][:, 0] == 3 + 5).any() else loss), units

    # Step 2 has the micro-batches [4, 5] and [6]; row 5 starts with token 8.
    with pytest.raises(Diverged, match=r"the loss of step 2 is nan on training rows \[4, 5\]") as caught:
        run(poisoned, weight)
    assert caught.value.good_steps == 1
    assert weight.item() == seen[-1] == pytest.approx(0.2)  # as step 1 left it


def test_a_first_step_that_moves_nothing_is_an_error() -> None:
    weight = nn.Parameter(torch.zeros(()))
    with pytest.raises(UserError, match="no gradient reached the trained parameters"):
        run(lambda _e, batch: (quadratic(weight.detach(), None, batch)[0] + 0.0 * weight, 2), weight)


@pytest.mark.parametrize(("slope", "norm"), [(torch.sqrt, "inf"), (lambda w: torch.sqrt(w) * 0.0 + w * 1.0, "nan")])
def test_a_gradient_that_is_not_finite_is_an_error(slope: Any, norm: str) -> None:
    weight = nn.Parameter(torch.zeros(()))  # √w is finite at 0 and has an infinite slope
    with pytest.raises(UserError, match=rf"the gradient norm of step 1 is {norm}; lower --learning_rate"):
        run(lambda _e, _b: (slope(weight), 2), weight)


def test_learns_with_a_real_model() -> None:
    model = tiny_models.llama()
    weight = model.lm_head.weight
    model.requires_grad_(False)
    weight.requires_grad_(True)
    from taso_ds.objectives.loss import lm_loss_sum

    seen = run(lambda _engine, batch: lm_loss_sum(model, batch), weight, steps=12)
    assert seen.logs[-1]["loss"] < 0.5 * seen.logs[0]["loss"]
