"""When a loss counts as diverged."""

import math

import pytest

from taso_ds.training.divergence import WINDOW, LossWatch


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_not_finite(loss: float) -> None:
    watch = LossWatch(0.0)
    assert watch.problem(loss) == f"is {loss}"
    assert list(watch.recent) == []


def test_a_jump_above_the_median() -> None:
    watch = LossWatch(5.0)
    assert [watch.problem(loss) for loss in (2.0, 9.0, 2.0, 2.2)] == [None] * 4  # too few to compare the 9 with
    assert watch.problem(7.05) is None  # the median is 2.1
    problem = watch.problem(7.3)  # it is 2.2 now
    assert problem == "is 7.3000, more than 5 above 2.2000, the median of the steps before"
    assert len(watch.recent) == 5, "a bad loss is not compared with"


def test_zero_looks_at_finiteness_only() -> None:
    watch = LossWatch(0.0, [1.0] * 10)
    assert watch.problem(1e30) is None


def test_the_window_is_bounded_and_can_be_put_back() -> None:
    watch = LossWatch(5.0)
    for step in range(3 * WINDOW):
        watch.problem(float(step % 3))
    again = LossWatch(5.0, list(watch.recent))
    assert len(again.recent) == WINDOW
    assert [watch.problem(value) for value in (1.0, 6.5)] == [again.problem(value) for value in (1.0, 6.5)]
