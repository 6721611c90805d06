"""Reads flags: those on the command line, over those in the file of ``--config``, over their defaults."""

import argparse
import dataclasses
import os
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

from taso_ds.console import screen as console
from taso_ds.errors import UserError, speaks_for_all
from taso_ds.flags.file import ON, instead_of, read_yaml, switch, typed
from taso_ds.flags.flag import Group, Kind, check_values, expanded, flags_of, kinds_of
from taso_ds.flags.help import help_text

_HELP, _HELP_ALL = {"-h", "--help"}, {"--help_all", "--help-all"}


class RaisingParser(argparse.ArgumentParser):
    """Raises an error where argparse would print it and end the program."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def parse_words(self, words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Return the values of the flags that this parser knows, and all words that belong to none of them.

        ``--name=--`` is refused: argparse makes an empty list of it, whatever the flag's type.
        """
        for word in words:
            if word.startswith("--") and word.endswith("=--"):
                self.error(f"{word[2:-3]}: '--' is not a value")
        return self.parse_known_args(words)


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def _add_flag(parser: RaisingParser, name: str, kind: Kind, default: object) -> None:
    """Add ``--name``; a switch needs no value, and one that is on by default has ``--no_name`` too."""
    names = _spellings(name)
    if kind.item is bool:
        parser.add_argument(*names, type=switch, nargs="?", const=True, default=default)
        if default:
            parser.add_argument(*_spellings(f"no_{name}"), dest=name, action="store_false", default=default)
    elif kind.is_list:
        parser.add_argument(*names, type=kind.item, nargs="+", default=default)
    else:
        parser.add_argument(*names, type=kind.item, default=default)


def _make_parser(groups: Sequence[Group]) -> RaisingParser:
    parser, kinds = RaisingParser(add_help=False, allow_abbrev=False), kinds_of(groups)
    for group in groups:
        for entry in dataclasses.fields(group):
            _add_flag(parser, entry.name, kinds[entry.name], entry.default)
    return parser


def parse_known(
    groups: Sequence[Group], argv: Sequence[str] | None = None, *, defaults: Mapping[str, object] | None = None
) -> tuple[list[Any], list[str]]:
    """Parse the flags of ``groups``, and leave all others alone.

    Args:
        argv: words of the command line; default: this program's.
        defaults: values of flags that are not given, where they are not those of the dataclasses.

    Returns:
        An object of each group, and the words that belong to no flag of them.

    Raises:
        UserError: a value that cannot work.
    """
    words = sys.argv[1:] if argv is None else argv
    _refuse_second_lists(groups, words)
    parser = _make_parser(groups)
    parser.set_defaults(**(defaults or {}))
    found, others = parser.parse_words(words)
    parsed = [expanded(group(**{name: getattr(found, name) for name in flags_of([group])})) for group in groups]
    for group in parsed:
        check_values(group)
    return parsed, others


def parse_groups(
    groups: Sequence[Group],
    argv: Sequence[str] | None,
    *,
    description: str,
    defaults: Mapping[str, object] | None = None,
    own: Group | None = None,
    acting: Collection[str] | None = None,
) -> list[Any]:
    """Parse the flags of ``groups`` and no others: the command line over ``--config FILE`` over ``defaults``.

    Args:
        argv: words of the command line; default: this program's.
        description: what ``--help`` says first.
        defaults: values of flags that are not given, where they are not those of the dataclasses.
        own: the group that belongs to the program alone; ``--help`` shows all of it.
        acting: names of the flags that do something here, for ``--help``; default: all.

    Returns:
        An object of each group.

    Raises:
        UserError: unknown flag or key, or a value that cannot work.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    show_help_if_asked(groups, words, description=description, own=own, acting=acting)
    file = _config_file(words)
    from_file = {} if file is None else typed(read_yaml(file), groups, f"config: {file}")
    parsed, unknown = parse_known(groups, words, defaults={**(defaults or {}), **from_file})
    if unknown:
        if not unknown[0].startswith("-"):
            raise UserError(f"{unknown[0]!r} stands where a flag should: flags begin with --; --help lists them")
        name = unknown[0].lstrip("-").split("=")[0]
        raise UserError(f"unknown flag {unknown[0]!r}{instead_of(name, groups)}; --help_all lists them")
    return parsed


def show_help_if_asked(
    groups: Sequence[Group],
    argv: Sequence[str],
    *,
    description: str,
    own: Group | None = None,
    acting: Collection[str] | None = None,
) -> None:
    """Print the help and leave, if the command line asks for it.

    Args:
        description: what the help says first.
        own: the group that belongs to the program alone; the help shows all of it.
        acting: names of the flags that do something here; default: all.
    """
    if not (_HELP | _HELP_ALL).intersection(argv):
        return
    if speaks_for_all():
        whole = not _HELP_ALL.isdisjoint(argv)
        print(
            help_text(groups, description=description, own=own, acting=acting, whole=whole),
            file=console.out(),
            flush=True,
        )
    sys.exit(0)


def _refuse_second_lists(groups: Sequence[Group], argv: Sequence[str]) -> None:
    """Refuse a list that is given in pieces: the last piece would replace the others."""
    words = Counter(_name(word) for word in argv)
    for name, kind in kinds_of(groups).items():
        if words[name] > 1 and kind.is_list:
            raise UserError(f"{name}: is given {words[name]} times; write all its values after one --{name}")


def _name(word: str) -> str | None:
    """Return the name of the flag that a word of a command line is, if it is one."""
    return word.partition("=")[0].removeprefix("--").replace("-", "_") if word.startswith("--") else None


def _config_file(argv: Sequence[str]) -> str | None:
    parser = RaisingParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=os.path.expanduser)
    file: str | None = parser.parse_words(argv)[0].config
    return file


def given_names(argv: Sequence[str]) -> frozenset[str]:
    """Return the names of the flags on a command line and in the file of its ``--config``, whatever their values."""
    words = [name for word in argv if (name := _name(word)) is not None]
    file = _config_file(argv)
    names = [*words, *(read_yaml(file) if file is not None else ())]
    return frozenset({*names, *(name.removeprefix("no_") for name in names)})


def debug_is_on(argv: Sequence[str]) -> bool:
    """Say whether a command line, or the file of its ``--config``, asks for ``--debug``. It refuses nothing."""
    parser = RaisingParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--debug", nargs="?", const="true")
    try:
        given, file = parser.parse_words(argv)[0].debug, _config_file(argv)
        if given is None and file is not None:
            given = read_yaml(file).get("debug")
    except UserError:
        return False
    return isinstance(given, str) and given.lower() in ON
