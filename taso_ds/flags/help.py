"""What ``--help`` says, and docs/flags.md: flags under titles, those that most runs set first."""

import dataclasses
import shutil
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from taso_ds.flags.flag import Flag, hints_of, kind_of
from taso_ds.flags.verbs import as_started, program

_FIRST = "What most runs set"
_NOTE = "--config run.yaml reads flags of the run from a file; the command line goes before it."
_TYPES: dict[Any, str] = {int: "number", float: "number", str: "name"}
_INDENT, _WIDEST = 36, 110


@dataclass(frozen=True)
class Line:
    """One flag, as it is shown.

    Attributes:
        kind: type of its values.
    """

    name: str
    kind: Any
    default: Any
    flag: Flag

    @property
    def value(self) -> str:
        """What stands behind the flag: what its number counts, what its word names; nothing behind a switch."""
        if self.kind is bool:
            return ""
        item = get_args(self.kind)[0] if get_origin(self.kind) is list else self.kind
        word = self.flag.unit or ("path" if self.flag.is_path else _TYPES[item])
        return word if item is self.kind else f"{word} ..."

    @property
    def spelled(self) -> str:
        if self.kind is bool:
            return f"--{self.name}, --no_{self.name}" if self.default else f"--{self.name}"
        return f"--{self.name} {self.value.upper() if self.value.islower() else self.value}"

    @property
    def default_text(self) -> str | None:
        """The default; None where the help says what it is."""
        if isinstance(self.default, bool):
            return "on" if self.default else "off"
        return None if self.default is None else str(self.default)


@dataclass(frozen=True)
class Section:
    """Flags under a title."""

    title: str
    lines: list[Line]


def section_of(group: Any, acting: Collection[str] | None = None) -> Section:
    """Return all flags of a group under the first sentence of its docstring, without the hidden ones.

    Args:
        acting: names of the flags to show; default: all.
    """
    hints = hints_of([group])
    lines = [
        Line(entry.name, kind_of(hints[entry.name]), entry.default, entry.metadata["flag"])
        for entry in dataclasses.fields(group)
        if acting is None or entry.name in acting
    ]
    return Section(str(group.__doc__).partition(".")[0], [line for line in lines if not line.flag.is_hidden])


def sections(
    groups: Sequence[Any], *, own: Any = None, acting: Collection[str] | None = None, whole: bool
) -> list[Section]:
    """Return the program's own flags, those that most runs set and, if ``whole``, all others group by group."""
    shared = [section_of(group, acting) for group in groups if group is not own]
    first = Section(_FIRST, [line for section in shared for line in section.lines if line.flag.is_first])
    others = [Section(section.title, [line for line in section.lines if not line.flag.is_first]) for section in shared]
    found = [*([] if own is None else [section_of(own, acting)]), first, *(others if whole else [])]
    return [section for section in found if section.lines]


def help_text(groups: Sequence[Any], *, description: str, own: Any, acting: Collection[str] | None, whole: bool) -> str:
    """Return the help of a program; see ``command_line.parse_groups``."""
    width = min(shutil.get_terminal_size().columns, _WIDEST) - 2
    parts = [f"usage: {program()} [flags]", as_started(description).strip()]
    for section in sections(groups, own=own, acting=acting, whole=whole):
        parts.append("\n".join([f"{section.title}:", *(text for line in section.lines for text in _wrap(line, width))]))
    number = sum(len(section.lines) for section in sections(groups, own=own, acting=acting, whole=True))
    return "\n\n".join([*parts, _NOTE if whole else f"--help_all shows all {number} flags. {_NOTE}"])


def _wrap(line: Line, width: int) -> list[str]:
    left, default = f"  {line.spelled}", line.default_text
    text = line.flag.help if default is None else f"{line.flag.help} (default: {default})"
    right = textwrap.wrap(text, max(width - _INDENT, 30))
    head = [left] if len(left) > _INDENT - 2 else [f"{left:<{_INDENT}}{right.pop(0)}"]
    return [*head, *(" " * _INDENT + part for part in right)]
