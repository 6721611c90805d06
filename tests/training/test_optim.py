"""Learning rates: the schedule by hand and against transformers, and groups whose ratio never changes."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from taso_ds.training.arguments import SCHEDULES, TrainArguments
from taso_ds.training.optim import (
    Schedule,
    describe_groups,
    learning_rate_table,
    make_group,
    make_optimizer,
    make_schedule,
    total_steps,
)


def shares(schedule: Schedule) -> list[float]:
    return [schedule(step) for step in range(schedule.total_steps)]


# The schedule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # 8 steps, the first 3 of them warm-up: thirds, the third step at the peak. Then 5 steps at progress 0, 1/5, ...
        ("linear", [1 / 3, 2 / 3, 1, 1, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [1 / 3, 2 / 3, 1, *(0.5 * (1 + math.cos(math.pi * n / 5)) for n in range(5))]),
        ("constant_with_warmup", [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1]),
        ("constant", [1] * 8),
    ],
)
def test_by_hand(kind: str, expected: list[float]) -> None:
    assert shares(Schedule(kind, total_steps=8, warmup_steps=3)) == pytest.approx(expected)


def test_without_warm_up_the_first_step_is_at_the_peak() -> None:
    assert shares(Schedule("linear", 4, 0)) == [1.0, 0.75, 0.5, 0.25]
    assert shares(Schedule("cosine", 2, 0)) == pytest.approx([1.0, 0.5])  # (1 + cos(π/2)) / 2
    assert shares(Schedule("linear", 1, 0)) == [1.0]


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(("total", "warmup"), [(20, 0), (20, 6), (7, 3)])
def test_has_transformers_shape_after_the_warm_up(kind: str, total: int, warmup: int) -> None:
    """During the warm-up transformers starts at 0, a step that would train nothing; from its end on the two agree."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs: Any = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    ours = Schedule(kind, total, warmup)
    for step in range(total):
        expected = theirs.lr_lambdas[0](step)
        if step >= warmup or kind == "constant":
            assert ours(step) == pytest.approx(expected, abs=1e-12)
        else:
            assert ours(step) == pytest.approx(expected + 1 / warmup)  # one step ahead


@given(st.sampled_from(SCHEDULES), st.integers(1, 300), st.floats(0.0, 1.0))
def test_no_step_runs_at_zero_and_none_above_the_peak(kind: str, total: int, ratio: float) -> None:
    schedule = make_schedule(TrainArguments(lr_scheduler_type=kind, warmup_ratio=ratio), total)
    assert schedule.total_steps == total
    found = shares(schedule)
    assert all(0.0 < share <= 1.0 for share in found)
    assert max(found) == 1.0  # the peak is reached


def test_the_warm_up_is_rounded_up() -> None:
    def warmup(ratio: float, total: int) -> int:
        return make_schedule(TrainArguments(warmup_ratio=ratio), total).warmup_steps

    # ⌈0.03 · 100⌉ = 3, ⌈0.03 · 10⌉ = 1, none, all
    assert [warmup(0.03, 100), warmup(0.03, 10), warmup(0.0, 10), warmup(1.0, 10)] == [3, 1, 0, 10]


@pytest.mark.parametrize(
    ("training", "per_epoch", "expected"),
    [
        (TrainArguments(num_train_epochs=3.0), 7, 21),
        (TrainArguments(num_train_epochs=0.5), 7, 4),  # ⌈3.5⌉
        (TrainArguments(num_train_epochs=0.01), 7, 1),
        (TrainArguments(num_train_epochs=3.0, max_steps=5), 7, 5),
    ],
)
def test_total_steps(training: TrainArguments, per_epoch: int, expected: int) -> None:
    assert total_steps(training, per_epoch) == expected


# Groups ---------------------------------------------------------------------------------------------------------------


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape))


def test_the_adapter_is_compensated_and_nothing_else() -> None:
    adapter, head, bias = parameter(50), parameter(2, 4), parameter(6)
    training = TrainArguments(learning_rate=2e-4, weight_decay=0.1)
    groups = [
        make_group(training, "adapter", [adapter], rho=0.9),
        make_group(training, "head", [head]),
        make_group(training, "norms_and_biases", [bias], decays=False),
    ]
    found = {group.name: (group.rho, group.factor, group.peak, group.weight_decay) for group in groups}
    root = math.sqrt(10.0)
    assert found == {
        "adapter": (0.9, pytest.approx(root), pytest.approx(2e-4 * root), 0.1),
        "head": (0.0, 1.0, 2e-4, 0.1),
        "norms_and_biases": (0.0, 1.0, 2e-4, 0.0),
    }
    assert [group.parameters for group in groups] == [[adapter], [head], [bias]]


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_ratio_between_groups_is_the_factor_at_every_step(kind: str) -> None:
    training = TrainArguments(learning_rate=3e-4, lr_scheduler_type=kind, warmup_ratio=0.3)
    adapter = make_group(training, "adapter", [parameter(3)], rho=0.9)
    head = make_group(training, "head", [parameter(3)])
    schedule = make_schedule(training, 10)
    for step in range(10):
        ratio = adapter.peak * schedule(step) / (head.peak * schedule(step))
        assert ratio == pytest.approx(math.sqrt(10.0), rel=1e-12)


def test_the_table_and_its_words() -> None:
    training = TrainArguments(learning_rate=1e-3, warmup_ratio=0.5, weight_decay=0.01)
    groups = [
        make_group(training, "adapter", [parameter(1500)], rho=0.75),
        make_group(training, "head", [parameter(2, 4), parameter(2)]),
    ]
    table = learning_rate_table(groups, make_schedule(training, 4))
    # 2 warm-up steps of 4: 1/2, 1, then 1, 1/2 of the peak; √(1 / 0.25) = 2.
    assert table == [
        {
            "group": "adapter", "parameters": 1500, "rho": 0.75, "factor": 2.0, "first": pytest.approx(1e-3),
            "peak": pytest.approx(2e-3), "last": pytest.approx(1e-3), "weight_decay": 0.01,
        },
        {
            "group": "head", "parameters": 10, "rho": 0.0, "factor": 1.0, "first": pytest.approx(5e-4),
            "peak": pytest.approx(1e-3), "last": pytest.approx(5e-4), "weight_decay": 0.01,
        },
    ]  # fmt: skip
    assert describe_groups(table) == [
        "group adapter: 1,500 parameters, rho 0.7500, factor 2.0000,"
        " learning rate first 1.000e-03, peak 2.000e-03, last 1.000e-03",
        "group head: 10 parameters, rho 0.0000, factor 1.0000,"
        " learning rate first 5.000e-04, peak 1.000e-03, last 5.000e-04",
    ]  # fmt: skip


def test_the_optimizer_has_the_groups_in_their_order_and_the_runs_numbers() -> None:
    training = TrainArguments(learning_rate=1e-3, weight_decay=0.2, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    groups = [
        make_group(training, "adapter", [parameter(3)], rho=0.75),
        make_group(training, "head", [parameter(2)]),
    ]
    optimizer = make_optimizer(groups, training)
    assert [group["name"] for group in optimizer.param_groups] == ["adapter", "head"]
    for live, group in zip(optimizer.param_groups, groups, strict=True):
        assert live["params"] == group.parameters
        assert live["lr"] == group.peak
        assert (live["betas"], live["eps"], live["weight_decay"]) == ((0.8, 0.95), 1e-6, 0.2)
