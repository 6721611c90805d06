"""One training run from configuration to files, in order of execution; every step is a function of another module."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from taso_ds.config import RunConfig
from taso_ds.distributed import comm
from taso_ds.distributed import engine as engines
from taso_ds.errors import UserError
from taso_ds.files.schema import SCHEMA
from taso_ds.interrupts import Interrupts
from taso_ds.job import Job
from taso_ds.models.fingerprint import base_fingerprint
from taso_ds.models.load import BaseModel
from taso_ds.reports.monitors import watch
from taso_ds.reports.observer import Observer
from taso_ds.runs.core_regions import find_regions, write_regions
from taso_ds.runs.export import save, write_trained
from taso_ds.runs.folder import PICTURE, RESULTS, RUN, RunFolder
from taso_ds.runs.holding import folder_of, reports_in
from taso_ds.runs.nodes import check_no_run_elsewhere, say_who_sees
from taso_ds.runs.open_job import load_base, open_job
from taso_ds.runs.record import describe_extension, describe_record, describe_scores, run_record
from taso_ds.runs.resume import Start, check_base, check_data, check_length, find_start
from taso_ds.runs.stages import training_stages
from taso_ds.scoring.regions import Regions, describe_regions
from taso_ds.training.checkpoint import CHECKPOINTS, Checkpoints
from taso_ds.training.divergence import Diverged, LossWatch
from taso_ds.training.feed import Feed
from taso_ds.training.optim import Group, Schedule, make_optimizer, make_schedule, total_steps
from taso_ds.training.progress import Progress
from taso_ds.training.recoverable import RecoverableTraining
from taso_ds.training.saver import Saver
from taso_ds.training.trainer import Trainer

log = logging.getLogger(__name__)


def train(config: RunConfig, interrupts: Interrupts) -> Path:
    """Run everything, or what an interrupted run has left to do, and return the run folder.

    Raises:
        UserError: on every rank; before training nothing is left behind.
        Interrupted: a signal asked the run to stop; started again, it goes on.
    """
    with folder_of(config, goes_on=True) as (config, path), reports_in(path):
        start = comm.on_main(lambda: find_start(config, path))
        if start.is_new and config.run.resume == "auto" and not config.run.overwrite_output_dir:
            check_no_run_elsewhere(path)
        if start.is_finished:
            log.info("%s holds this run, finished; --resume none runs it again", path)
            return path
        return _run(config, start, RunFolder(path), interrupts)


def _run(asked: RunConfig, start: Start, folder: RunFolder, interrupts: Interrupts) -> Path:
    config = comm.together(lambda: start.adapt(asked, comm.world_size()))
    stages = training_stages(config, start)
    job = comm.together(lambda: open_job(config))
    stages.done("reading", f"{len(job.rows)} training rows", next_is=str(config.model.model_name_or_path))
    steps = total_steps(config.training, job.plan.steps_per_epoch)
    if start.progress is not None:
        comm.on_main(lambda: check_data(job.data_digest, start))
        comm.on_main(lambda: check_length(steps, start))
    base, targets = load_base(job)
    stages.done("loading", str(config.model.model_name_or_path))
    method = config.method
    found, fingerprint = None, ""  # of the base: none where training changes it
    if method.needs_regions:
        found = find_regions(job, base, targets, earlier=start.regions)
        stages.done("scoring", f"{len(found.rows)} rows", next_is=f"DeepSpeed, ZeRO stage {job.zero.stage}")
        fingerprint = found.file.fingerprint
    elif not method.trains_base:
        fingerprint = base_fingerprint(base, targets)
    comm.on_main(lambda: check_base(fingerprint, start))
    groups = method.attach(base, targets, {} if found is None else found.cut)
    schedule = make_schedule(config.training, steps)
    record = run_record(asked, job, base.model, groups, schedule)
    observer = watch(folder.path) if comm.is_main() else Observer()
    comm.on_main(lambda: _start(folder, config, record, found, start, observer))
    folder.keep_log()
    if start.progress is not None and start.progress.total_steps != steps:
        log.info(describe_extension(start.progress, groups[0], schedule))
    say_who_sees(folder.path)
    engine = engines.training_engine(base.model, make_optimizer(groups, config.training), job.zero)
    stages.done("engine", f"DeepSpeed, ZeRO stage {job.zero.stage}")
    evaluate = partial(job.objective.evaluate, engine.module)
    before = evaluate() if start.progress is None else start.progress.before
    log.info("before: %s", describe_scores(before))
    stages.done("evaluation", f"{len(job.examples.evaluation)} rows", next_is=f"{steps} steps")
    saver = Saver(
        engine,
        Checkpoints(folder.path / CHECKPOINTS),
        regions={} if found is None else found.cut,
        limit=config.training.save_total_limit,
    )
    trainer = _trainer(job, engine, groups, schedule, digest=saver.digest, evaluate=evaluate, observer=observer)
    origin = _origin(job, steps, base=fingerprint, before=before)
    try:
        RecoverableTraining(trainer, saver, origin=origin, training=config.training).train(
            interrupts, saved=start.saved
        )
    except Diverged as error:
        _save_last_good(job, folder, base, error)
        raise
    stages.done("training", f"{steps} steps")
    after = evaluate()
    log.info("after:  %s", describe_scores(after))
    stages.done("evaluation", f"{len(job.examples.evaluation)} rows")
    proof = save(job, folder.path, base, engine.module, stages)
    results = {
        "task": job.examples.task.name,
        "method": config.adapter.method,
        "steps": schedule.total_steps,
        "headline": job.objective.headline,
        "before": before,
        "after": after,
        "trainable_parameters": record["parameters"]["trainable"],
        "export": None if proof is None else dataclasses.asdict(proof),
        "concentration": None if found is None else found.mean_concentration(config.calibration.element_fraction),
    }
    comm.on_main(lambda: folder.write_json(RESULTS, results))
    comm.on_main(lambda: observer.on_end(results))
    return folder.path


def _trainer(
    job: Job,
    engine: engines.Engine,
    groups: Sequence[Group],
    schedule: Schedule,
    *,
    digest: int,
    evaluate: Callable[[], Mapping[str, float]],
    observer: Observer,
) -> Trainer:
    """Return the loop of this run."""
    training = job.config.training
    return Trainer(
        engine,
        Feed(job.rows, job.plan, job.sizes, job.objective.collate),
        loss_sum=job.objective.loss_sum,
        groups=groups,
        schedule=schedule,
        logging_steps=training.logging_steps,
        eval_steps=training.eval_steps,
        save_steps=training.save_steps,
        save_minutes=training.save_minutes,
        evaluate=evaluate,
        observer=observer,
        digest=digest,
        loss_watch=LossWatch(training.max_loss_jump),
    )


def _origin(job: Job, steps: int, *, base: str, before: dict[str, float]) -> Progress:
    """Return what a checkpoint of this run says before the first of its steps."""
    return Progress(
        step=0,
        total_steps=steps,
        optimizer_steps=0,
        config=job.config.flags(),
        world_size=comm.world_size(),
        zero_stage=job.zero.stage,
        global_batch_size=job.sizes.global_batch_size,
        base=base,
        data=job.data_digest,
        before=before,
        recent_losses=[],
        rollbacks=0,
        started_in=str(Path.cwd()),
        schema_version=SCHEMA,
    )


def _start(
    folder: RunFolder,
    config: RunConfig,
    record: dict[str, Any],
    found: Regions | None,
    start: Start,
    observer: Observer,
) -> None:
    """Make the folder ready and write what is known before the first step; the record, which makes it ours, first."""
    goes_on_here = start.is_same_folder(folder.path)
    if not goes_on_here:
        folder.start()
    folder.write_json(RUN, record)
    observer.on_start(record, start.step)
    if found is not None:
        log.info(describe_regions(found, config.calibration))
        if not (goes_on_here and start.regions and (folder.path / PICTURE).is_file()):  # the last that is written
            write_regions(folder, config.calibration, found)
    folder.finish_scoring()
    log.info(describe_record(record))


def _save_last_good(job: Job, folder: RunFolder, base: BaseModel, error: Diverged) -> None:
    """Keep the adapter that the finished steps trained."""
    if error.good_steps == 0 or error.applied or job.config.method.trains_base:
        return
    path = write_trained(job, folder.path, base)
    raise UserError(f"{error}; the adapter after step {error.good_steps} is in {path}") from error
