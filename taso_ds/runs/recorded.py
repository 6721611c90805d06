"""What a folder says about its run: the record, whichever version wrote it, and what a configuration has otherwise."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taso_ds.config import GROUPS, RunConfig
from taso_ds.errors import UserError, nearest, reason
from taso_ds.files.json_text import parse_json
from taso_ds.files.schema import check_schema
from taso_ds.flags.file import typed
from taso_ds.flags.flag import LENGTH, SCHEDULE, Flag, flags_of
from taso_ds.runs.folder import RESULTS, RUN


def read_run(path: Path) -> dict[str, Any]:
    """Return ``run.json`` of a run folder; UserError when it is missing or damaged."""
    file = path / RUN
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not a readable run ({reason(error)})") from error
    run = parse_json(text, f"{file}: not a readable run")
    if not isinstance(run, dict) or not isinstance(run.get("config"), dict):
        raise UserError(f"{file}: has no config")
    check_schema(run, file)
    if not isinstance(run.get("started_in", ""), str):
        raise UserError(f"{file}: started_in is not a text")
    return run


def is_calibration(run: Mapping[str, Any]) -> bool:
    """Say whether a ``run.json`` is of core regions alone, for which nothing was trained in batches."""
    return "batch" not in run


def is_finished(folder: Path, run: Mapping[str, Any]) -> bool:
    """Say whether a training run has results of all its steps: while it is extended, those of fewer stay."""
    file = folder / RESULTS
    if not file.is_file():
        return False
    try:
        results = parse_json(file.read_text(encoding="utf-8"), str(file), constants=True)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not readable results ({error})") from error
    return isinstance(results, dict) and results.get("steps") == run.get("steps")


def length_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags of a record that say how long the run is to be."""
    flags = flags_of(GROUPS)
    return {name: value for name, value in run["config"].items() if name in flags and flags[name].effect == LENGTH}


def recorded_flags(record: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return the flags of a record: typed, those that it is older than as they were then, paths found where it began.

    Args:
        record: ``run.json`` or ``progress.json``.

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
    values = {name: flag.before for name, flag in flags.items()} | {
        name: value for name, value in typed(given, GROUPS, str(file)).items() if name in flags
    }
    return {name: _located(values[name], flag, started_in) for name, flag in flags.items()}


def _located(value: Any, flag: Flag, started_in: str) -> Any:
    """Return a relative path as an absolute one where it exists; a Hub id, or a file that is gone, stays as it is."""
    if not flag.is_path or value is None or value in flag.words:
        return value
    path = os.path.join(started_in, value)
    return path if os.path.isabs(path) and os.path.exists(path) else value


@dataclass(frozen=True)
class Difference:
    """One flag that was given otherwise."""

    name: str
    there: Any
    here: Any
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


def differences(record: Mapping[str, Any], config: RunConfig, file: Path) -> list[Difference]:
    """Return what differs from the flags of a record, what changes the run first.

    Paths are compared by where they lead; the same words count as the same path, for rows and base are compared by
    their digests too.
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


def _lead_to_the_same(there: Any, here: Any, flag: Flag) -> bool:
    if not flag.is_path or None in (there, here) or {there, here} & {*flag.words}:
        return False
    return os.path.exists(there) and os.path.exists(here) and os.path.samefile(there, here)
