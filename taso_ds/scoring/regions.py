"""Core regions of a run: scored on calibration rows, or read from a file and cut again."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from taso_ds.adapters.region_file import (
    RegionFile,
    check_region_file,
    check_region_shapes,
    load_region_file,
)
from taso_ds.adapters.selection import CoreRegion, concentration, ladder_with
from taso_ds.adapters.targets import MatrixShape, Targets
from taso_ds.data.encode import EncodedRow
from taso_ds.distributed import comm
from taso_ds.distributed.engine import scoring_engine
from taso_ds.distributed.zero_config import ZeroConfig
from taso_ds.errors import UserError
from taso_ds.models.arguments import ModelArguments
from taso_ds.models.fingerprint import fingerprint
from taso_ds.models.load import BaseModel
from taso_ds.models.spec import BaseSpec
from taso_ds.models.stored_weights import StoredWeights
from taso_ds.objectives.batches import Batch, dealt_batches, on_device
from taso_ds.scoring.arguments import SCORING, CalibrationArguments
from taso_ds.scoring.partial_scores import PartialScores
from taso_ds.scoring.score import score_regions
from taso_ds.scoring.scoring_pass import ScoringSettings

log = logging.getLogger(__name__)


class Scored(Protocol):
    """What scoring uses of an objective."""

    def collate(self, rows: Sequence[EncodedRow]) -> Batch: ...

    def loss_sum(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]: ...


@dataclass(frozen=True, eq=False)
class Regions:
    """The core regions of a run.

    Attributes:
        file: the scores, and what they depend on.
        cut: the region in use of every matrix.
        rows: the calibration rows; none when the scores were read from a file.
    """

    file: RegionFile
    cut: dict[str, CoreRegion]
    rows: Sequence[EncodedRow]

    @property
    def out_of_reach(self) -> list[str]:
        """The matrices whose importance is zero everywhere, often experts that no calibration token was sent to."""
        without = [name for name, scores in self.file.scores.items() if not scores.row_importance.any()]
        return without if len(without) < len(self.cut) else []

    def mean_concentration(self, element_fraction: float) -> dict[str, float]:
        """Return the mean shares of core elements inside the core rows and columns, over all matrices within reach."""
        scores, left_out = self.file.scores, set(self.out_of_reach)
        shares = [
            concentration(scores[name], region, element_fraction)
            for name, region in self.cut.items()
            if name not in left_out
        ]
        return {
            "rows": sum(rows for rows, _ in shares) / len(shares),
            "cols": sum(cols for _, cols in shares) / len(shares),
        }


def calibration_rows(rows: Sequence[EncodedRow], *, number: int, seed: int) -> list[EncodedRow]:
    """Return ``number`` rows of the training split, drawn by seed, in the order of the split."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return [rows[index] for index in sorted(order[:number].tolist())]


def read_regions(
    calibration: CalibrationArguments, shapes: Mapping[str, MatrixShape], *, given: Collection[str]
) -> RegionFile | None:
    """Read ``--core_regions`` before anything heavy loads; None when regions are to be scored.

    Args:
        calibration: the flags.
        shapes: of the matrices to adapt.
        given: names of the flags that the user gave.

    Raises:
        UserError: the file is damaged, belongs to another model, or was not scored as a given flag says.
    """
    path = calibration.core_regions
    if path is None:
        return None
    file = load_region_file(Path(path))
    check_region_shapes(file, shapes, source=path)
    _check_agrees(calibration, file, path, given)
    _cut(calibration, file, path)
    return file


def _check_agrees(calibration: CalibrationArguments, file: RegionFile, path: str, given: Collection[str]) -> None:
    """Refuse given flags that the file contradicts. What the file does not say cannot contradict a flag."""
    for name in SCORING:
        asked, made = getattr(calibration, name), file.settings.get(name)
        if name not in given or asked in (None, made) or made is None:
            continue
        if name == "calibration_samples" and isinstance(made, (int, float)) and asked > made:
            continue  # all rows there were
        raise UserError(
            f"{name}: {path} was scored with {made}, not {asked}; drop --{name}, or --core_regions to score again"
        )


def reuse_regions(
    calibration: CalibrationArguments,
    file: RegionFile,
    targets: Targets,
    *,
    source: str,
    rows: Sequence[EncodedRow] = (),
    stored: StoredWeights | None = None,
) -> Regions:
    """Check that a region file belongs to this base and cut it at this run's fractions.

    Args:
        calibration: the fractions.
        file: the scores, as read.
        targets: the matrices to adapt, within the loaded base.
        source: what to call the file in messages.
        rows: the rows it was scored on, where they are known.
        stored: the checkpoint's weights, when the base is quantized.

    Raises:
        UserError: on every rank, when the file was scored on another base.
    """
    digest = fingerprint(targets, stored)
    comm.together(lambda: check_region_file(file, targets.shapes, fingerprint=digest, source=source))
    log.info("core regions: read from %s, cut at p = %s", source, calibration.core_fraction)
    return Regions(file, _cut(calibration, file, source), rows)


