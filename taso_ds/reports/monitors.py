"""The monitors of a run, by name."""

from collections.abc import Callable
from pathlib import Path

from taso_ds.reports.metrics_file import MetricsFile
from taso_ds.reports.observer import Observer, Observers

# each is made from the folder of the run
MONITORS: dict[str, Callable[[Path], Observer]] = {"metrics": MetricsFile}


def watch(folder: Path) -> Observer:
    """Return what watches the run in ``folder``."""
    return Observers([make(folder) for make in MONITORS.values()])
