"""Flags over the record of a finished run. Those that say how to open it act; those that made it cannot any more.

What loads libraries is imported where it is used, so that ``--help`` does not wait for them.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from taso_ds.config import GROUPS, RunConfig
from taso_ds.data.arguments import DataArguments
from taso_ds.errors import UserError
from taso_ds.flags.command_line import given_names, parse_groups, parse_known, show_help_if_asked
from taso_ds.flags.flag import CALL, Arguments, arg, flags_of
from taso_ds.methods.table import METHODS
from taso_ds.models.arguments import ModelArguments
from taso_ds.runs.folder import RUN
from taso_ds.runs.recorded import read_run, recorded_flags

EVALUATE, EXPORT = "evaluate", "export"
_OPENS = frozenset(entry.name for group in (ModelArguments, DataArguments) for entry in dataclasses.fields(group))
_CALLS = frozenset(name for name, flag in flags_of(GROUPS).items() if flag.effect == CALL) - {"dry_run"}
_STARTS = _CALLS | {"run", "expected_world_size", "force"}
_ACTS = {
    EVALUATE: _OPENS | _STARTS | {"ds_config", "nvme_path", "per_device_eval_batch_size", "max_new_tokens"},
    EXPORT: _OPENS | _STARTS | {"merge"},
}
_QUANTIZES = ("load_in_4bit", "load_in_8bit")
# What was recorded beside a flag belongs to its recorded value, and goes when another one is given.
_BELONGS_TO = {
    "model_name_or_path": ("model_revision", "gguf_file", "tokenizer_name"),
    "task": ("train_file", "eval_file", "eval_fraction"),
    "data_dir": ("train_file", "eval_file", "eval_fraction"),
}


@dataclass(frozen=True)
class FinishedArguments:
    """Which finished run is meant."""

    run: str | None = arg(
        None, "Folder of a finished run; its recorded arguments are the defaults of all flags.", path=True
    )
    merge: bool = arg(False, "Add the adapter to the base's weights and write a plain model.")


def parse_over_run(
    argv: Sequence[str] | None = None, *, verb: str, description: str = ""
) -> tuple[RunConfig, FinishedArguments]:
    """Parse flags over the arguments recorded in ``--run FOLDER``.

    Args:
        verb: ``EVALUATE`` or ``EXPORT``.

    Raises:
        UserError: bad flag, one that cannot change a finished run, or a folder that is not one.
    """
    argv = sys.argv[1:] if argv is None else argv
    show_help_if_asked(
        (*GROUPS, FinishedArguments), argv, description=description, own=FinishedArguments, acting=_ACTS[verb]
    )
    from taso_ds.defaults import with_defaults
    from taso_ds.methods.saved import base_of

    (named,), _ = parse_known([FinishedArguments], argv)
    recorded = _recorded(named.run)
    given = given_names(argv)
    excluded = {*(_QUANTIZES if given.intersection(_QUANTIZES) else ())}
    excluded |= {"eval_fraction"} if "eval_file" in given else set()  # other rows instead of those held out
    defaults = {name: value for name, value in recorded.items() if name not in excluded}
    *groups, finished = parse_groups((*GROUPS, FinishedArguments), argv, description=description, defaults=defaults)
    if finished.run != named.run:
        raise UserError("run: a configuration file cannot name it; pass --run on the command line")
    _check_verb(groups, finished, verb)
    if named.run is not None:
        changed = _changed(groups, recorded)
        _refuse(changed, recorded, finished, verb)
        stale = {name for flag in changed for name in _BELONGS_TO.get(flag, ()) if name not in given}
        groups = _opening(groups, stale)
    config = with_defaults(RunConfig(*groups))
    if named.run is not None:
        config = dataclasses.replace(config, model=base_of(config.adapter.method, config.model, Path(named.run)))
    return config, finished


def _recorded(run: str | None) -> dict[str, object]:
    if run is None:
        return {}
    return recorded_flags(read_run(Path(run)), Path(run) / RUN) | {"output_dir": run}


def _check_verb(groups: Sequence[Arguments], finished: FinishedArguments, verb: str) -> None:
    if verb == EXPORT and finished.run is None:
        raise UserError("export: name a finished run with --run FOLDER")
    if verb == EVALUATE and finished.merge:
        raise UserError("merge: evaluate writes nothing; drop --merge, or use export")
    if any(getattr(group, "dry_run", False) for group in groups):
        raise UserError(f"dry_run: {verb} has none; drop --dry_run")


def _changed(groups: Sequence[Arguments], recorded: Mapping[str, object]) -> dict[str, object]:
    """Return the flags that say something else than the record."""
    return {
        entry.name: getattr(group, entry.name)
        for group in groups
        for entry in dataclasses.fields(group)
        if getattr(group, entry.name) != recorded.get(entry.name, entry.default)
    }


def _refuse(
    changed: Mapping[str, object], recorded: Mapping[str, object], finished: FinishedArguments, verb: str
) -> None:
    """Refuse a flag that would be ignored: what it decides, the run has decided."""
    from taso_ds.methods.saved import BASE_FLAGS

    acts = _ACTS[verb].difference(_QUANTIZES if finished.merge else ())
    method = METHODS.get(str(recorded.get("method")))
    if method is not None and method().trains_base:
        acts = acts.difference(BASE_FLAGS, _QUANTIZES)
    for name, value in changed.items():
        if name not in acts:
            was = f"; {finished.run} has {recorded[name]!r}" if name in recorded else ""
            raise UserError(f"{name}: {value!r} cannot apply when {verb} opens a finished run{was}; drop --{name}")


def _opening(groups: Sequence[Arguments], stale: set[str]) -> list[Arguments]:
    """Return the groups without what only made the run: its batches need not fit the ranks there are now."""
    reset = {*stale, "core_regions", "importance_weights", "global_batch_size", "gradient_accumulation_steps"}
    return [
        dataclasses.replace(
            group, **{entry.name: entry.default for entry in dataclasses.fields(group) if entry.name in reset}
        )
        for group in groups
    ]
