"""What each value of a DeepSpeed JSON must be.

DeepSpeed checks some values as it starts and meets the others in the middle of a step: ``"steps_per_print": 0`` divides
by zero in the first one. Here every key has a kind, so that a value is refused before anything loads.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, Union

from taso_ds.errors import UserError, nearest

AUTO = "auto"
_LARGEST = 1 << 63


@dataclass(frozen=True)
class Kind:
    """What a value must be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


Table: TypeAlias = Mapping[str, Union[Kind, "Table"]]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: Any, lowest: int) -> bool:
    return _is_number(value) and lowest <= value < _LARGEST and value == int(value)


def _is_list_of_texts(value: Any) -> bool:
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
NAME = Kind("a text that is not empty", lambda value: TEXT.holds(value) and bool(value.strip()))
TEXTS = Kind("a list of texts", _is_list_of_texts)
PATTERNS = Kind("a list of name patterns", lambda value: _is_list_of_texts(value) and all(map(_compiles, value)))
SECTION = Kind("an object in braces", lambda value: isinstance(value, dict))


def one_of(*words: str) -> Kind:
    return Kind(f"one of {', '.join(words)}", lambda value: value in words)


def check_known(section: Mapping[str, Any], known: Mapping[str, Any], path: str, source: str) -> None:
    """Refuse a key that is not among ``known``, with the nearest one that is."""
    for key in section:
        if key not in known:
            raise UserError(f"{source}: unknown key {path + key!r}{nearest(key, list(known))}")


def checked(section: Mapping[str, Any], table: Table, path: str, source: str) -> dict[str, Any]:
    """Return a section without its nulls, which mean that a key is absent.

    Args:
        path: of the section, with a dot at its end; empty at the top.

    Raises:
        UserError: an unknown key, or a value of another kind. ``"auto"`` is any kind: what decides it comes later.
    """
    check_known(section, table, path, source)
    found = {}
    for key, value in section.items():
        kind = table[key]
        if value is None:
            continue
        if value == AUTO:
            found[key] = value
        elif isinstance(kind, Kind):
            found[key] = _checked_value(value, kind, path + key, source)
        else:
            found[key] = checked(_checked_value(value, SECTION, path + key, source), kind, f"{path}{key}.", source)
    return found


def _checked_value(value: Any, kind: Kind, name: str, source: str) -> Any:
    if not kind.holds(value):
        raise UserError(f"{source}: {name} is {json.dumps(value)}, not {kind.words}")
    return int(value) if kind in _WHOLE else value  # 5e8 is a fraction to Python
