"""What ``--help`` says, and docs/flags.md: flags under titles, those that most runs set first."""

import dataclasses
import shutil
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from taso_ds.flags.flag import Flag, Group, Kind, Scalar, kinds_of
from taso_ds.flags.verbs import as_started, program

_FIRST = "What most runs set"
_NOTE = "--config run.yaml reads flags of the run from a file; the command line goes before it."
_TYPES: dict[type[Scalar], str] = {int: "number", float: "number", str: "name"}
_INDENT, _WIDEST = 36, 110


@dataclass(frozen=True)
class Line:
    """One flag, as it is shown."""

    name: str
    kind: Kind
    default: object
    flag: Flag

    @property
    def value(self) -> str:
        """What stands behind the flag: what its number counts, what its word names; nothing behind a switch."""
        if self.kind.item is bool:
            return ""
        word = self.flag.unit or ("path" if self.flag.is_path else _TYPES[self.kind.item])
        return f"{word} ..." if self.kind.is_list else word

    @property
    def spelled(self) -> str:
        if self.kind.item is bool:
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


def section_of(group: Group, acting: Collection[str] | None = None) -> Section:
    """Return the flags of a group that are not hidden, under the first sentence of its docstring.

    Args:
        acting: names of the flags to show; default: all.
    """
    kinds = kinds_of([group])
    lines = [
        Line(entry.name, kinds[entry.name], entry.default, entry.metadata["flag"])
        for entry in dataclasses.fields(group)
        if acting is None or entry.name in acting
    ]
    return Section(str(group.__doc__).partition(".")[0], [line for line in lines if not line.flag.is_hidden])


def sections(
    groups: Sequence[Group], *, own: Group | None = None, acting: Collection[str] | None = None, whole: bool
) -> list[Section]:
    """Return the program's own flags, then those that most runs set, then all others group by group.

    Args:
        own: the group that belongs to the program alone.
        acting: names of the flags to show; default: all.
        whole: whether to show the others.
    """
    shared = [section_of(group, acting) for group in groups if group is not own]
    first = Section(_FIRST, [line for section in shared for line in section.lines if line.flag.is_first])
    others = [Section(section.title, [line for line in section.lines if not line.flag.is_first]) for section in shared]
    found = [*([] if own is None else [section_of(own, acting)]), first, *(others if whole else [])]
    return [section for section in found if section.lines]


def help_text(
    groups: Sequence[Group], *, description: str, own: Group | None, acting: Collection[str] | None, whole: bool
) -> str:
    """Return the help of a program, as wide as the terminal.

    Args:
        description: what it says first.
        own: the group that belongs to the program alone; all of it is shown.
        acting: names of the flags that do something here; None: all.
        whole: whether to show the flags that few runs set.
    """
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
