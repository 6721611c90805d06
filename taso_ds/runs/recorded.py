"""What a folder says about its run: its record, whichever version wrote it, and what a configuration changes."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from taso_ds.config import GROUPS, RunConfig
from taso_ds.errors import UserError, nearest, reason
from taso_ds.files.json_text import parse_json
from taso_ds.files.schema import check_schema
from taso_ds.flags.file import typed
from taso_ds.flags.flag import LENGTH, SCHEDULE, Flag, flags_of
from taso_ds.runs.folder import RESULTS, RUN


class _Flags(TypedDict):
    config: dict[str, object]


class RunRecord(_Flags, total=False):
    """What this package reads of a ``run.json`` or ``progress.json``; only the flags, ``config``, are always there."""

    started_in: str
    batch: object
    steps: object


def read_run(path: Path) -> RunRecord:
    """Return ``run.json`` of a run folder; UserError when it is missing or damaged."""
    file = path / RUN
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not a readable run ({reason(error)})") from error
    run: RunRecord = parse_json(text, f"{file}: not a readable run")
    if not isinstance(run, dict) or not isinstance(run.get("config"), dict):
        raise UserError(f"{file}: has no config")
    check_schema(run, file)
    if not isinstance(run.get("started_in", ""), str):
        raise UserError(f"{file}: started_in is not a text")
    return run


def is_calibration(run: RunRecord) -> bool:
    """Say whether a ``run.json`` is the record of core regions alone: nothing was trained in batches then."""
    return "batch" not in run


def is_finished(folder: Path, run: RunRecord) -> bool:
    """Say whether a training run has results of all its steps; a run that is being extended keeps those of fewer."""
    file = folder / RESULTS
    if not file.is_file():
        return False
    try:
        results = parse_json(file.read_text(encoding="utf-8"), str(file), constants=True)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not readable results ({error})") from error
    return isinstance(results, dict) and results.get("steps") == run.get("steps")


def length_of(run: RunRecord) -> dict[str, object]:
    """Return the flags of a record that say how long the run is to be."""
    flags = flags_of(GROUPS)
    return {name: value for name, value in run["config"].items() if name in flags and flags[name].effect == LENGTH}


def recorded_flags(record: RunRecord, file: Path) -> dict[str, object]:
    """Return the flags of a record with their types.

    A flag that is newer than the record has the value that all runs had then. A relative path becomes an absolute one
    if it leads somewhere from the folder that the run began in.

    Args:
        record: ``run.json`` or ``progress.json``.
        file: where it was read, for errors.

    Raises:
        UserError: a flag that this version does not have, or a value of another type.
    """
    given, started_in = record["config"], record.get("started_in") or ""
    flags = {name: flag for name, flag in flags_of(GROUPS).items() if flag.is_recorded}
    known = list(flags_of(GROUPS))
    unknown = sorted(given.keys() - known)
    if unknown:
        raise UserError(
            f"{file}: was written by a newer taso_ds: this one does not know its flag"
            f" {unknown[0]!r}{nearest(unknown[0], known)}; install that version"
        )
    values = {name: flag.before for name, flag in flags.items()}
    values |= {name: value for name, value in typed(given, GROUPS, str(file)).items() if name in flags}
    return {name: _located(values[name], flag, started_in) for name, flag in flags.items()}


def _located(value: object, flag: Flag, started_in: str) -> object:
    """Return a relative path as an absolute one where it exists; a Hub id, or a file that is gone, stays as it is."""
    if not flag.is_path or not isinstance(value, str) or value in flag.words:
        return value
    path = os.path.join(started_in, value)
    return path if os.path.isabs(path) and os.path.exists(path) else value


@dataclass(frozen=True)
class Difference:
    """One flag whose value is another one now."""

    name: str
    there: object
    here: object
    effect: str

    @property
    def is_harmless(self) -> bool:
        return self.effect == SCHEDULE

    @property
    def is_length(self) -> bool:
        return self.effect == LENGTH

    def __str__(self) -> str:
        mark = {SCHEDULE: "harmless", LENGTH: "changes its length"}.get(self.effect, "changes the run")
        return f"{self.name}: {self.there!r} there, {self.here!r} here ({mark})"


def differences(record: RunRecord, config: RunConfig, file: Path) -> list[Difference]:
    """Return what differs from the flags of a record, first what changes the run.

    Paths are compared by where they lead. The same words count as the same path, because digests tell whether rows and
    base are the same.

    Args:
        record: ``run.json`` or ``progress.json``.
        file: where it was read, for errors.
    """
    raw, there = record["config"], recorded_flags(record, file)
    here = json.loads(json.dumps(config.flags()))
    if here["global_batch_size"] is None:
        here["global_batch_size"] = there["global_batch_size"]  # a run that goes on keeps its global batch
    found = [
        Difference(name, there[name], here[name], flag.effect)
        for name, flag in flags_of(GROUPS).items()
        if name in here and here[name] not in (raw.get(name, there[name]), there[name])
        if not _lead_to_the_same(there[name], here[name], flag)
    ]
    return sorted(found, key=lambda difference: (difference.is_harmless, difference.name))


def _lead_to_the_same(there: object, here: object, flag: Flag) -> bool:
    if not flag.is_path or not (isinstance(there, str) and isinstance(here, str)) or {there, here} & {*flag.words}:
        return False
    return os.path.exists(there) and os.path.exists(here) and os.path.samefile(there, here)
