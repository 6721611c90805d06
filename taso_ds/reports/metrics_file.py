"""``metrics.jsonl``: one JSON object a line, with the number of steps done on each."""

import errno
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from taso_ds.files.atomic import replacing, writing
from taso_ds.reports.observer import Observer, StepMetrics

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


class MetricsFile(Observer):
    """Writes steps, evaluations and rollbacks into the folder of a run, as they come."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / METRICS

    def on_start(self, record: Mapping[str, object], step: int) -> None:
        self._forget_after(step)

    def on_step(self, metrics: StepMetrics) -> None:
        self._append(metrics)

    def on_eval(self, step: int, scores: Mapping[str, float]) -> None:
        self._append({"step": step, "eval": scores})

    def on_rollback(self, step: int, *, number: int, factor: float) -> None:
        self._forget_after(step)
        self._append({"step": step, "rollback": number, "learning_rate_factor": factor})

    def _append(self, line: Mapping[str, object]) -> None:
        """Append one line, or none of it where the disk is full."""
        with writing(self._path), self._path.open("ab", buffering=0) as file:
            end, encoded = file.tell(), (json.dumps(line) + "\n").encode()
            try:
                if file.write(encoded) < len(encoded):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(end)
                raise

    def _forget_after(self, step: int) -> None:
        """Drop the lines of steps that are done again, and a line that was cut short."""
        if not self._path.is_file():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                log.warning("%s: a line that was cut short is dropped", self._path)
        with replacing(self._path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")
