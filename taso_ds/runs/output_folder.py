"""Which folder a run gets: the one it names, that of an unfinished run of the same configuration, or a new one.

A folder with files of another program is refused, and nobody else is in the folder while a run has it.
"""

import logging
import os
import re
from contextlib import ExitStack
from pathlib import Path

from taso_ds.config import RunConfig
from taso_ds.errors import UserError
from taso_ds.methods.folders import MODEL
from taso_ds.runs.folder import ENTRIES, PARTIAL, RUN
from taso_ds.runs.recorded import RunRecord, differences, is_calibration, is_finished, read_run
from taso_ds.runs.run_lock import LOCK, InUse, holder, locked, refuse
from taso_ds.training.checkpoint import resolve_checkpoint

log = logging.getLogger(__name__)

_RUNS = Path("runs")


def take_folder(config: RunConfig, held: ExitStack, *, goes_on: bool) -> Path:
    """Return the folder of this run, which nobody else has until ``held`` is closed. Rank 0 only.

    Args:
        goes_on: whether the run may go on with an unfinished one.

    Raises:
        UserError: as ``choose_folder``.
    """
    while True:
        path = choose_folder(config, goes_on=goes_on)
        is_ours_to_name = _is_ours_to_name(config)
        try:
            return held.enter_context(locked(path, new=is_ours_to_name and not _was_begun(path)))
        except InUse:
            if not is_ours_to_name:
                raise  # otherwise another run was faster: there is a next folder


def choose_folder(config: RunConfig, *, goes_on: bool) -> Path:
    """Return the folder that this run would get; changes nothing.

    Raises:
        UserError: it cannot be written, is in use, or holds something else than a run.
    """
    if _is_ours_to_name(config):
        path = _named_here(config, goes_on=goes_on)
    elif config.run.output_dir is None:
        path = resolve_checkpoint(Path(config.run.resume)).parent.parent
    else:
        path = Path(config.run.output_dir)
        _check_apart(path, config)
        _check_content(path, config)
    _check_writable(path)
    owner = holder(path)
    if owner is not None:
        raise refuse(path, owner)
    return path


def check_no_model(run: Path) -> None:
    """Refuse to merge where a model stands; UserError."""
    if (run / MODEL).exists():
        raise UserError(f"merge: {run / MODEL} exists already; move it away, or delete it")


def _is_ours_to_name(config: RunConfig) -> bool:
    return config.run.output_dir is None and config.run.resume in ("auto", "none")


def _named_here(config: RunConfig, *, goes_on: bool) -> Path:
    """Return ``runs/<method>-<task>[-N]``: the newest that the run can go on with, else the first that is free.

    A folder is free, too, if a run was killed in it before it wrote anything.
    """
    first = _RUNS / f"{config.adapter.method}-{config.data.task}"
    if goes_on and config.run.resume == "auto" and not config.run.overwrite_output_dir:
        unfinished = _newest_unfinished(first, config)
        if unfinished is not None:
            log.info("output_dir: goes on in %s, the newest unfinished run of this configuration", unfinished)
            return unfinished
    number, path = 1, first
    while path.exists() and not (_is_left_over(path) and holder(path) is None):
        number += 1
        path = first.with_name(f"{first.name}-{number}")
    return path


def _was_begun(path: Path) -> bool:
    return (path / RUN).is_file() or _is_left_over(path)


def _is_left_over(path: Path) -> bool:
    """Say whether a run was killed here before it wrote anything; scores of passes may belong to other flags."""
    return path.is_dir() and [entry.name for entry in path.iterdir()] == [LOCK]


def _newest_unfinished(first: Path, config: RunConfig) -> Path | None:
    """Return the folder to go on in; a line names each run of this configuration that is finished or in use."""
    for path in _numbered(first):
        run = _same_run(path, config)
        if run is None:
            continue
        owner = holder(path)
        if owner is not None:
            log.info("output_dir: %s holds this run, in use by %s", path, owner)
        elif is_finished(path, run):
            log.info("output_dir: %s holds this run, finished", path)
        else:
            return path
    return None


def _numbered(first: Path) -> list[Path]:
    """Return the folders that are named like this one, the highest number first."""
    name = re.compile(rf"{re.escape(first.name)}(?:-(\d+))?")
    found = [(match, path) for path in first.parent.glob("*") if (match := name.fullmatch(path.name))]
    return [path for _, path in sorted(((int(match[1] or 1), path) for match, path in found), reverse=True)]


def _same_run(path: Path, config: RunConfig) -> RunRecord | None:
    """Return the record of a training run of this configuration; None for any other, and for what is unreadable."""
    try:
        run = read_run(path)
        changed = [entry for entry in differences(run, config, path / RUN) if not entry.is_harmless]
    except UserError:
        return None
    return None if changed or is_calibration(run) else run


def _check_apart(path: Path, config: RunConfig) -> None:
    """Refuse to write over the base: into its folder, or into a run whose ``model/`` or ``adapter/`` it is."""
    base = Path(str(config.model.model_name_or_path))
    if not base.is_dir():
        return
    own, above = path.resolve(), (base.resolve(), *base.resolve().parents)
    if own == above[0] or any(own / name in above for name in ENTRIES):
        raise UserError(f"output_dir: {path} is where the base {base} lies: choose another --output_dir")


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
    """Say whether this may be left from a run that ended before its first record."""
    return entry.name in (PARTIAL, LOCK) or (entry.name.startswith(".") and entry.name.endswith(".tmp"))


def _check_writable(path: Path) -> None:
    existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"output_dir: cannot write {path}: {existing} is not a writable folder")