def score_base(
    calibration: CalibrationArguments,
    base: BaseModel,
    targets: Targets,
    rows: Sequence[EncodedRow],
    *,
    objective: Scored,
    batch_size: int,
    seed: int,
    made_of: Mapping[str, object],
    partial_scores: Path,
    zero: ZeroConfig,
    stored: StoredWeights | None = None,
) -> Regions:
    """Score the frozen base on the calibration rows and cut the core regions. The base stays loaded.

    Args:
        calibration: how to score. Passes that an interrupted run has finished are not repeated.
        base: loaded and frozen.
        targets: the matrices to adapt, within that base.
        rows: the calibration rows of all ranks.
        objective: makes batches and their loss.
        batch_size: rows of one forward.
        seed: of ``--importance random``.
        made_of: what the scores depend on beside the base, for the region file.
        partial_scores: the file that keeps the scores of finished passes, if there are several.
        zero: the DeepSpeed configuration.
        stored: the checkpoint's weights, when the base is quantized.

    Raises:
        UserError: ``--importance_weights original`` asks for weights that the checkpoint does not hold.
    """
    settings = ScoringSettings(
        score=calibration.importance,
        reduction=calibration.calibration_reduction,
        ladder=ladder_with(calibration.element_fraction),
        seed=seed,
        passes=calibration.calibration_passes,
        offload=calibration.calibration_offload == "cpu",
        original_weight=_original_weight(calibration, base.spec, stored),
    )
    batches = dealt_batches(rows, batch_size=batch_size, collate=objective.collate)
    file = RegionFile({}, dict(made_of), fingerprint(targets, stored))
    finished = PartialScores(partial_scores, file, several=calibration.calibration_passes > 1)
    with scoring_engine(base.model, zero) as scored:
        scores = score_regions(
            scored,
            targets,
            [on_device(batch) for _, batch in batches],
            loss_sum=objective.loss_sum,
            settings=settings,
            done=finished.read(),
            on_pass=finished.write,
        )
    file = dataclasses.replace(file, scores=scores)
    return Regions(file, _cut(calibration, file, "the scores"), rows)


def describe_scoring(
    calibration: CalibrationArguments, base: ModelArguments, rows: Sequence[EncodedRow], *, task: str | None, seed: int
) -> dict[str, object]:
    """Return what the scores depend on beside the base's weights, as a region file records it.

    Args:
        calibration: how the base is scored.
        base: which base it is.
        rows: the calibration rows.
        task: the name of their task.
        seed: the run's.
    """
    tokens = json.dumps([[row.input_ids, row.labels, row.target] for row in rows])
    return {
        "importance": calibration.importance,
        "calibration_reduction": calibration.calibration_reduction,
        "calibration_batch_size": calibration.calibration_batch_size,
        "element_fraction": calibration.element_fraction,
        "core_fraction": calibration.core_fraction,
        "calibration_samples": len(rows),
        "calibration_rows": hashlib.sha256(tokens.encode()).hexdigest(),
        "task": task,
        "model_name_or_path": base.model_name_or_path,
        "gguf_file": base.gguf_file,
        "dtype": "bfloat16" if base.bf16 else "float32",
        "load_in_4bit": base.load_in_4bit,
        "load_in_8bit": base.load_in_8bit,
        "importance_weights": calibration.importance_weights,
        "seed": seed,
    }


def _original_weight(
    calibration: CalibrationArguments, base: BaseSpec, stored: StoredWeights | None
) -> Callable[[str], Tensor] | None:
    if calibration.importance_weights == "loaded":
        return None
    if stored is None:
        raise UserError(
            f"importance_weights: {base.name} has no safetensors files with the targets one by one; drop original"
        )
    return lambda name: stored.read(name).to(base.dtype)


def _cut(calibration: CalibrationArguments, file: RegionFile, source: str) -> dict[str, CoreRegion]:
    return file.cut(
        element_fraction=calibration.element_fraction, core_fraction=calibration.core_fraction, source=source
    )


def describe_regions(regions: Regions, calibration: CalibrationArguments) -> str:
    """Return one line that lets a user see whether importance concentrated."""
    shares = regions.mean_concentration(calibration.element_fraction)
    p = calibration.core_fraction
    line = (
        f"core regions: {len(regions.cut)} matrices; the top {p:.0%} of rows hold {shares['rows']:.0%} and the top"
        f" {p:.0%} of columns {shares['cols']:.0%} of the core elements (a random region: {p:.0%})"
    )
    if out_of_reach := regions.out_of_reach:
        line += (
            f"; no gradient reached {len(out_of_reach)} of them (the first is {out_of_reach[0]}), whose regions are"
            " their first rows and columns: raise --calibration_samples for experts, leave others out of"
            " --target_modules"
        )
    return line
