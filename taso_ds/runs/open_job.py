"""A job on the ranks that are here: checked against this machine, its rows encoded, its base loaded."""

import logging

from taso_ds.adapters.experts import find_experts
from taso_ds.adapters.targets import Targets
from taso_ds.config import RunConfig
from taso_ds.distributed import comm, placement
from taso_ds.distributed import engine as engines
from taso_ds.distributed.ds_config_check import check_device
from taso_ds.distributed.zero import full_shape
from taso_ds.job import Job, preflight
from taso_ds.models.load import BaseModel, load_base_model
from taso_ds.models.source import model_source
from taso_ds.objectives.vocabulary import check_tokens
from taso_ds.planning.host_check import check_this_host

log = logging.getLogger(__name__)


def open_job(config: RunConfig, *, trains: bool = True) -> Job:
    """Check and read everything that needs no weights; the process group exists already.

    Args:
        trains: whether something will be trained, for which this host must have room, or only opened.

    Raises:
        UserError: on every rank, before any weight is loaded.
    """
    job = preflight(config, comm.world_size(), source=model_source(config.model), trains=trains)
    placement.check_nvme(job.zero)
    check_device(job.zero, config.run.ds_config)
    rows, data = job.rows, job.examples
    check_this_host(job, trains=trains)
    job.objective.check(job.base.num_positions)
    check_tokens(job.base, {data.train_source: rows, data.eval_source: job.objective.rows()})
    log.info("train: %d rows from %s", len(rows), data.train_source)
    log.info("evaluation: %d rows from %s", len(data.evaluation), data.eval_source)
    for line in job.base_in_words():
        log.info(line)
    return job


def load_base(job: Job) -> tuple[BaseModel, Targets]:
    """Load the base, and find its targets in it."""
    base = load_base_model(job.base, seed=job.config.run.seed, zero=job.zero)
    if job.config.training.gradient_checkpointing:
        base.model.gradient_checkpointing_enable({"use_reentrant": False})
    if job.zero.stage == 3:
        engines.set_leaf_modules(base.model, find_experts(base.model, shape_of=full_shape).blocks)
    return base, job.targets.within(base.model, shape_of=full_shape)
