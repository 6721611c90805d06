"""What a run is told: argument groups from ``--config run.yaml`` with flags on top, checked before anything loads.

Names are Hugging Face's where one exists. Each room has its group, a frozen dataclass; a value that cannot work raises
a ``UserError`` that names the field, the value and what would be valid. Derived values are computed, not configured.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from taso_ds.data.arguments import DataArguments
from taso_ds.errors import UserError
from taso_ds.flags.command_line import given_names, parse_groups
from taso_ds.flags.flag import CALL, SCHEDULE, START, Group, arg, flags_of, require
from taso_ds.methods.arguments import AdapterArguments
from taso_ds.models.arguments import ModelArguments
from taso_ds.scoring.arguments import SCORING, CalibrationArguments
from taso_ds.training.arguments import TrainArguments

if TYPE_CHECKING:
    from taso_ds.methods.method import Method


@dataclass(frozen=True)
class RunArguments:
    """The run itself: where it writes, how it starts and goes on."""

    ds_config: str = arg(
        "zero3.json",
        "DeepSpeed JSON: a path, or the name of a shipped one.",
        effect=SCHEDULE,
        path=True,
        first=True,
        planned=True,
    )
    nvme_path: str | None = arg(
        None, "Folder on each node's local NVMe disk, for zero3_nvme.json.", effect=START, path=True
    )
    output_dir: str | None = arg(
        None, "Run folder; default: runs/<method>-<task>, numbered.", effect=START, path=True, first=True
    )
    overwrite_output_dir: bool = arg(False, "Replace a different run in output_dir.", effect=START)
    resume: str = arg(
        "auto",
        "auto: go on with an interrupted run in output_dir; none: anew; or a checkpoint folder.",
        effect=START,
        path=True,
        words=("auto", "none"),
    )
    seed: int = arg(0, "Seed of data order, initial adapters and new heads.")
    expected_world_size: int | None = arg(
        None, "Number of ranks; with fewer or more the run does not start.", effect=START, unit="ranks"
    )
    verify_export: bool = arg(True, "Re-open the exported adapter in a fresh process and compare logits.", effect=START)
    dry_run: bool = arg(False, "Print what would be done, without loading weights, and exit.", effect=CALL)
    force: bool = arg(False, "Start even where the plan says that host memory is too small.", effect=START)
    debug: bool = arg(False, "Print tracebacks of errors, and warnings of libraries.", effect=CALL)
    config: str | None = arg(None, "YAML file of these arguments; flags override it.", effect=CALL, path=True)
    local_rank: int = arg(-1, "Set by the deepspeed launcher; LOCAL_RANK is what counts.", effect=CALL, hidden=True)

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**32, "seed", self.seed, "in [0, 2**32)")
        ranks = self.expected_world_size
        require(ranks is None or ranks > 0, "expected_world_size", ranks, "a positive number")


GROUPS: tuple[Group, ...] = (
    ModelArguments,
    DataArguments,
    CalibrationArguments,
    AdapterArguments,
    TrainArguments,
    RunArguments,
)


@dataclass(frozen=True)
class RunConfig:
    """All argument groups of one run, and the names of the arguments that the user gave, with whatever value."""

    model: ModelArguments
    data: DataArguments
    calibration: CalibrationArguments
    adapter: AdapterArguments
    training: TrainArguments
    run: RunArguments
    given: frozenset[str] = dataclasses.field(default=frozenset(), compare=False, kw_only=True)

    def __post_init__(self) -> None:
        quantizes = self.model.load_in_4bit or self.model.load_in_8bit
        if self.calibration.importance_weights == "original" and not quantizes:
            raise UserError("importance_weights: original is for --load_in_4bit and --load_in_8bit; drop it")

    @property
    def method(self) -> "Method":
        """What is trained, with this run's numbers."""
        from taso_ds.methods.method import MethodSettings
        from taso_ds.methods.table import METHODS

        settings = MethodSettings(
            structure=self.adapter.structure,
            rank=self.adapter.rank,
            scaling=self.adapter.scaling,
            rho=self.adapter.rho,
            core_fraction=self.calibration.core_fraction,
            seed=self.run.seed,
            training=self.training,
        )
        return METHODS[self.adapter.method]()(settings)

    def flags(self) -> dict[str, object]:
        """Return every argument under its flag's name, without those that say how the run was started or do nothing."""
        groups = (self.model, self.data, self.calibration, self.adapter, self.training, self.run)
        merged: dict[str, object] = {key: value for group in groups for key, value in dataclasses.asdict(group).items()}
        meanings, idle = flags_of(groups), SCORING if self.calibration.core_regions is not None else ()
        return {key: value for key, value in merged.items() if meanings[key].is_recorded and key not in idle}


def parse_run_config(argv: Sequence[str] | None = None, *, description: str = "") -> RunConfig:
    """Parse flags over ``--config FILE`` over defaults.

    Raises:
        UserError: unknown flag or key, or a value that cannot work.
    """
    groups = parse_groups(GROUPS, argv, description=description)
    return RunConfig(*groups, given=given_names(sys.argv[1:] if argv is None else argv))
