"""Core regions of a run: scored on calibration rows, or read from a file and cut again."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taso_ds.adapters.region_file import (
    RegionFile,
    check_region_file,
    check_region_shapes,
    load_region_file,
    save_region_file,
)
from taso_ds.adapters.selection import CoreRegion, RegionScores, concentration, ladder_with
from taso_ds.adapters.targets import MatrixShape, Targets
from taso_ds.config import RunConfig
from taso_ds.data.encode import EncodedRow
from taso_ds.distributed import comm
from taso_ds.distributed.engine import scoring_engine
from taso_ds.distributed.zero_config import ZeroConfig
from taso_ds.errors import UserError
from taso_ds.models.fingerprint import fingerprint
from taso_ds.models.stored_weights import StoredWeights
from taso_ds.objectives.batches import Collate, dealt_batches, on_device
from taso_ds.objectives.loss import LossSum
from taso_ds.reports.region_picture import draw_regions
from taso_ds.runs.folder import CALIBRATION, PARTIAL, PICTURE, REGIONS, RunFolder
from taso_ds.scoring.arguments import SCORING
from taso_ds.scoring.score import score_regions
from taso_ds.scoring.scoring_pass import ScoringSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Regions:
    """What scoring found, the regions in use, and the rows it was found on (none when read from a file)."""

    file: RegionFile
    cut: dict[str, CoreRegion]
    rows: Sequence[EncodedRow]

    @property
    def out_of_reach(self) -> list[str]:
        """Matrices whose importance is zero everywhere: often experts that no calibration token was sent to."""
        found = [name for name, scores in self.file.scores.items() if not scores.row_importance.any()]
        return found if len(found) < len(self.cut) else []

    def mean_concentration(self, element_fraction: float) -> dict[str, float]:
        """Return the mean shares of core elements inside the core rows and columns, experts out of reach left out."""
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


def read_regions(config: RunConfig, shapes: Mapping[str, MatrixShape]) -> RegionFile | None:
    """Read ``--core_regions`` before anything heavy loads; None when regions are to be scored."""
    path = config.calibration.core_regions
    if path is None:
        return None
    if not config.method.needs_regions:
        raise UserError(f"core_regions: --method {config.adapter.method} has none; drop --core_regions")
    file = load_region_file(Path(path))
    check_region_shapes(file, shapes, source=path)
    _check_agrees(config, file, path)
    _cut(config, file, path)
    return file


def _check_agrees(config: RunConfig, file: RegionFile, path: str) -> None:
    """Refuse flags that would have scored otherwise than the file was; what it does not say cannot contradict it."""
    for name in SCORING:
        asked, made = getattr(config.calibration, name), file.settings.get(name)
        if name not in config.given or asked in (None, made) or made is None:
            continue
        if name == "calibration_samples" and asked > made:
            continue  # all rows there were
        raise UserError(
            f"{name}: {path} was scored with {made}, not {asked}; drop --{name}, or --core_regions to score again"
        )


def reuse_regions(
    config: RunConfig,
    file: RegionFile,
    targets: Targets,
    *,
    source: str,
    rows: Sequence[EncodedRow] = (),
    stored: StoredWeights | None = None,
) -> Regions:
    """Check that a region file belongs to this base and cut it at this run's fractions.

    Args:
        rows: what it was scored on, where that is known.
    """
    digest = fingerprint(targets, stored)
    comm.together(lambda: check_region_file(file, targets.shapes, fingerprint=digest, source=source))
    log.info("core regions: read from %s, cut at p = %s", source, config.calibration.core_fraction)
    return Regions(file, _cut(config, file, source), rows)


def score_base(
    config: RunConfig,
    model: nn.Module,
    targets: Targets,
    rows: Sequence[EncodedRow],
    *,
    collate: Collate,
    loss_sum: LossSum,
    zero: ZeroConfig,
    stored: StoredWeights | None = None,
) -> Regions:
    """Score the frozen base on the calibration rows and cut the core regions. The base stays loaded.

    Scored in several passes, the output folder keeps the scores of the finished ones, and a run that was interrupted
    goes on after them.

    Args:
        stored: the checkpoint's weights, when the base is quantized.

    Raises:
        UserError: when ``--importance_weights original`` asks for weights that the checkpoint does not hold.
    """
    calibration = config.calibration
    settings = ScoringSettings(
        score=calibration.importance,
        reduction=calibration.calibration_reduction,
        ladder=ladder_with(calibration.element_fraction),
        seed=config.run.seed,
        passes=calibration.calibration_passes,
        offload=calibration.calibration_offload == "cpu",
        original_weight=_original_weight(config, stored),
    )
    batches = dealt_batches(
        rows,
        batch_size=calibration.calibration_batch_size or config.training.per_device_train_batch_size,
        collate=collate,
    )
    digest, made_of = fingerprint(targets, stored), _describe(config, rows)
    partial_file = _PartialScores(config, RegionFile({}, made_of, digest))
    with scoring_engine(model, zero) as scored:
        scores = score_regions(
            scored,
            targets,
            [on_device(batch) for _, batch in batches],
            loss_sum=loss_sum,
            settings=settings,
            done=partial_file.read(),
            on_pass=partial_file.write,
        )
    file = RegionFile(scores, made_of, digest)
    return Regions(file, _cut(config, file, "the scores"), rows)


def _describe(config: RunConfig, rows: Sequence[EncodedRow]) -> dict[str, Any]:
    """Return what the scores depend on beside the base."""
    calibration = config.calibration
    tokens = json.dumps([[row.input_ids, row.labels, row.target] for row in rows])
    return {
        "importance": calibration.importance,
        "calibration_reduction": calibration.calibration_reduction,
        "calibration_batch_size": calibration.calibration_batch_size,
        "element_fraction": calibration.element_fraction,
        "core_fraction": calibration.core_fraction,
        "calibration_samples": len(rows),
        "calibration_rows": hashlib.sha256(tokens.encode()).hexdigest(),
        "task": config.data.task,
        "model_name_or_path": config.model.model_name_or_path,
        "gguf_file": config.model.gguf_file,
        "dtype": "bfloat16" if config.model.bf16 else "float32",
        "load_in_4bit": config.model.load_in_4bit,
        "load_in_8bit": config.model.load_in_8bit,
        "importance_weights": calibration.importance_weights,
        "seed": config.run.seed,
    }


class _PartialScores:
    """The scores of finished passes, in the output folder; written only where there is more than one pass."""

    def __init__(self, config: RunConfig, empty: RegionFile) -> None:
        self._several = config.calibration.calibration_passes > 1
        self._path = Path(str(config.run.output_dir)) / PARTIAL
        self._empty = empty

    def read(self) -> dict[str, RegionScores]:
        """Return what an interrupted run of the same settings on the same base has scored, on every rank."""
        return comm.on_main(self._read) if self._several else {}

    def _read(self) -> dict[str, RegionScores]:
        if not self._path.is_file():
            return {}
        found = load_region_file(self._path)
        if (found.settings, found.fingerprint) != (self._empty.settings, self._empty.fingerprint):
            raise UserError(f"output_dir: {self._path} was begun with other settings or another base: delete it")
        log.info("scoring: %d matrices are scored already (%s)", len(found.scores), self._path)
        return found.scores

    def write(self, scores: dict[str, RegionScores]) -> None:
        """Keep the scores so far. A collective."""
        if self._several:
            comm.on_main(lambda: self._write(scores))

    def _write(self, scores: dict[str, RegionScores]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        save_region_file(self._path, dataclasses.replace(self._empty, scores=scores))


def _original_weight(config: RunConfig, stored: StoredWeights | None) -> Callable[[str], Tensor] | None:
    if config.calibration.importance_weights == "loaded":
        return None
    if stored is None:
        raise UserError(
            f"importance_weights: {config.model.model_name_or_path} has no safetensors files with the targets one by"
            " one; drop original"
        )
    found, dtype = stored, torch.bfloat16 if config.model.bf16 else torch.float32
    return lambda name: found.read(name).to(dtype)


def _cut(config: RunConfig, file: RegionFile, source: str) -> dict[str, CoreRegion]:
    calibration = config.calibration
    return file.cut(
        element_fraction=calibration.element_fraction, core_fraction=calibration.core_fraction, source=source
    )


def write_regions(folder: RunFolder, config: RunConfig, regions: Regions) -> None:
    """Write calibration rows, regions and their picture. Rank 0 only."""
    calibration = config.calibration
    if regions.rows:
        folder.write_rows(CALIBRATION, regions.rows)
    save_region_file(folder.path / REGIONS, regions.file, regions.cut)
    draw_regions(
        folder.path / PICTURE,
        regions.file.scores,
        regions.cut,
        element_fraction=calibration.element_fraction,
        core_fraction=calibration.core_fraction,
    )


def describe_regions(regions: Regions, config: RunConfig) -> str:
    """Return one line that lets a user see whether importance concentrated."""
    found = regions.mean_concentration(config.calibration.element_fraction)
    p = config.calibration.core_fraction
    line = (
        f"core regions: {len(regions.cut)} matrices; the top {p:.0%} of rows hold {found['rows']:.0%} and the top"
        f" {p:.0%} of columns {found['cols']:.0%} of the core elements (a random region: {p:.0%})"
    )
    if out_of_reach := regions.out_of_reach:
        line += (
            f"; no gradient reached {len(out_of_reach)} of them (the first is {out_of_reach[0]}), whose regions are"
            " their first rows and columns: raise --calibration_samples for experts, leave others out of"
            " --target_modules"
        )
    return line
