"""What ``taso`` does, and how this user starts it: as a script of a checkout, or as an installed command.

A command in a message can be pasted. A user of ``launch/plan.py`` is told of the scripts beside it. The others, who may
have no checkout, are told of ``taso plan``.
"""

import re
import sys
from pathlib import Path

VERBS = ("train", "calibrate", "evaluate", "export", "plan", "doctor", "slurm")

_COMMAND = re.compile(r"(python |deepspeed )?launch/(\w+)\.py")


def _script() -> Path | None:
    """Return the checkout's launch script that runs, as it was typed; None where an installed command runs."""
    path = Path(sys.argv[0])
    folder = path.resolve().parent
    is_installed = folder.parent == Path(__file__).resolve().parent
    return path if path.suffix == ".py" and folder.name == "launch" and not is_installed else None


def program() -> str:
    """Return the name of the program that runs, as a help text begins with it."""
    return str(_script() or Path(sys.argv[0]).name)


def command(verb: str) -> str:
    """Return what starts a verb on one device."""
    script = _script()
    return f"taso {verb}" if script is None else str(script.with_name(f"{verb}.py"))


def launched(verb: str) -> str:
    """Return what follows ``deepspeed`` and its flags to start a verb on many devices."""
    return f"--module taso_ds.launch.{verb}" if _script() is None else command(verb)


def as_started(text: str) -> str:
    """Return a text in which the names of launch scripts are replaced by the commands that this user has."""

    def _own(found: re.Match[str]) -> str:
        starter, verb = found.groups(default="")
        if starter == "deepspeed ":
            return f"deepspeed {launched(verb)}"
        return (starter if _script() else "") + command(verb)

    return _COMMAND.sub(_own, text)
