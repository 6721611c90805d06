"""Flags from dataclasses: every field is one, read from the command line, from ``--config FILE``, or its default.

What the fields mean, and which values work, is the dataclasses' own business (``taso_ds.config``).
"""

import argparse
import dataclasses
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args, get_origin, get_type_hints

from taso_ds.errors import UserError, dangling, nearest, reason
from taso_ds.foreign_names import in_our_words

if TYPE_CHECKING:
    from transformers import HfArgumentParser

# What becomes of a run when a flag is changed.
RESULT = "result"  # it is another run
LENGTH = "length"  # it is the same run, longer: one that has finished can be extended
SCHEDULE = "schedule"  # its work is cut up, shown or saved in another way; what it learns stays the same
START = "start"  # nothing: it is started in another way, which is not recorded


@dataclass(frozen=True)
class Flag:
    """What a flag means beside its value.

    Attributes:
        effect: what becomes of a run when the flag is changed.
        before: what runs had that were recorded before the flag came.
        is_path: whether values are, or may be, paths on this machine.
        words: values of a path flag that are no paths.
    """

    effect: str
    before: Any
    is_path: bool
    words: tuple[str, ...]


_AS_DEFAULT = object()


def arg(
    default: Any,
    help: str,
    *,
    effect: str = RESULT,
    before: Any = _AS_DEFAULT,
    path: bool = False,
    words: tuple[str, ...] = (),
) -> Any:
    """Return a dataclass field whose help text argparse shows.

    Args:
        effect: ``RESULT``, ``LENGTH``, ``SCHEDULE`` or ``START``.
        before: what older runs had, where that is not the default: a record without the flag is read with this value,
            so that a new flag does not make them other runs.
        path: values are, or may be, paths on this machine: ``~`` is expanded, relative ones are resolved.
        words: values that are no paths all the same.
    """
    flag = Flag(effect, default if before is _AS_DEFAULT else before, path, words)
    return dataclasses.field(default=default, metadata={"help": help, "flag": flag})


def flags_of(groups: Sequence[Any]) -> dict[str, Flag]:
    """Return what each flag of these dataclasses means, by name."""
    return {entry.name: entry.metadata["flag"] for group in groups for entry in dataclasses.fields(group)}


def require(condition: bool, name: str, value: Any, valid: str) -> None:
    """Refuse a value: ``UserError`` with what would be valid."""
    if not condition:
        raise UserError(f"{name}: {value!r} is not {valid}")


def check_new_file(name: str, path: str | None) -> None:
    """Refuse to write over a file; UserError."""
    if path is not None and os.path.isfile(path):  # False, too, where nobody may look or no name can be so long
        raise UserError(f"{name}: {path} exists already; move it away, or choose another name")


def read_yaml(path: str) -> dict[str, Any]:
    """Read a configuration file; UserError when it is missing or malformed, or names another one."""
    from taso_ds.files.yaml_text import parse_yaml  # the doctor starts where no library is installed

    _check_text("config", path)
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


class RaisingParser(argparse.ArgumentParser):
    """Leaves what to say, and how to end, to the caller."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse ``--name=--``, of which argparse makes an empty list, whatever the flag's type."""
        for word in args or ():
            if word.startswith("--") and word.endswith("=--"):
                self.error(f"{word[2:-3]}: '--' is not a value")
        return super().parse_known_args(args, namespace)


_ON, _OFF = ("true", "yes", "on", "t", "y", "1"), ("false", "no", "off", "f", "n", "0")


def switch(text: str) -> bool:
    """Read a boolean as people write it."""
    if text.lower() not in (*_ON, *_OFF):
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return text.lower() in _ON


def _config_file(argv: Sequence[str]) -> str | None:
    parser = RaisingParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=os.path.expanduser)
    file: str | None = parser.parse_known_args(argv)[0].config
    return file


def _names(groups: Sequence[Any]) -> list[str]:
    return [entry.name for group in groups for entry in dataclasses.fields(group)]


