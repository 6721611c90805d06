"""What a run says of its stages."""

import logging

import pytest

from taso_ds.runs.stages import Stages, in_words


def test_each_stage_says_what_comes_next(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock starts anew with each; one that is not ahead is passed over."""
    times = iter([0.0, 4.1, 5.0, 90.0, 90.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    stages = Stages(["scoring", "training"])
    with caplog.at_level(logging.INFO):
        stages.done("loading", "llama")
        stages.done("scoring", "128 rows", next_is="24 steps")
        stages.done("training", "24 steps")
        stages.done("proof", "runs/a")
    assert caplog.messages == [
        "scoring: 128 rows in 4.1 s; next: training, 24 steps",
        "training: 24 steps in 1 min 25 s",
    ]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (59.9, "59.9 s"), (59.96, "1 min 0 s"), (200.0, "3 min 20 s"), (7500.0, "2 h 5 min")],
)
def test_times_as_people_say_them(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
