"""Flags as they stand in files: in the YAML of ``--config``, and in the record of a run."""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from taso_ds.errors import UserError, nearest, reason
from taso_ds.flags.flag import check_text, flags_of, hints_of, kind_of
from taso_ds.flags.foreign_names import in_our_words


def read_yaml(path: str) -> dict[str, Any]:
    """Read a configuration file; UserError when it is missing or malformed, or names another one."""
    from taso_ds.files.yaml_text import parse_yaml  # the doctor starts where no library is installed

    check_text("config", path)
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise UserError(f"config: {path} is a pipe or a device, and every rank reads it: write a file")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config: cannot read {path}: {reason(error)}") from error
    values = parse_yaml(text, f"config: {path}")
    if "config" in values:
        raise UserError(f"config: {path} names another configuration file: put all arguments into one")
    return values


def typed(values: Mapping[str, Any], groups: Sequence[Any], source: str) -> dict[str, Any]:
    """Return values read from a file as what the fields of ``groups`` hold.

    Raises:
        UserError: an unknown name, or a value of another type.
    """
    for key, value in values.items():
        if key not in flags_of(groups):
            section = isinstance(value, dict) and ": there are no sections; write one `name: value` a line"
            raise UserError(f"{source} has the unknown key {key!r}{section or instead_of(str(key), groups)}")
    hints = hints_of(groups)
    found: dict[str, Any] = {}
    for key, value in values.items():
        kind = kind_of(hints[key])
        try:
            found[key] = None if value is None and kind != hints[key] else _as_kind(value, kind)
        except (TypeError, ValueError, argparse.ArgumentTypeError) as error:
            raise UserError(f"{source}: {key} is {value!r}, not {_IN_WORDS[kind]}") from error
    return found


_IN_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list[str]: "a list of texts",
    list[int]: "a list of whole numbers",
}


def _as_kind(value: Any, kind: Any) -> Any:
    """Return ``value`` as ``kind``: a text as the command line reads it, anything else if it is of that kind."""
    if get_origin(kind) is list:
        return [_as_kind(item, *get_args(kind)) for item in (value if isinstance(value, list) else [value])]
    if isinstance(value, str):
        return switch(value) if kind is bool else kind(value)
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, (bool, int, float)):
        raise TypeError
    if kind is int and isinstance(value, float):
        raise TypeError
    return kind(value)


ON, OFF = ("true", "yes", "on", "t", "y", "1"), ("false", "no", "off", "f", "n", "0")


def switch(text: str) -> bool:
    """Read a boolean as people write it."""
    if text.lower() not in (*ON, *OFF):
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return text.lower() in ON


def instead_of(name: str, groups: Sequence[Any]) -> str:
    """Say which name was meant: of a name that other trainers have, ours; otherwise the nearest."""
    plain = name.replace("-", "_")
    if plain.startswith("no_") and hints_of(groups).get(plain[3:]) is bool:
        return f": to turn it off, give {plain[3:]} the value false"
    return in_our_words(name) or nearest(name, list(flags_of(groups)))
