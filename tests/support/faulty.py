"""Faults planted into a rank: at the n-th call of a function that a run passes, something goes wrong.

A fault is a JSON object: ``rank``, ``point`` (``module:attribute`` of a function), ``call`` (counted from 1), and what
happens: ``returns``, what the call returns instead; or, ``when`` it is ``before`` or ``after`` the call, an ``error``
that is raised, or a ``signal`` (its number) that strikes this rank or, with ``all``, the whole group.
"""

import importlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# phase: functions that are called in it, as module:attribute. Those of os make a file or a rename last.
POINTS: dict[str, tuple[str, ...]] = {
    "load": ("taso_ds.files.safetensors_ranges:SafetensorsCheckpoint.read_into", "taso_ds.runs.train:open_job"),
    "scoring": ("taso_ds.scoring.gradient_sum:GradientSum.add", "taso_ds.scoring.partial_scores:PartialScores.write"),
    "region exchange": ("taso_ds.scoring.score:_share", "taso_ds.scoring.score:_assert_agreement"),
    "training": ("taso_ds.training.trainer:Trainer.step", "taso_ds.training.trainer:agree"),
    "checkpoint": (
        "os:fsync",
        "os:rename",
        "taso_ds.training.saver:stream_tensors",
        "taso_ds.training.saver:Saver.save",
    ),
    "files": ("os:replace", "taso_ds.runs.train:write_regions"),
    "export": ("taso_ds.methods.taso:Taso.save", "taso_ds.runs.train:save"),
}


def plant(faults: Sequence[dict[str, Any]], folder: Path) -> None:
    """Make the calls that the faults name go wrong; the moment is left in ``folder``."""
    for fault in faults:
        if "returns" in fault:
            _return_instead(fault["point"], fault["call"], fault["returns"])
            continue
        calls = Counter[str]()

        def strike(name: str, when: str, fault: dict[str, Any] = fault, calls: Counter[str] = calls) -> None:
            calls[when] += 1
            if (calls[when], when) == (fault["call"], fault["when"]):
                (folder / "struck").write_text(str(time.time()))
                if "error" in fault:
                    raise RuntimeError(fault["error"])
                send = os.killpg if fault["all"] else os.kill
                send(os.getpgrp() if fault["all"] else os.getpid(), fault["signal"])

        _wrap(fault["point"], strike)


def count_calls(file: Path, places: Sequence[str]) -> None:
    """Count the calls at these places from now on; the file, once there is a call, always holds the last state."""
    calls = Counter[str]()

    def count(name: str, when: str) -> None:
        if when == "before":
            calls[name] += 1
            with file.open("w") as out:
                json.dump(calls, out)

    for place in places:
        _wrap(place, count)


def find(place: str) -> tuple[Any, str]:
    """Return what holds a function, and the function's name there."""
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    return owner, name


def _return_instead(place: str, call: int, value: Any) -> None:
    owner, name = find(place)
    original, calls = getattr(owner, name), Counter[str]()

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[place] += 1
        return value if calls[place] == call else original(*args, **kwargs)

    setattr(owner, name, wrapped)


def _wrap(place: str, notice: Callable[[str, str], None]) -> None:
    owner, name = find(place)
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        notice(place, "before")
        result = original(*args, **kwargs)
        notice(place, "after")
        return result

    setattr(owner, name, wrapped)
