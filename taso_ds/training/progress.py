"""What a checkpoint says about its run, beside the trained state."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_origin, get_type_hints

from taso_ds.errors import UserError, reason
from taso_ds.files.json_text import parse_json
from taso_ds.files.schema import check_schema
from taso_ds.training.checkpoint import PROGRESS


@dataclass(frozen=True)
class Progress:
    """What a checkpoint says about its run, beside the trained state.

    Attributes:
        step: optimizer steps done.
        optimizer_steps: steps that Adam's bias correction counts.
        base: fingerprint of the base's target weights; empty where all weights are trained.
        data: digest of the training rows.
        before: evaluation before training.
        recent_losses: of the last steps, oldest first.
        rollbacks: how often training went back after it diverged.
        started_in: folder that relative paths in ``config`` start from; the first schema did not say.
    """

    step: int
    total_steps: int
    optimizer_steps: int
    config: dict[str, object]
    world_size: int
    zero_stage: int
    global_batch_size: int
    base: str
    data: str
    before: dict[str, float]
    recent_losses: list[float]
    rollbacks: int
    started_in: str = ""
    schema_version: int = 1


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint and what it says."""

    path: Path
    progress: Progress


def read_progress(checkpoint: Path) -> Progress:
    """Read the record of a complete checkpoint.

    Raises:
        UserError: it does not hold what this version writes.
    """
    file = checkpoint / PROGRESS
    try:
        values = parse_json(file.read_text(encoding="utf-8"), PROGRESS, constants=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not the record of a checkpoint ({reason(error)})") from error
    try:
        check_schema(values, file)
        progress = Progress(**values)
    except (AttributeError, TypeError) as error:
        raise UserError(f"{file}: not the record of a checkpoint ({reason(error)})") from error
    for name, kind in get_type_hints(Progress).items():
        if not isinstance(getattr(progress, name), get_origin(kind) or kind):
            raise UserError(f"{file}: {name} is not of type {kind}")
    return progress
