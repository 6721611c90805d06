"""The run folder: what a run leaves behind, written atomically by rank 0, and who may write where.

``run.json``, ``calibration.jsonl``, ``core_regions.safetensors``, ``core_regions.png``, ``adapter/`` (``model/`` for
full fine-tuning), ``metrics.jsonl``, ``results.json``.
"""

import contextlib
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

from taso_ds.adapters.files import open_to_umask, replacing, write_json, writing
from taso_ds.config import RunConfig
from taso_ds.data.encode import EncodedRow
from taso_ds.errors import UserError
from taso_ds.training.checkpoint import CHECKPOINTS, resolve_checkpoint

log = logging.getLogger(__name__)

RUN, RESULTS, METRICS = "run.json", "results.json", "metrics.jsonl"
CALIBRATION, REGIONS, PICTURE = "calibration.jsonl", "core_regions.safetensors", "core_regions.png"
PARTIAL = "core_regions.partial.safetensors"  # scores of the finished passes; gone when scoring is done
ADAPTER, MODEL = "adapter", "model"
# The record last: a folder without one is taken for somebody else's.
_ENTRIES = (RESULTS, METRICS, CALIBRATION, REGIONS, PICTURE, PARTIAL, ADAPTER, MODEL, CHECKPOINTS, RUN)
_VERSIONS = ("taso_ds", "torch", "deepspeed", "transformers", "peft", "datasets", "safetensors", "bitsandbytes")


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run. Nothing is created before ``start``."""

    path: Path

    def start(self) -> None:
        """Create the folder and remove what an earlier run left."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            for name in _ENTRIES:
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


def choose_folder(config: RunConfig) -> Path:
    """Return the folder of this run: the one asked for, that of the checkpoint to resume from, or the first free
    ``runs/<method>-<task>[-N]``.

    Raises:
        UserError: when it cannot be written, or holds something else than a run.
    """
    if _is_ours_to_name(config):
        first = Path("runs") / f"{config.adapter.method}-{config.data.task}"
        number = 1
        path = first
        while path.exists():
            number += 1
            path = first.with_name(f"{first.name}-{number}")
    elif config.run.output_dir is None:
        path = resolve_checkpoint(Path(config.run.resume)).parent.parent
    else:
        path = Path(config.run.output_dir)
        _check_apart(path, config)
        _check_content(path, config)
    _check_writable(path)
    return path


def _check_apart(path: Path, config: RunConfig) -> None:
    """Refuse to write over the base: into its folder, or into a run whose ``model/`` or ``adapter/`` it is."""
    base = Path(str(config.model.model_name_or_path))
    if not base.is_dir():
        return
    own, above = path.resolve(), (base.resolve(), *base.resolve().parents)
    if own == above[0] or any(own / name in above for name in _ENTRIES):
        raise UserError(f"output_dir: {path} is where the base {base} lies: choose another --output_dir")


def take_folder(config: RunConfig) -> Path:
    """Return the folder of this run and, where its name is ours to choose, create it.

    So of two runs that start at the same moment each has its own.

    Raises:
        UserError: as ``choose_folder``.
    """
    while True:
        path = choose_folder(config)
        if not _is_ours_to_name(config):
            return path
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:  # another run was faster
            continue


def give_back(config: RunConfig, path: Path) -> None:
    """Remove what ``take_folder`` created, if nothing has been written there."""
    if _is_ours_to_name(config):
        with contextlib.suppress(OSError):
            path.rmdir()


def _is_ours_to_name(config: RunConfig) -> bool:
    return config.run.output_dir is None and config.run.resume in ("auto", "none")


def _check_content(path: Path, config: RunConfig) -> None:
    if not path.exists() or config.run.overwrite_output_dir:
        return
    if not path.is_dir():
        raise UserError(f"output_dir: {path} is a file")
    if (path / RUN).is_file() or all(_is_ours_before_start(entry) for entry in path.iterdir()):
        return
    raise UserError(
        f"output_dir: {path} is not empty and holds no run; choose another --output_dir, or pass --overwrite_output_dir"
    )


def _is_ours_before_start(entry: Path) -> bool:
    """Say whether a run that was cut short before its first record may have left this."""
    return entry.name == PARTIAL or (entry.name.startswith(".") and entry.name.endswith(".tmp"))


def _check_writable(path: Path) -> None:
    existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"output_dir: cannot write {path}: {existing} is not a writable folder")


def versions() -> dict[str, str]:
    """Return the versions a run depends on."""
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        found[name] = importlib.metadata.version(name)
    return found
