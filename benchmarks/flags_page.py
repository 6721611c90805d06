"""docs/flags.md, from the dataclasses: ``python benchmarks/flags_page.py > docs/flags.md``."""

from typing import Any

from taso_ds.batch_script import SlurmArguments
from taso_ds.config import GROUPS
from taso_ds.doctor.arguments import DoctorArguments
from taso_ds.flags.help import Line, Section, section_of, sections
from taso_ds.planning.arguments import PlanArguments
from taso_ds.runs.finished_arguments import FinishedArguments

_INTRODUCTION = """\
# Flags

`taso VERB --help` shows the flags that most runs set, `--help_all` shows all of them. `--config run.yaml` reads flags
of the run from a file, one `name: value` a line; the command line goes before it. Names are Hugging Face's where one
exists, and dashes do for underscores. A switch is turned on by `--name`, and off by `--name false`, or by `--no_name`
where it is on by default.

The last column of a run's flags says what becomes of a run that is started again with another value. `result`: it is
another run, and refused. `length`: it is made longer. `schedule`: its work is cut up, shown or saved in another way;
what it learns stays the same. `start`, `call`: it is started in another way, which is not recorded.
"""
OWN: tuple[tuple[str, Any], ...] = (
    ("`taso evaluate`, `taso export`", FinishedArguments),
    ("`taso plan`", PlanArguments),
    ("`taso doctor`", DoctorArguments),
    ("`taso slurm`", SlurmArguments),
)


def page() -> str:
    """Return the page as Markdown: the sections of ``taso train --help_all``, then what each other verb adds."""
    parts = [_INTRODUCTION, *(_table(section, with_effect=True) for section in sections(GROUPS, whole=True))]
    for verbs, group in OWN:
        section = section_of(group)
        parts.append(_table(Section(f"{verbs}: {_uncapitalized(section.title)}", section.lines), with_effect=False))
    return "\n".join(parts)


def _uncapitalized(text: str) -> str:
    return text[0].lower() + text[1:]


def _table(section: Section, *, with_effect: bool) -> str:
    titles = ["flag", "value", "default", "what it does", *(["changed"] if with_effect else [])]
    rows = [titles, ["---"] * len(titles), *(_row(line, with_effect=with_effect) for line in section.lines)]
    return "\n".join([f"## {section.title}", "", *(f"| {' | '.join(row)} |" for row in rows), ""])


def _row(line: Line, *, with_effect: bool) -> list[str]:
    default = "" if line.default_text is None else f"`{line.default_text}`"
    help = line.flag.help.replace("|", "\\|").replace("<", "&lt;")
    return [f"`{line.name}`", line.value or "switch", default, help, *([line.flag.effect] if with_effect else [])]


if __name__ == "__main__":
    print(page(), end="")
