"""The doctor's own flags; all others are the job's.

Parsed by argparse alone: ``--help`` is quick, and an installation whose torch does not load gets its diagnosis.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args, get_type_hints

from taso_ds.errors import UserError
from taso_ds.flags import RaisingParser, arg, check_new_file, check_values, expanded

_OTHERS = "Every flag of launch/train.py is understood too: pass those of the job that is to be queued."


@dataclass(frozen=True)
class DoctorArguments:
    """What the job's own flags do not say."""

    hostfile: str | None = arg(
        None, "The deepspeed launcher's hostfile: resolve its hosts and log in to them.", path=True
    )
    master_port: int = arg(29500, "Port at which the ranks will meet.")
    gpus_per_node: int | None = arg(None, "Ranks of a node; default: the hostfile's slots, or the devices here.")
    json: str | None = arg(
        None, "Write the findings as JSON to this file; - for stdout, instead of the table.", path=True
    )

    def __post_init__(self) -> None:
        for name, high in (("master_port", 65535), ("gpus_per_node", 1024)):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= high:
                raise UserError(f"{name}: {value} is not in [1, {high}]")
        check_new_file("json", None if self.json == "-" else self.json)


def parse_doctor(argv: Sequence[str] | None = None, *, description: str = "") -> tuple[DoctorArguments, list[str]]:
    """Return the doctor's flags, and all others as they stand.

    Raises:
        UserError: a value that cannot work.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = RaisingParser(description=description, epilog=_OTHERS, formatter_class=formatter, allow_abbrev=False)
    hints = get_type_hints(DoctorArguments)
    for entry in dataclasses.fields(DoctorArguments):
        kind = next((one for one in get_args(hints[entry.name]) if one is not type(None)), hints[entry.name])
        default = "" if entry.default is None else f" Default: {entry.default}."
        names = dict.fromkeys((f"--{entry.name}", f"--{entry.name.replace('_', '-')}"))
        parser.add_argument(*names, type=kind, default=entry.default, help=entry.metadata["help"] + default)
    known, others = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    arguments = expanded(DoctorArguments(**vars(known)))
    check_values(arguments)
    return arguments, others
