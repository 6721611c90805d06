"""``metrics.jsonl``: what a run tells of its steps, and what it takes back."""

import json
from pathlib import Path
from typing import Any

from taso_ds.reports.metrics_file import METRICS, MetricsFile
from taso_ds.reports.observer import StepMetrics


def step(number: int) -> StepMetrics:
    return {
        "step": number,
        "epoch": 0.5,
        "loss": 0.5,
        "grad_norm": 1.0,
        "learning_rate": {"adapter": 1e-3},
        "tokens": 12,
    }


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def test_metrics_are_lines_in_order(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path)
    metrics.on_start({}, 0)
    assert not (tmp_path / METRICS).exists()
    metrics.on_step(step(1))
    metrics.on_step(step(2))
    metrics.on_eval(2, {"accuracy": 0.5})
    assert lines_of(tmp_path) == [step(1), step(2), {"step": 2, "eval": {"accuracy": 0.5}}]


def test_metrics_of_steps_that_are_done_again_are_dropped(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path)
    for number in (1, 2, 3):
        metrics.on_step(step(number))
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 4, "lo')  # the process was killed while it wrote
    MetricsFile(tmp_path).on_start({}, 2)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]


def test_a_rollback_drops_later_steps_and_says_so(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path)
    for number in (1, 2, 3):
        metrics.on_step(step(number))
    metrics.on_rollback(2, number=1, factor=0.5)
    assert lines_of(tmp_path) == [step(1), step(2), {"step": 2, "rollback": 1, "learning_rate_factor": 0.5}]