def _make_parser(groups: Sequence[Any], **options: Any) -> "HfArgumentParser":
    from transformers import HfArgumentParser
    from transformers.hf_argparser import string_to_bool

    class Parser(RaisingParser, HfArgumentParser):
        def add_argument(self, *names: Any, flag: Flag | None = None, **settings: Any) -> argparse.Action:
            """Keep what is not argparse's business from it, and read switches as YAML's are read."""
            if settings.get("type") is string_to_bool:
                settings["type"] = switch
            if settings.get("action") == "store_false":  # --no_bf16 has the help of --bf16
                settings["help"] = f"Turn --{settings['dest']} off."
            return super().add_argument(*names, **settings)

    return Parser(groups, allow_abbrev=False, formatter_class=_Help, **options)


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Leaves the commands of a description on lines of their own, and out the default that says nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is None or action.const is False
        return action.help if says_nothing else super()._get_help_string(action)


def expanded(group: Any) -> Any:
    """Return the dataclass with ``~`` expanded in every path flag: no shell does it in ``--name=~/x`` or in a file."""
    flags = flags_of([group])
    paths = {name: getattr(group, name) for name, flag in flags.items() if flag.is_path}
    changed = {name: os.path.expanduser(value) for name, value in paths.items() if value and value.startswith("~")}
    return dataclasses.replace(group, **changed) if changed else group


def _instead_of(name: str, groups: Sequence[Any]) -> str:
    """Say which name was meant: of a name that other trainers have, ours; otherwise the nearest."""
    plain = name.replace("-", "_")
    hints = {key: hint for group in groups for key, hint in get_type_hints(group).items()}
    if plain.startswith("no_") and hints.get(plain[3:]) is bool:
        return f": to turn it off, give {plain[3:]} the value false"
    return in_our_words(name) or nearest(name, _names(groups))


