"""Faults planted into a rank: at the n-th call of a function of the trainer, a signal arrives.

A fault is a JSON object: ``rank``, ``point`` (a key of ``POINTS``), ``call`` (counted from 1), ``when`` (``before`` or
``after`` the call) and ``signal`` (a number).
"""

import importlib
import os
import signal
from collections.abc import Sequence
from typing import Any

# name: the functions that a run passes there, as module:attribute
POINTS: dict[str, tuple[str, ...]] = {
    "load": ("taso_ds.training.load_sharded:_fill",),
    "step": ("taso_ds.training.trainer:Trainer.step",),
}


def plant(faults: Sequence[dict[str, Any]]) -> None:
    """Make the calls that the faults name deadly."""
    for fault in faults:
        for place in POINTS[fault["point"]]:
            _wrap(place, fault)


def _wrap(place: str, fault: dict[str, Any]) -> None:
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), 0

    def faulty(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fault["call"] and fault["when"] == "before":
            _strike(fault)
        result = original(*args, **kwargs)
        if calls == fault["call"] and fault["when"] == "after":
            _strike(fault)
        return result

    setattr(owner, name, faulty)


def _strike(fault: dict[str, Any]) -> None:
    os.kill(os.getpid(), fault.get("signal", signal.SIGKILL))
