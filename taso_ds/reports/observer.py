"""What watches a run: a monitor sees its record, logged steps, evaluations, checkpoints and results.

A new monitor is one class in a file of this room and one entry of ``monitors.MONITORS``.
"""

from collections.abc import Mapping, Sequence
from typing import TypedDict


class _Step(TypedDict):
    step: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: dict[str, float]
    tokens: int


class StepMetrics(_Step, total=False):
    """What the loop says of a step; ``step`` counts from 1, the learning rate is each group's."""

    tokens_per_second: float


class Observer:
    """Sees a run on rank 0. Nothing happens here: a monitor overrides what it wants to see."""

    def on_start(self, record: Mapping[str, object], step: int) -> None:
        """Training is about to go on after ``step`` steps: what was seen of later ones is void.

        Args:
            record: the content of ``run.json``.
        """

    def on_step(self, metrics: StepMetrics) -> None:
        """A step that is to be logged is done."""

    def on_eval(self, step: int, scores: Mapping[str, float]) -> None:
        """The model was evaluated after ``step`` steps, between the first and the last."""

    def on_save(self, step: int) -> None:
        """The checkpoint of ``step`` is written."""

    def on_rollback(self, step: int, *, number: int, factor: float) -> None:
        """Training diverged and goes back to ``step``: what was seen of later ones is void.

        Args:
            number: how often it has gone back.
            factor: what all learning rates are multiplied with from here on.
        """

    def on_end(self, results: Mapping[str, object]) -> None:
        """The run is finished; ``results`` is the content of ``results.json``."""


class Observers(Observer):
    """Several observers as one, told in their order."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = observers

    def on_start(self, record: Mapping[str, object], step: int) -> None:
        for observer in self._observers:
            observer.on_start(record, step)

    def on_step(self, metrics: StepMetrics) -> None:
        for observer in self._observers:
            observer.on_step(metrics)

    def on_eval(self, step: int, scores: Mapping[str, float]) -> None:
        for observer in self._observers:
            observer.on_eval(step, scores)

    def on_save(self, step: int) -> None:
        for observer in self._observers:
            observer.on_save(step)

    def on_rollback(self, step: int, *, number: int, factor: float) -> None:
        for observer in self._observers:
            observer.on_rollback(step, number=number, factor=factor)

    def on_end(self, results: Mapping[str, object]) -> None:
        for observer in self._observers:
            observer.on_end(results)