def parse_groups(
    groups: Sequence[Any],
    argv: Sequence[str] | None,
    *,
    description: str,
    defaults: Mapping[str, Any] | None = None,
    partial: bool = False,
) -> list[Any]:
    """Parse flags over ``--config FILE`` over ``defaults`` into one object per dataclass of ``groups``.

    With ``partial`` other flags (``--help`` too) are left for a later parse.

    Raises:
        UserError: unknown flag or key, or a value that cannot work.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _make_parser(groups, description=description, add_help=not partial)
    _refuse_second_lists(groups, arguments)
    parser.set_defaults(**(defaults or {}))
    if not partial:
        file = _config_file(arguments)
        if file is not None:
            parser.set_defaults(**typed(read_yaml(file), groups, f"config: {file}"))
    *parsed, unknown = parser.parse_args_into_dataclasses(args=arguments, return_remaining_strings=True)
    if unknown and not partial:
        if not unknown[0].startswith("-"):
            raise UserError(f"{unknown[0]!r} stands where a flag should: flags begin with --; --help lists them")
        name = unknown[0].lstrip("-").split("=")[0]
        raise UserError(f"unknown flag {unknown[0]!r}{_instead_of(name, groups)}; --help lists them")
    parsed = [expanded(group) for group in parsed]
    for group in parsed:
        check_values(group)
    return parsed


def _refuse_second_lists(groups: Sequence[Any], argv: Sequence[str]) -> None:
    """Refuse a list that is given in pieces: the last one would replace the others."""
    hints = {name: hint for group in groups for name, hint in get_type_hints(group).items()}
    words = Counter(_name(word) for word in argv)
    for name, hint in hints.items():
        if words[name] > 1 and any(get_origin(kind) is list for kind in (hint, *get_args(hint))):
            raise UserError(f"{name}: is given {words[name]} times; write all its values after one --{name}")


def _name(word: str) -> str | None:
    """Return the name of the flag that a word of a command line is, if it is one."""
    return word.partition("=")[0].removeprefix("--").replace("-", "_") if word.startswith("--") else None


_LARGEST_FLOAT, _LARGEST_INT = 3.4e38, 2**63 - 1  # of the types that tensors and counters have
_VARIABLE = re.compile(r"\$(\w+|\{\w+\})")  # of a shell
_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes


def check_values(group: Any) -> None:
    """Refuse what no flag can be, whichever it is: numbers out of range, empty texts, links that lead nowhere."""
    for name, flag in flags_of([group]).items():
        value = getattr(group, name)
        _check_representable(name, value)
        if flag.is_path and value is not None and (found := dangling(value)) is not None:
            raise UserError(f"{name}: {value} is {found}: correct the link, or name another path")
        if flag.is_path and value is not None and (named := _VARIABLE.search(value)) and not os.path.exists(value):
            raise UserError(f"{name}: no shell has replaced {named[0]} in {value!r}: write the path as it is")


def _check_representable(name: str, value: Any) -> None:
    """Refuse numbers that no tensor and texts that no file system can hold, before a library meets them."""
    if isinstance(value, float):
        require(not math.isfinite(value) or abs(value) <= _LARGEST_FLOAT, name, value, "within the range of fp32")
    elif isinstance(value, int):
        require(abs(value) <= _LARGEST_INT, name, value, "within 64 bits")
    elif isinstance(value, str):
        _check_text(name, value)
    elif isinstance(value, list):
        for entry in value:
            _check_representable(name, entry)


def _check_text(name: str, value: str) -> None:
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


def remaining_flags(groups: Sequence[Any], argv: Sequence[str]) -> list[str]:
    """Return the words of a command line that ``parse_groups`` understood without those of ``groups``."""
    parser = _make_parser(groups, add_help=False)
    remaining: list[str] = parser.parse_args_into_dataclasses(args=list(argv), return_remaining_strings=True)[-1]
    return remaining


def given_names(argv: Sequence[str]) -> frozenset[str]:
    """Return the names of the flags on a command line and in the file of its ``--config``, defaults or not."""
    words = [name for word in argv if (name := _name(word)) is not None]
    file = _config_file(argv)
    names = [*words, *(read_yaml(file) if file is not None else ())]
    return frozenset({*names, *(name.removeprefix("no_") for name in names)})


def debug_is_on(argv: Sequence[str]) -> bool:
    """Say whether a command line, or the file of its ``--config``, asks for ``--debug``; the parse finds mistakes."""
    parser = RaisingParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--debug", nargs="?", const="true")
    try:
        given, file = parser.parse_known_args(argv)[0].debug, _config_file(argv)
        if given is None and file is not None:
            given = read_yaml(file).get("debug")
    except UserError:
        return False
    return isinstance(given, str) and given.lower() in _ON


def typed(values: Mapping[str, Any], groups: Sequence[Any], source: str) -> dict[str, Any]:
    """Return values read from a file as what the fields of ``groups`` hold.

    Raises:
        UserError: an unknown name, or a value of another type.
    """
    for key, value in values.items():
        if key not in _names(groups):
            section = isinstance(value, dict) and ": there are no sections; write one `name: value` a line"
            raise UserError(f"{source} has the unknown key {key!r}{section or _instead_of(str(key), groups)}")
    hints = {name: hint for group in groups for name, hint in get_type_hints(group).items()}
    found: dict[str, Any] = {}
    for key, value in values.items():
        kind, *others = (hints[key],) if get_origin(hints[key]) is list else get_args(hints[key]) or (hints[key],)
        try:
            found[key] = None if value is None and others else _as_kind(value, kind)
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


def is_positive(value: float) -> bool:
    """Say whether a number is positive and finite."""
    return 0.0 < value < math.inf


def require_one_of(name: str, value: str, valid: Sequence[str]) -> None:
    """Refuse a value that is none of the valid words; UserError names the nearest."""
    if value not in valid:
        raise UserError(f"{name}: {value!r} is not one of {', '.join(valid)}{nearest(str(value), list(valid))}")
