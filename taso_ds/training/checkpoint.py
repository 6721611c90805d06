"""Checkpoints on disk: a folder that is whole or does not count.

``checkpoints/step-00000012/`` holds ``state.safetensors`` (fp32 trained weights, Adam's moments), ``progress.json``,
the core rows and columns, ``manifest.json`` with size and SHA-256 of each, and ``COMPLETE`` with the manifest's digest.
Everything is written into a staging folder and flushed to the disk, the marker last. Then the folder is renamed, and
the pointer ``latest`` is replaced. Until then the previous checkpoint is the latest. Rank 0 only.
"""

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from taso_ds.errors import UserError
from taso_ds.files.atomic import file_digest, flush, write_flushed
from taso_ds.files.json_text import parse_json

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
STATE, PROGRESS, MANIFEST, MARKER, LATEST = (
    "state.safetensors",
    "progress.json",
    "manifest.json",
    "COMPLETE",
    "latest",
)
_NAME = re.compile(r"step-(\d{8,})")


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


@dataclass(frozen=True)
class Found:
    """The newest complete checkpoint, and one line for each that was passed over and why."""

    path: Path | None
    skipped: list[str]


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run folder."""

    folder: Path

    def write(self, step: int, files: Mapping[str, Callable[[Path], None]], *, limit: int) -> Path:
        """Write the checkpoint of ``step``, make it the latest, and remove the oldest beyond ``limit``.

        Args:
            files: writers by file name.

        Raises:
            UserError: no space left, or not writable; the previous checkpoint stays the latest.
        """
        final = self.folder / checkpoint_name(step)
        staging = self.folder / f".{final.name}.tmp"
        with _disk_errors(self.folder, staging):
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            for name, write in files.items():
                write(staging / name)
                flush(staging / name)
            manifest = {name: _describe(staging / name) for name in files}
            write_flushed(staging / MANIFEST, json.dumps(manifest, indent=2) + "\n")
            write_flushed(staging / MARKER, file_digest(staging / MANIFEST) + "\n")
            flush(staging)
            if final.exists():
                self._move_aside(final)
            os.rename(staging, final)
            flush(self.folder)
            pointer = self.folder / f".{LATEST}.tmp"
            write_flushed(pointer, final.name + "\n")
            os.replace(pointer, self.folder / LATEST)
            flush(self.folder)
        self._remove_oldest(final, limit)
        return final

    def newest(self) -> Found:
        """Find the checkpoint to go on from: where ``latest`` points, else the complete one with the most steps."""
        skipped: list[str] = []
        pointed = self._pointed(skipped)
        others = [path for path in reversed(self._all()) if path != pointed]
        for path in ([pointed] if pointed else []) + others:
            problem = find_problem(path)
            if problem is None:
                return Found(path, skipped)
            skipped.append(f"{path}: {problem}")
        return Found(None, skipped)

    def _pointed(self, skipped: list[str]) -> Path | None:
        pointer = self.folder / LATEST
        if not pointer.is_file():
            return None
        name = pointer.read_text(encoding="utf-8", errors="replace").strip()
        if _NAME.fullmatch(name) and (self.folder / name).is_dir():
            return self.folder / name
        skipped.append(f"{pointer}: points to {name[:80]!r}, which is no checkpoint here")
        return None

    def _all(self) -> list[Path]:
        """Return everything that is named like a checkpoint, by step."""
        if not self.folder.is_dir():
            return []
        named = [(match, path) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))]
        return [path for _, path in sorted((int(match[1]), path) for match, path in named)]

    def _move_aside(self, path: Path) -> None:
        """Keep what stands where a checkpoint is to be written: a damaged one, or one of a continued older state."""
        number = 1
        while (aside := path.with_name(f"{path.name}.replaced-{number}")).exists():
            number += 1
        log.warning("checkpoint: %s stood there already; it is kept as %s", path, aside.name)
        os.rename(path, aside)

    def _remove_oldest(self, newest: Path, limit: int) -> None:
        """Remove complete checkpoints beyond ``limit``; damaged ones are left to the user."""
        complete = [path for path in self._all() if path != newest and find_problem(path, deep=False) is None]
        surplus = complete[: max(0, len(complete) + 1 - limit)]
        for path in surplus:
            (path / MARKER).unlink()  # should this be cut short, what is left is not taken for a checkpoint
            shutil.rmtree(path)


def find_problem(path: Path, *, deep: bool = True) -> str | None:
    """Say in a few words what is wrong with a checkpoint; None when it is complete.

    Args:
        deep: also compare every file with its digest.
    """
    try:
        if not (path / MARKER).is_file():
            return f"is not complete (no {MARKER})"
        if (path / MARKER).read_text(encoding="utf-8", errors="replace").strip() != file_digest(path / MANIFEST):
            return f"{MANIFEST} is damaged"
        manifest: dict[str, dict[str, int | str]] = parse_json((path / MANIFEST).read_text(encoding="utf-8"), MANIFEST)
        for name in {STATE, PROGRESS, *manifest}:
            if name not in manifest or Path(name).name != name or not (path / name).is_file():
                return f"{name} is missing"
            if (path / name).stat().st_size != manifest[name]["bytes"]:
                return f"{name} is {(path / name).stat().st_size} bytes long, not {manifest[name]['bytes']}"
            if deep and file_digest(path / name) != manifest[name]["sha256"]:
                return f"{name} is damaged (its digest differs)"
    except OSError as error:
        return f"is not readable ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not what it should be"
    return None


def resolve_checkpoint(path: Path) -> Path:
    """Return the checkpoint folder that a user means by a checkpoint, a ``checkpoints`` folder or a run folder.

    Raises:
        UserError: there is none, or it is not complete.
    """
    if _NAME.fullmatch(path.name) and path.is_dir():
        problem = find_problem(path)
        if problem is not None:
            raise UserError(f"resume: {path}: {problem}; choose another checkpoint, or --resume auto")
        return path
    folder = path if path.name == CHECKPOINTS else path / CHECKPOINTS
    newest = Checkpoints(folder).newest()
    if newest.path is None:
        why = f" ({'; '.join(newest.skipped)})" if newest.skipped else ""
        raise UserError(f"resume: {path} holds no complete checkpoint{why}")
    for line in newest.skipped:
        log.warning("checkpoint: skipped %s", line)
    return newest.path


@contextmanager
def _disk_errors(folder: Path, staging: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        room = "; free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
        raise UserError(
            f"checkpoint: cannot write to {folder}: {error.strerror}{room} and start the same command again;"
            " the previous checkpoint is untouched"
        ) from error


def _describe(path: Path) -> dict[str, int | str]:
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}
