"""Flags as they stand in files: in the YAML of ``--config``, and in the record of a run."""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from taso_ds.errors import UserError, nearest, reason
from taso_ds.flags.flag import Group, Kind, Scalar, Value, check_text, flags_of, kinds_of
from taso_ds.flags.foreign_names import in_our_words


def read_yaml(path: str) -> dict[str, object]:
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


def typed(values: Mapping[str, object], groups: Sequence[Group], source: str) -> dict[str, Value]:
    """Return values read from a file as what the fields of ``groups`` hold.

    Args:
        source: what to call the file in errors.

    Raises:
        UserError: an unknown name, or a value of another type.
    """
    for key, value in values.items():
        if key not in flags_of(groups):
            section = isinstance(value, dict) and ": there are no sections; write one `name: value` a line"
            raise UserError(f"{source} has the unknown key {key!r}{section or instead_of(str(key), groups)}")
    kinds = kinds_of(groups)
    found: dict[str, Value] = {}
    for key, value in values.items():
        kind = kinds[key]
        try:
            found[key] = None if value is None and kind.is_optional else _as_kind(value, kind)
        except (TypeError, ValueError, argparse.ArgumentTypeError) as error:
            raise UserError(f"{source}: {key} is {value!r}, not {_IN_WORDS[kind.item][kind.is_list]}") from error
    return found


# Of one value, and of several.
_IN_WORDS: dict[type[Scalar], tuple[str, str]] = {
    int: ("a whole number", "a list of whole numbers"),
    float: ("a number", "a list of numbers"),
    bool: ("true or false", "a list of true and false"),
    str: ("a text", "a list of texts"),
}


def _as_kind(value: object, kind: Kind) -> Value:
    if kind.is_list:
        return [_as_item(item, kind.item) for item in (value if isinstance(value, list) else [value])]
    return _as_item(value, kind.item)


def _as_item(value: object, item: type[Scalar]) -> Scalar:
    """Return one value as ``item``: a text as the command line reads it, anything else if it is of that type."""
    if isinstance(value, str):
        return switch(value) if item is bool else item(value)
    if isinstance(value, bool) != (item is bool) or not isinstance(value, (bool, int, float)):
        raise TypeError
    if item is int and isinstance(value, float):
        raise TypeError
    return item(value)


ON, OFF = ("true", "yes", "on", "t", "y", "1"), ("false", "no", "off", "f", "n", "0")


def switch(text: str) -> bool:
    """Read a boolean as people write it."""
    if text.lower() not in (*ON, *OFF):
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return text.lower() in ON


def instead_of(name: str, groups: Sequence[Group]) -> str:
    """Say which flag was meant: ours for a name that other trainers have, otherwise the nearest."""
    plain = name.replace("-", "_")
    if plain.startswith("no_") and kinds_of(groups).get(plain[3:]) == Kind(bool):
        return f": to turn it off, give {plain[3:]} the value false"
    return in_our_words(name) or nearest(name, list(flags_of(groups)))
