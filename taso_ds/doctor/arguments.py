"""The doctor's own flags; all others are the job's.

Reading flags needs no library: an installation whose torch does not load gets its diagnosis.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from taso_ds.config import GROUPS
from taso_ds.errors import UserError
from taso_ds.flags.command_line import parse_known, show_help_if_asked
from taso_ds.flags.flag import arg, check_new_file


@dataclass(frozen=True)
class DoctorArguments:
    """What the job's own flags do not say. Pass those of the job that is to be queued, too."""

    hostfile: str | None = arg(
        None, "The deepspeed launcher's hostfile: resolve its hosts and log in to them.", path=True
    )
    master_port: int = arg(29500, "Port at which the ranks will meet.", unit="port")
    gpus_per_node: int | None = arg(
        None, "Ranks of a node; default: the hostfile's slots, or the devices here.", unit="ranks"
    )
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
    words = sys.argv[1:] if argv is None else argv
    show_help_if_asked((*GROUPS, DoctorArguments), words, description=description, own=DoctorArguments)
    (arguments,), others = parse_known([DoctorArguments], words)
    return arguments, others
