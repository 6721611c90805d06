"""The run folder: what a run leaves behind, written atomically by rank 0.

``run.json``, ``calibration.jsonl``, ``core_regions.safetensors``, ``core_regions.png``, ``adapter/`` (``model/`` for
full fine-tuning), ``metrics.jsonl``, ``results.json``, ``log.txt``.
"""

import importlib.metadata
import json
import logging
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from taso_ds.console import screen as console
from taso_ds.data.encode import EncodedRow
from taso_ds.distributed import environment
from taso_ds.files.atomic import replacing, write_json, writing
from taso_ds.methods.folders import ADAPTER, MODEL
from taso_ds.reports.metrics_file import METRICS
from taso_ds.training.checkpoint import CHECKPOINTS

log = logging.getLogger(__name__)

RUN, RESULTS = "run.json", "results.json"
CALIBRATION, REGIONS, PICTURE = "calibration.jsonl", "core_regions.safetensors", "core_regions.png"
PARTIAL = "core_regions.partial.safetensors"  # scores of the finished passes; gone when scoring is done
LOG = "log.txt"  # what libraries said, and our lines among it
# The record last: a folder without one is taken for somebody else's.
ENTRIES = (RESULTS, METRICS, CALIBRATION, REGIONS, PICTURE, PARTIAL, ADAPTER, MODEL, CHECKPOINTS, LOG, RUN)
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

    def write_json(self, name: str, value: object) -> None:
        write_json(self.path / name, value)

    def keep_log(self) -> None:
        """Let the log file lie here from now on; on other nodes, which may see another disk, it stays where it is."""
        if environment.rank() < environment.local_world_size():
            console.keep_log(self.path / LOG)

    def finish_scoring(self) -> None:
        """Remove the scores of single passes: the regions are written."""
        (self.path / PARTIAL).unlink(missing_ok=True)

    def write_rows(self, name: str, rows: Sequence[EncodedRow]) -> None:
        """Write encoded rows as JSON lines: enough for anyone to recompute the regions with plain autograd."""
        lines = []
        for row in rows:
            record: dict[str, object] = {"input_ids": row.input_ids, "labels": row.labels}
            if not row.labels:
                record["labels"] = row.target
            if row.token_type_ids is not None:
                record["token_type_ids"] = row.token_type_ids
            lines.append(json.dumps(record) + "\n")
        with replacing(self.path / name) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")


def versions() -> dict[str, str]:
    """Return the versions a run depends on."""
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        found[name] = importlib.metadata.version(name)
    return found
