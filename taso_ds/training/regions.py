"""Core regions of a run: scored on calibration rows, or read from a file and cut again."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from taso_ds.adapters.region_file import (
    RegionFile,
    check_region_file,
    check_region_shapes,
    load_region_file,
    save_region_file,
)
from taso_ds.adapters.selection import CoreRegion, concentration, ladder_with
from taso_ds.adapters.targets import MatrixShape
from taso_ds.config import RunConfig
from taso_ds.data.encode import EncodedRow
from taso_ds.distributed import comm, zero
from taso_ds.distributed.engine import scoring_engine
from taso_ds.errors import UserError
from taso_ds.training.calibrate import ScoringSettings, score_regions
from taso_ds.training.feed import Collate, dealt_batches, on_device
from taso_ds.training.loss import LossSum
from taso_ds.training.picture import draw_regions
from taso_ds.training.run_folder import CALIBRATION, PICTURE, REGIONS, RunFolder

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Regions:
    """What scoring found, the regions in use, and the rows it was found on (none when read from a file)."""

    file: RegionFile
    cut: dict[str, CoreRegion]
    rows: Sequence[EncodedRow]

    def mean_concentration(self, element_fraction: float) -> dict[str, float]:
        """Return the mean shares of core elements inside the core rows and columns."""
        shares = [concentration(self.file.scores[name], region, element_fraction) for name, region in self.cut.items()]
        return {
            "rows": sum(rows for rows, _ in shares) / len(shares),
            "cols": sum(cols for _, cols in shares) / len(shares),
        }


def fingerprint(targets: Mapping[str, nn.Module]) -> str:
    """Return a digest of the target weights that does not depend on sharding or on fp32/bf16 loading. A collective."""
    import hashlib

    weights: list[Any] = [module.weight for module in targets.values()]
    lines = [
        f"{name} {tuple(zero.full_shape(weight))} {value}"
        for name, weight, value in zip(targets, weights, zero.checksum(weights), strict=True)
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_regions(config: RunConfig, shapes: Mapping[str, MatrixShape]) -> RegionFile | None:
    """Read ``--core_regions`` before anything heavy loads; None when regions are to be scored."""
    path = config.calibration.core_regions
    if path is None:
        return None
    if config.adapter.method != "taso":
        raise UserError(f"core_regions: --method {config.adapter.method} has none; drop --core_regions")
    file = load_region_file(Path(path))
    check_region_shapes(file, shapes, source=path)
    _cut(config, file)
    return file


def reuse_regions(
    config: RunConfig, file: RegionFile, targets: Mapping[str, nn.Module], shapes: Mapping[str, MatrixShape]
) -> Regions:
    """Check that a region file belongs to this base and cut it at this run's fractions."""
    source = str(config.calibration.core_regions)
    digest = fingerprint(targets)
    comm.together(lambda: check_region_file(file, shapes, fingerprint=digest, source=source))
    log.info("core regions: read from %s, cut at p = %s", source, config.calibration.core_fraction)
    return Regions(file, _cut(config, file), rows=[])


def score_base(
    config: RunConfig,
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    shapes: Mapping[str, MatrixShape],
    rows: Sequence[EncodedRow],
    *,
    collate: Collate,
    filler: EncodedRow,
    loss_sum: LossSum,
    ds_config: dict[str, Any],
) -> Regions:
    """Score the frozen base on the calibration rows and cut the core regions. The base stays loaded."""
    calibration = config.calibration
    settings = ScoringSettings(
        score=calibration.importance,
        reduction=calibration.calibration_reduction,
        ladder=ladder_with(calibration.element_fraction),
        seed=config.run.seed,
    )
    batches = dealt_batches(
        rows,
        batch_size=calibration.calibration_batch_size or config.training.per_device_train_batch_size,
        collate=collate,
        filler=filler,
    )
    digest = fingerprint(targets)
    with scoring_engine(model, ds_config) as scored:
        scores = score_regions(
            scored,
            targets,
            shapes,
            [on_device(batch) for _, batch in batches],
            loss_sum=loss_sum,
            settings=settings,
        )
    file = RegionFile(
        scores,
        settings={
            "importance": settings.score,
            "calibration_reduction": settings.reduction,
            "element_fraction": calibration.element_fraction,
            "core_fraction": calibration.core_fraction,
            "calibration_samples": len(rows),
            "task": config.data.task,
            "model_name_or_path": config.model.model_name_or_path,
            "gguf_file": config.model.gguf_file,
            "dtype": "bfloat16" if config.model.bf16 else "float32",
            "seed": config.run.seed,
        },
        fingerprint=digest,
    )
    return Regions(file, _cut(config, file), rows)


def _cut(config: RunConfig, file: RegionFile) -> dict[str, CoreRegion]:
    calibration = config.calibration
    return file.cut(
        element_fraction=calibration.element_fraction,
        core_fraction=calibration.core_fraction,
        source=str(calibration.core_regions),
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
    return (
        f"core regions: {len(regions.cut)} matrices; the top {p:.0%} of rows hold {found['rows']:.0%} and the top"
        f" {p:.0%} of columns {found['cols']:.0%} of the core elements (a random region: {p:.0%})"
    )
