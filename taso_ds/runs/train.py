"""One training run from configuration to files, in the order in which it happens."""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from taso_ds.adapters.targets import Targets
from taso_ds.config import RunConfig
from taso_ds.distributed import comm
from taso_ds.distributed import engine as engines
from taso_ds.errors import UserError
from taso_ds.files.schema import SCHEMA
from taso_ds.interrupts import Interrupts
from taso_ds.job import Job
from taso_ds.methods.prove import Proof
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
from taso_ds.runs.record import (
    Counts,
    count_parameters,
    describe_extension,
    describe_record,
    describe_scores,
    run_record,
)
from taso_ds.runs.resume import Start, check_base, check_data, check_length, find_start
from taso_ds.runs.stages import Stages, training_stages
from taso_ds.scoring.regions import Regions, describe_regions
from taso_ds.training.checkpoint import CHECKPOINTS, Checkpoints
from taso_ds.training.divergence import Diverged, LossWatch
from taso_ds.training.feed import Feed
from taso_ds.training.optim import Group, Schedule, learning_rate_table, make_optimizer, make_schedule, total_steps
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
    """Do what is left of the run, stage by stage."""
    config = comm.together(lambda: start.adapt(asked, comm.world_size()))
    stages = training_stages(config, start)
    job, schedule = _read(config, start, stages)
    base, targets = load_base(job)
    stages.done("loading", job.base.name)
    regions, fingerprint = _find_regions(job, base, targets, start, stages)
    cut = {} if regions is None else regions.cut
    groups = config.method.attach(base, targets, cut)
    counts = count_parameters(base.model, groups)
    rates = learning_rate_table(groups, schedule)
    observer = watch(folder.path) if comm.is_main() else Observer()
    record = run_record(asked, job, counts, schedule, rates)
    comm.on_main(lambda: _write_start(folder, config, record, regions, start, observer))
    log.info(describe_record(counts, schedule, rates))
    folder.keep_log()
    if start.progress is not None and start.progress.total_steps != schedule.total_steps:
        log.info(describe_extension(start.progress, groups[0], schedule))
    say_who_sees(folder.path)

    engine = engines.training_engine(base.model, make_optimizer(groups, config.training), job.zero)
    stages.done("engine", f"DeepSpeed, ZeRO stage {job.zero.stage}")
    evaluate = partial(job.objective.evaluate, engine.module)
    before = evaluate() if start.progress is None else start.progress.before
    log.info("before: %s", describe_scores(before))
    steps_in_words = f"{schedule.total_steps} steps"
    stages.done("evaluation", f"{len(job.examples.evaluation)} rows", next_is=steps_in_words)
    saver = Saver(engine, Checkpoints(folder.path / CHECKPOINTS), regions=cut, limit=config.training.save_total_limit)
    trainer = _trainer(job, engine, groups, schedule, digest=saver.digest, evaluate=evaluate, observer=observer)
    origin = _origin(job, schedule, base=fingerprint, before=before)
    with _last_good_kept(job, folder, base):
        RecoverableTraining(trainer, saver, origin=origin, training=config.training).train(
            interrupts, saved=start.saved
        )
    stages.done("training", steps_in_words)

    after = evaluate()
    log.info("after:  %s", describe_scores(after))
    stages.done("evaluation", f"{len(job.examples.evaluation)} rows")
    proof = save(job, folder.path, base, engine.module, stages)
    results = _results(job, schedule, counts, regions, before=before, after=after, proof=proof)
    comm.on_main(lambda: folder.write_json(RESULTS, results))
    comm.on_main(lambda: observer.on_end(results))
    return folder.path


def _read(config: RunConfig, start: Start, stages: Stages) -> tuple[Job, Schedule]:
    """Read what needs no weights, and refuse what a run that goes on was not begun with."""
    job = comm.together(lambda: open_job(config))
    stages.done("reading", f"{len(job.rows)} training rows", next_is=job.base.name)
    schedule = make_schedule(config.training, total_steps(config.training, job.plan.steps_per_epoch))
    if start.progress is not None:
        comm.on_main(lambda: check_data(job.data_digest, start))
        comm.on_main(lambda: check_length(schedule.total_steps, start))
    return job, schedule


def _find_regions(
    job: Job, base: BaseModel, targets: Targets, start: Start, stages: Stages
) -> tuple[Regions | None, str]:
    """Return the core regions where the method needs them, and the fingerprint of the base where it stays frozen."""
    regions, fingerprint, method = None, "", job.config.method
    if method.needs_regions:
        regions = find_regions(job, base, targets, earlier=start.regions)
        stages.done("scoring", f"{len(regions.rows)} rows", next_is=f"DeepSpeed, ZeRO stage {job.zero.stage}")
        fingerprint = regions.file.fingerprint
    elif not method.trains_base:
        fingerprint = base_fingerprint(base, targets)
    comm.on_main(lambda: check_base(fingerprint, start))
    return regions, fingerprint


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


def _origin(job: Job, schedule: Schedule, *, base: str, before: dict[str, float]) -> Progress:
    """Return what a checkpoint of this run says before the first of its steps."""
    return Progress(
        step=0,
        total_steps=schedule.total_steps,
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


def _write_start(
    folder: RunFolder,
    config: RunConfig,
    record: Mapping[str, object],
    regions: Regions | None,
    start: Start,
    observer: Observer,
) -> None:
    """Make the folder ready, and write what is known before the first step: first the record, which makes it ours."""
    goes_on_here = start.is_same_folder(folder.path)
    if not goes_on_here:
        folder.start()
    folder.write_json(RUN, record)
    observer.on_start(record, start.step)
    if regions is not None:
        log.info(describe_regions(regions, config.calibration))
        if not (goes_on_here and start.regions and (folder.path / PICTURE).is_file()):  # the last that is written
            write_regions(folder, config.calibration, regions)
    folder.finish_scoring()


@contextmanager
def _last_good_kept(job: Job, folder: RunFolder, base: BaseModel) -> Iterator[None]:
    """Keep the adapter that the finished steps trained when training diverges, and say where it is."""
    try:
        yield
    except Diverged as error:
        if error.good_steps == 0 or error.applied or job.config.method.trains_base:
            raise
        path = write_trained(job, folder.path, base)
        raise UserError(f"{error}; the adapter after step {error.good_steps} is in {path}") from error


def _results(
    job: Job,
    schedule: Schedule,
    counts: Counts,
    regions: Regions | None,
    *,
    before: Mapping[str, float],
    after: Mapping[str, float],
    proof: Proof | None,
) -> dict[str, object]:
    """Return the content of ``results.json``.

    Args:
        before: scores of the base.
        after: scores of what was trained.
        proof: of the export; None when none was asked for.
    """
    fraction = job.config.calibration.element_fraction
    return {
        "task": job.examples.task.name,
        "method": job.config.adapter.method,
        "steps": schedule.total_steps,
        "headline": job.objective.headline,
        "before": before,
        "after": after,
        "trainable_parameters": counts["trainable"],
        "export": None if proof is None else dataclasses.asdict(proof),
        "concentration": None if regions is None else regions.mean_concentration(fraction),
    }
