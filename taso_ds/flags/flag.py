"""What a flag is: a field of a frozen dataclass, with what it means beside its value.

Every room has its group of flags, which says what the fields mean and which values work. The flags are read in
``taso_ds.flags.command_line``. No library is needed, so that a script can say at once what it takes.
"""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar, get_args, get_origin, get_type_hints

from taso_ds.errors import UserError, dangling, nearest


class Arguments(Protocol):
    """The values of a group of flags: an object of the group's dataclass."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[object]]]


Group: TypeAlias = type[Arguments]  # the flags of a room
Scalar: TypeAlias = bool | int | float | str
Value: TypeAlias = Scalar | list[Scalar] | None
Parsed = TypeVar("Parsed", bound=Arguments)
Default = TypeVar("Default")

# What becomes of a run when a flag is changed.
RESULT = "result"  # it is another run
LENGTH = "length"  # it is the same run, longer: one that has finished can be extended
SCHEDULE = "schedule"  # its work is cut up, shown or saved in another way; what it learns stays the same
START = "start"  # nothing: it is started in another way, and that is not recorded
CALL = "call"  # nothing: only this call of the script is different


@dataclass(frozen=True)
class Flag:
    """What a flag means beside its value.

    Attributes:
        help: what it does, for ``--help``.
        effect: what becomes of a run when the flag is changed.
        before: what runs had that were recorded before the flag came.
        is_path: whether its values are, or may be, paths on this machine.
        words: values of a path flag that are not paths.
        unit: what its numbers count, or what its words name.
        is_first: whether most runs set it.
        is_hidden: whether it exists only to be refused or ignored.
        is_planned: whether the plan decides it unless the user does.
    """

    help: str
    effect: str
    before: object
    is_path: bool
    words: tuple[str, ...]
    unit: str | None
    is_first: bool
    is_hidden: bool
    is_planned: bool

    @property
    def is_recorded(self) -> bool:
        return self.effect not in (START, CALL)


_AS_DEFAULT = object()


def arg(
    default: Default,
    help: str,
    *,
    effect: str = RESULT,
    before: object = _AS_DEFAULT,
    path: bool = False,
    words: tuple[str, ...] = (),
    unit: str | None = None,
    first: bool = False,
    hidden: bool = False,
    planned: bool = False,
) -> Default:
    """Return a dataclass field that is a flag.

    Args:
        default: its value where it is not given.
        help: what it does, in a sentence or two.
        effect: ``RESULT``, ``LENGTH``, ``SCHEDULE``, ``START`` or ``CALL``.
        before: what older runs had, where that is not the default. A record without the flag is read with this value,
            so that a new flag does not turn older runs into other ones.
        path: its values are, or may be, paths on this machine: ``~`` is expanded, relative paths are resolved.
        words: values of a path flag that are not paths.
        unit: what its numbers count, or what its words name, where the type says too little.
        first: ``--help`` shows it. Without this, only ``--help_all`` does.
        hidden: no help shows it. It exists only to be refused or ignored.
        planned: the plan decides it unless the user does.

    Returns:
        A field of a dataclass; the type is that of its values, as ``dataclasses.field`` has it.
    """
    then = default if before is _AS_DEFAULT else before
    flag = Flag(help, effect, then, path, words, unit, first, hidden, planned)
    return dataclasses.field(default=default, metadata={"flag": flag})


@dataclass(frozen=True)
class Kind:
    """The type of a flag's values.

    Attributes:
        item: the type of one value.
        is_list: whether it takes several of them.
        is_optional: whether it may be None.
    """

    item: type[bool] | type[int] | type[float] | type[str]
    is_list: bool = False
    is_optional: bool = False


def flags_of(groups: Sequence[Arguments | Group]) -> dict[str, Flag]:
    """Return what each flag of these dataclasses, or of their objects, means, by name."""
    return {entry.name: entry.metadata["flag"] for group in groups for entry in dataclasses.fields(group)}


def kinds_of(groups: Sequence[Group]) -> dict[str, Kind]:
    """Return the type of each flag of these dataclasses, by name."""
    return {name: _kind(hint) for group in groups for name, hint in get_type_hints(group).items()}


def _kind(hint: Any) -> Kind:
    """Return the type of values from a type hint: ``int | None``, ``list[str]``."""
    is_optional = type(None) in get_args(hint)
    inner = get_args(hint)[0] if is_optional else hint
    is_list = get_origin(inner) is list
    return Kind(get_args(inner)[0] if is_list else inner, is_list, is_optional)


def require(condition: bool, name: str, value: object, valid: str) -> None:
    """Refuse a value unless ``condition`` holds.

    Args:
        name: of the flag.
        valid: what would be valid, in words that follow "is not".

    Raises:
        UserError: the condition does not hold.
    """
    if not condition:
        raise UserError(f"{name}: {value!r} is not {valid}")


def require_one_of(name: str, value: str, valid: Sequence[str]) -> None:
    """Refuse a value that is none of the valid words.

    Args:
        name: of the flag.

    Raises:
        UserError: it is none of them; the message names the nearest.
    """
    if value not in valid:
        raise UserError(f"{name}: {value!r} is not one of {', '.join(valid)}{nearest(str(value), list(valid))}")


def is_positive(value: float) -> bool:
    """Say whether a number is positive and finite."""
    return 0.0 < value < math.inf


def check_new_file(name: str, path: str | None) -> None:
    """Refuse to write over a file; UserError."""
    if path is not None and os.path.isfile(path):  # False, too, where nobody may look or no name can be so long
        raise UserError(f"{name}: {path} exists already; move it away, or choose another name")


def expanded(group: Parsed) -> Parsed:
    """Return the group with ``~`` expanded in every path flag: no shell does that in ``--name=~/x`` or in a file."""
    flags = flags_of([group])
    paths = {name: getattr(group, name) for name, flag in flags.items() if flag.is_path}
    changed = {name: os.path.expanduser(value) for name, value in paths.items() if value and value.startswith("~")}
    return dataclasses.replace(group, **changed) if changed else group


_LARGEST_FLOAT, _LARGEST_INT = 3.4e38, 2**63 - 1  # of the types that tensors and counters have
_VARIABLE = re.compile(r"\$(\w+|\{\w+\})")  # of a shell
_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes


def check_values(group: Arguments) -> None:
    """Refuse what no flag of a group can be: numbers out of range, empty texts, links that lead nowhere; UserError."""
    for name, flag in flags_of([group]).items():
        value = getattr(group, name)
        _check_representable(name, value)
        if flag.is_path and value is not None and (found := dangling(value)) is not None:
            raise UserError(f"{name}: {value} is {found}: correct the link, or name another path")
        if flag.is_path and value is not None and (named := _VARIABLE.search(value)) and not os.path.exists(value):
            raise UserError(f"{name}: no shell has replaced {named[0]} in {value!r}: write the path as it is")


def _check_representable(name: str, value: object) -> None:
    """Refuse numbers that no tensor and texts that no file system can hold, before a library meets them."""
    if isinstance(value, float):
        require(not math.isfinite(value) or abs(value) <= _LARGEST_FLOAT, name, value, "within the range of fp32")
    elif isinstance(value, int):
        require(abs(value) <= _LARGEST_INT, name, value, "within 64 bits")
    elif isinstance(value, str):
        check_text(name, value)
    elif isinstance(value, list):
        for entry in value:
            _check_representable(name, entry)


def check_text(name: str, value: str) -> None:
    """Refuse a text that no file system can hold, and an empty one; UserError."""
    if not value.strip():
        raise UserError(f"{name}: {value!r} is empty: write what it is, or leave {name} out")
    whole = "\0" not in value and not any("\ud800" <= char <= "\udfff" for char in value)
    require(whole, name, value, "UTF-8 text without null characters")
    require(
        "\r" not in value, name, value, "without the line ends of Windows: save the file it comes from with Linux's"
    )
    longest = max(len(part.encode()) for part in value.split("/"))
    fits = longest <= _LONGEST_NAME and len(value.encode()) <= _LONGEST_PATH
    require(fits, name, value, f"short enough for a path ({_LONGEST_NAME} bytes a name, {_LONGEST_PATH} in all)")
