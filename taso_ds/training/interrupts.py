"""Signals of a scheduler: SIGTERM (pre-emption, ``scancel``) and SIGUSR1 (time limit ahead).

While training, a signal is remembered until the step's end, where all ranks learn of it, save a checkpoint and leave
together; at any other time there is nothing to save that is not on the disk, and the process leaves at once. The exit
code says "start me again", so that a batch script can requeue.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from taso_ds.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Interrupts:
    """What arrives while a run is going on. Inside ``with interrupts:`` signals are ours."""

    def __init__(self) -> None:
        self.arrived: str | None = None
        self._deferring = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Interrupts":
        self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Remember signals instead of leaving: whoever enters asks for ``arrived``."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.arrived = signal.Signals(number).name
        if not self._deferring:
            raise Interrupted(f"stopped by {self.arrived}; the same command goes on from what is saved")
