"""The core regions of a run: read or scored, and what its folder keeps of them."""

from pathlib import Path

from taso_ds.adapters.region_file import load_region_file, save_region_file
from taso_ds.adapters.targets import Targets
from taso_ds.distributed import comm
from taso_ds.job import Job
from taso_ds.models.load import BaseModel
from taso_ds.models.stored_weights import stored_weights
from taso_ds.reports.region_picture import draw_regions
from taso_ds.runs.folder import CALIBRATION, PARTIAL, PICTURE, REGIONS, RunFolder
from taso_ds.scoring.arguments import CalibrationArguments
from taso_ds.scoring.regions import Regions, calibration_rows, describe_scoring, reuse_regions, score_base


def find_regions(job: Job, base: BaseModel, targets: Targets, *, earlier: Path | None = None) -> Regions:
    """Read or score the core regions. A collective.

    Args:
        base: the loaded, frozen base.
        targets: the matrices to adapt, within that base.
        earlier: region file of the interrupted run that goes on; rank 0 sees it.
    """
    config, calibration = job.config, job.config.calibration
    rows = calibration_rows(job.rows, number=calibration.calibration_samples, seed=config.run.seed)
    with stored_weights(base, targets) as stored:
        if earlier is not None:
            file, known = comm.on_main(lambda: load_region_file(earlier)), rows if job.region_file is None else []
            return reuse_regions(calibration, file, targets, source=str(earlier), rows=known, stored=stored)
        if job.region_file is not None:
            source = str(calibration.core_regions)
            return reuse_regions(calibration, job.region_file, targets, source=source, stored=stored)
        return score_base(
            calibration,
            base,
            targets,
            rows,
            objective=job.objective,
            batch_size=calibration.calibration_batch_size or config.training.per_device_train_batch_size,
            seed=config.run.seed,
            made_of=describe_scoring(calibration, config.model, rows, task=config.data.task, seed=config.run.seed),
            partial_scores=Path(str(config.run.output_dir)) / PARTIAL,
            zero=job.zero,
            stored=stored,
        )


def write_regions(folder: RunFolder, calibration: CalibrationArguments, regions: Regions) -> None:
    """Write calibration rows, regions and their picture. Rank 0 only."""
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
