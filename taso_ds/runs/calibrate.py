"""Core regions alone, from configuration to files."""

import logging
from pathlib import Path

from taso_ds.config import RunConfig
from taso_ds.distributed import comm
from taso_ds.errors import UserError
from taso_ds.runs.core_regions import find_regions, write_regions
from taso_ds.runs.folder import RUN, RunFolder
from taso_ds.runs.holding import folder_of, reports_in
from taso_ds.runs.open_job import load_base, open_job
from taso_ds.runs.record import record_start
from taso_ds.runs.resume import find_calibration
from taso_ds.runs.stages import Stages
from taso_ds.scoring.regions import describe_regions

log = logging.getLogger(__name__)


def calibrate(config: RunConfig) -> Path:
    """Score the base and write its core regions only; returns the folder.

    Raises:
        UserError: on every rank, before anything is written.
    """
    if config.calibration.core_regions is not None or not config.method.needs_regions:
        raise UserError("calibrate: makes core regions; drop --core_regions and --method")
    with folder_of(config, goes_on=False) as (config, path), reports_in(path):
        if comm.on_main(lambda: find_calibration(config, path)):
            log.info("%s holds these core regions; --resume none scores again", path)
        else:
            _calibrate(config, RunFolder(path))
        return path


def _calibrate(config: RunConfig, folder: RunFolder) -> None:
    stages = Stages(["reading", "loading", "scoring"])
    job = comm.together(lambda: open_job(config))
    stages.done("reading", f"{len(job.rows)} training rows", next_is=str(config.model.model_name_or_path))
    base, targets = load_base(job)
    stages.done("loading", str(config.model.model_name_or_path))
    found = find_regions(job, base, targets)
    stages.done("scoring", f"{len(found.rows)} rows")
    record = record_start(config, job) | {
        "data": {"train": job.examples.train_source},
        "concentration": found.mean_concentration(config.calibration.element_fraction),
    }

    def write() -> None:
        folder.start()
        folder.write_json(RUN, record)  # first: it makes the folder ours
        log.info(describe_regions(found, config.calibration))
        write_regions(folder, config.calibration, found)

    comm.on_main(write)
    folder.keep_log()
