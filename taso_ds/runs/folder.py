"""The run folder: what a run leaves behind, written atomically by rank 0.

``run.json``, ``calibration.jsonl``, ``core_regions.safetensors``, ``core_regions.png``, ``adapter/`` (``model/`` for
full fine-tuning), ``metrics.jsonl``, ``results.json``.
"""

import errno
import importlib.metadata
import json
import logging
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taso_ds.data.encode import EncodedRow
from taso_ds.files.atomic import open_to_umask, replacing, write_json, writing
from taso_ds.training.checkpoint import CHECKPOINTS

log = logging.getLogger(__name__)

RUN, RESULTS, METRICS = "run.json", "results.json", "metrics.jsonl"
CALIBRATION, REGIONS, PICTURE = "calibration.jsonl", "core_regions.safetensors", "core_regions.png"
PARTIAL = "core_regions.partial.safetensors"  # scores of the finished passes; gone when scoring is done
ADAPTER, MODEL = "adapter", "model"
# The record last: a folder without one is taken for somebody else's.
ENTRIES = (RESULTS, METRICS, CALIBRATION, REGIONS, PICTURE, PARTIAL, ADAPTER, MODEL, CHECKPOINTS, RUN)
_VERSIONS = ("taso_ds", "torch", "deepspeed", "transformers", "peft", "datasets", "safetensors", "bitsandbytes")


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run. Nothing is created before ``start``."""

    path: Path

    def start(self) -> None:
        """Create the folder and remove what an earlier run left, aloud."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            old = [name for name in ENTRIES if os.path.lexists(self.path / name)]
            if old and old != [PARTIAL]:
                log.info("output_dir: %s: removes %s", self.path, ", ".join(old))
            for name in old:
                entry = self.path / name
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink(missing_ok=True)

    def write_json(self, name: str, value: Any) -> None:
        write_json(self.path / name, value)

    def log(self, metrics: dict[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``, or none of it where the disk is full."""
        path = self.path / METRICS
        with writing(path), path.open("ab", buffering=0) as file:
            end, line = file.tell(), (json.dumps(metrics) + "\n").encode()
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(end)
                raise

    def finish_scoring(self) -> None:
        """Remove the scores of single passes: the regions are written."""
        (self.path / PARTIAL).unlink(missing_ok=True)

    def forget_after(self, step: int) -> None:
        """Drop the metrics of steps that are done again, and of a line that was cut short."""
        path = self.path / METRICS
        if not path.is_file():
            return
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                log.warning("%s: a line that was cut short is dropped", path)
        with replacing(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")

    def write_rows(self, name: str, rows: Sequence[EncodedRow]) -> None:
        """Write encoded rows as JSON lines: enough for anyone to recompute the regions with plain autograd."""
        lines = []
        for row in rows:
            record: dict[str, Any] = {"input_ids": row.input_ids, "labels": row.labels}
            if not row.labels:
                record["labels"] = row.target
            if row.token_type_ids is not None:
                record["token_type_ids"] = row.token_type_ids
            lines.append(json.dumps(record) + "\n")
        with replacing(self.path / name) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")

    def write_folder(self, name: str, write: Callable[[Path], None]) -> Path:
        """Let ``write`` fill a temporary folder, then rename it: the folder exists whole or not at all.

        Raises:
            UserError: the disk is full, or the folder cannot be written.
        """
        temporary, final = self.path / f".{name}.tmp", self.path / name
        shutil.rmtree(temporary, ignore_errors=True)
        with writing(final):
            try:
                temporary.mkdir()
                write(temporary)
                open_to_umask(temporary)
                shutil.rmtree(final, ignore_errors=True)
                os.replace(temporary, final)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        return final


def versions() -> dict[str, str]:
    """Return the versions a run depends on."""
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        found[name] = importlib.metadata.version(name)
    return found
