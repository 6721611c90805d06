"""What each value of a DeepSpeed JSON must be.

DeepSpeed checks some values as it starts and meets the others in the middle of a step: ``"steps_per_print": 0`` divides
by zero in the first one. Here every key has a kind, so that a value is refused before anything loads.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias, TypeGuard, Union

from taso_ds.errors import UserError, nearest

AUTO = "auto"
_LARGEST = 1 << 63

Section: TypeAlias = dict[str, object]  # an object of a JSON, whose values nobody has checked yet


@dataclass(frozen=True)
class Kind:
    """What a value must be, in words and as a test."""

    words: str
    holds: Callable[[object], bool]


Table: TypeAlias = Mapping[str, Union[Kind, "Table"]]


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: object, lowest: int) -> TypeGuard[float]:
    return _is_number(value) and lowest <= value < _LARGEST and value == int(value)


def _is_list_of_texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(entry, str) and entry for entry in value)


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern.replace("*", ".*"))  # as DeepSpeed does
    except re.error:
        return False
    return True


BOOL = Kind("true or false", lambda value: isinstance(value, bool))
INT = Kind("a whole number of 0 or more", lambda value: _is_whole(value, 0))
POSITIVE = Kind("a whole number of 1 or more", lambda value: _is_whole(value, 1))
# Reserved in full before the first step: 10^10 fp32 numbers are 40 GB.
BUCKET = Kind("a whole number from 1 to 10000000000", lambda value: _is_whole(value, 1) and value <= 10**10)
# The flops profiler stops at a depth that a model does not have; -1 is the deepest.
DEPTH = Kind("a whole number from -1 to 3", lambda value: _is_whole(value, -1) and value <= 3)
_WHOLE = (INT, POSITIVE, BUCKET, DEPTH)
FACTOR = Kind("a number of 0 or more", lambda value: _is_number(value) and 0 <= value < _LARGEST)
SHARE = Kind("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
TEXT = Kind("a text", lambda value: isinstance(value, str) and "\0" not in value)
NAME = Kind("a text that is not empty", lambda value: TEXT.holds(value) and bool(str(value).strip()))
TEXTS = Kind("a list of texts", _is_list_of_texts)
PATTERNS = Kind("a list of name patterns", lambda value: _is_list_of_texts(value) and all(map(_compiles, value)))
SECTION = Kind("an object in braces", lambda value: isinstance(value, dict))


def one_of(*words: str) -> Kind:
    return Kind(f"one of {', '.join(words)}", lambda value: value in words)


def check_known(section: Mapping[str, object], known: Mapping[str, object], path: str, source: str) -> None:
    """Refuse a key that is not among ``known``, and name the nearest one that is.

    Args:
        section: a part of the JSON.
        known: its keys are the valid ones.
        path: where the section stands, with a dot at its end; empty at the top.
        source: what to call the JSON in errors.

    Raises:
        UserError: an unknown key.
    """
    for key in section:
        if key not in known:
            raise UserError(f"{source}: unknown key {path + key!r}{nearest(key, list(known))}")


def checked(section: Mapping[str, object], table: Table, path: str, source: str) -> Section:
    """Return a section without its nulls. A null means that the key is absent.

    Args:
        section: a part of the JSON.
        table: the kind of each of its keys. ``"auto"`` is of every kind: the run decides such a value later.
        path: where the section stands, with a dot at its end; empty at the top.
        source: what to call the JSON in errors.

    Raises:
        UserError: an unknown key, or a value of another kind.
    """
    check_known(section, table, path, source)
    found: Section = {}
    for key, value in section.items():
        kind = table[key]
        if value is None:
            continue
        if value == AUTO:
            found[key] = value
        elif isinstance(kind, Kind):
            found[key] = _checked_value(value, kind, path + key, source)
        else:
            found[key] = checked(checked_section(value, path + key, source), kind, f"{path}{key}.", source)
    return found


def checked_section(value: object, name: str, source: str) -> Section:
    """Return ``value``, which must be a section.

    Args:
        name: where it stands in the JSON.
        source: what to call the JSON in errors.

    Raises:
        UserError: it is something else.
    """
    if isinstance(value, dict):
        return value
    raise _wrong_kind(value, SECTION, name, source)


def section_of(parent: Mapping[str, object], key: str) -> Section:
    """Return the section ``key`` of a dict that has been checked; an empty one where there is none."""
    section = parent.get(key, {})
    assert isinstance(section, dict), key
    return section


def number_of(section: Mapping[str, object], key: str, default: int | None = None) -> int:
    """Return the whole number ``key`` of a section that has been checked."""
    value = section.get(key, default)
    assert _is_number(value), key
    return int(value)


def _checked_value(value: object, kind: Kind, name: str, source: str) -> object:
    if not kind.holds(value):
        raise _wrong_kind(value, kind, name, source)
    return int(value) if kind in _WHOLE and _is_number(value) else value  # 5e8 is a fraction to Python


def _wrong_kind(value: object, kind: Kind, name: str, source: str) -> UserError:
    return UserError(f"{source}: {name} is {json.dumps(value)}, not {kind.words}")
