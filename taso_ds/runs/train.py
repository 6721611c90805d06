"""One training run from configuration to files, in order of execution; every step is a function of another module."""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from taso_ds.config import RunConfig
from taso_ds.data.encode import pad_token_id
from taso_ds.data.task_data import check_held_out
from taso_ds.distributed import comm, zero
from taso_ds.distributed import engine as engines
from taso_ds.distributed.ds_config import without_secrets
from taso_ds.errors import Unforeseen, UserError
from taso_ds.files.schema import SCHEMA
from taso_ds.interrupts import Interrupts
from taso_ds.methods.export import probe_rows
from taso_ds.methods.method import folder_name
from taso_ds.methods.prove import Export, Proof, probe_logits, prove_export
from taso_ds.methods.saved import saved_folder
from taso_ds.models.fingerprint import base_fingerprint
from taso_ds.models.load import BaseModel
from taso_ds.models.quantization import num_parameters
from taso_ds.reports.monitors import watch
from taso_ds.reports.observer import Observer
from taso_ds.runs.build import Setup, find_regions, load_base, set_up
from taso_ds.runs.folder import PICTURE, RESULTS, RUN, RunFolder, versions
from taso_ds.runs.nodes import check_no_run_elsewhere, say_who_sees
from taso_ds.runs.output_folder import take_folder
from taso_ds.runs.resume import Start, check_base, check_data, check_length, find_calibration, find_start
from taso_ds.scoring import regions
from taso_ds.training.checkpoint import CHECKPOINTS, Checkpoints
from taso_ds.training.divergence import Diverged, LossWatch
from taso_ds.training.feed import Feed
from taso_ds.training.optim import (
    Group,
    Schedule,
    describe_groups,
    learning_rate_table,
    make_optimizer,
    make_schedule,
    total_steps,
)
from taso_ds.training.progress import Progress
from taso_ds.training.recoverable import ROLLBACK_FACTOR, RecoverableTraining
from taso_ds.training.saver import Saver
from taso_ds.training.trainer import Trainer

log = logging.getLogger(__name__)


def train(config: RunConfig, interrupts: Interrupts) -> Path:
    """Run everything, or what an interrupted run has left to do, and return the run folder.

    Raises:
        UserError: on every rank; before training nothing is left behind.
        Interrupted: a signal asked the run to stop; started again, it goes on.
    """
    with _folder_of(config, goes_on=True) as (config, path), reports_in(path):
        start = comm.on_main(lambda: find_start(config, path))
        if start.is_new and config.run.resume == "auto" and not config.run.overwrite_output_dir:
            check_no_run_elsewhere(path)
        if start.is_finished:
            log.info("%s holds this run, finished; --resume none runs it again", path)
            return path
        return _run(config, start, RunFolder(path), interrupts)


@contextmanager
def _folder_of(config: RunConfig, *, goes_on: bool) -> Iterator[tuple[RunConfig, Path]]:
    """Yield the configuration with its run folder named, and that folder, which no other run has meanwhile.

    It goes if nothing came of it.

    Args:
        goes_on: without a name, it may be that of an unfinished run.
    """
    with ExitStack() as held:
        path = comm.on_main(lambda: take_folder(config, held, goes_on=goes_on))
        yield dataclasses.replace(config, run=dataclasses.replace(config.run, output_dir=str(path))), path


@contextmanager
def reports_in(path: Path) -> Iterator[None]:
    """Let the traceback of what nobody foresaw lie in the folder of the run that it ended.

    Not before the run's record is there: without one, a folder that is not empty is taken for somebody else's.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise Unforeseen(path if (path / RUN).is_file() else None) from error


def _run(asked: RunConfig, start: Start, folder: RunFolder, interrupts: Interrupts) -> Path:
    config = comm.together(lambda: start.adapt(asked, comm.world_size()))
    comm.together(lambda: check_held_out(config.data))
    setup = comm.together(lambda: set_up(config))
    steps = total_steps(config.training, setup.plan.steps_per_epoch)
    if start.progress is not None:
        comm.on_main(lambda: check_data(setup.data_digest, start))
        comm.on_main(lambda: check_length(steps, start))
    base, targets = load_base(setup)
    method = config.method
    found, fingerprint = None, ""  # of the base: none where training changes it
    if method.needs_regions:
        found = find_regions(setup, base, targets, earlier=start.regions)
        fingerprint = found.file.fingerprint
    elif not method.trains_base:
        fingerprint = base_fingerprint(base, targets)
    comm.on_main(lambda: check_base(fingerprint, start))
    groups = method.attach(base, targets, {} if found is None else found.cut)
    schedule = make_schedule(config.training, steps)
    record = run_record(asked, setup, base.model, groups, schedule)
    observer = watch(folder.path) if comm.is_main() else Observer()
    comm.on_main(lambda: _start(folder, config, record, found, start, observer))
    if start.progress is not None and start.progress.total_steps != steps:
        log.info(describe_extension(start.progress, groups[0], schedule))
    say_who_sees(folder.path)
    engine = engines.training_engine(base.model, make_optimizer(groups, config.training), setup.zero)
    evaluate = partial(setup.objective.evaluate, engine.module)
    before = evaluate() if start.progress is None else start.progress.before
    log.info("before: %s", _in_words(before))
    saver = Saver(
        engine,
        Checkpoints(folder.path / CHECKPOINTS),
        regions={} if found is None else found.cut,
        limit=config.training.save_total_limit,
    )
    trainer = _trainer(setup, engine, groups, schedule, digest=saver.digest, evaluate=evaluate, observer=observer)
    origin = _origin(setup, steps, base=fingerprint, before=before)
    try:
        RecoverableTraining(trainer, saver, origin=origin, training=config.training).train(
            interrupts, saved=start.saved
        )
    except Diverged as error:
        _save_last_good(setup, folder, base, error)
        raise
    after = evaluate()
    log.info("after:  %s", _in_words(after))
    proof = save(setup, folder, base, engine.module)
    results = {
        "task": setup.data.task.name,
        "method": config.adapter.method,
        "steps": schedule.total_steps,
        "headline": setup.objective.headline,
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
    setup: Setup,
    engine: engines.Engine,
    groups: Sequence[Group],
    schedule: Schedule,
    *,
    digest: int,
    evaluate: Callable[[], Mapping[str, float]],
    observer: Observer,
) -> Trainer:
    """Return the loop of this run."""
    training = setup.config.training
    return Trainer(
        engine,
        Feed(setup.rows, setup.plan, setup.sizes, setup.objective.collate),
        loss_sum=setup.objective.loss_sum,
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


def _origin(setup: Setup, steps: int, *, base: str, before: dict[str, float]) -> Progress:
    """Return what a checkpoint of this run says before the first of its steps."""
    return Progress(
        step=0,
        total_steps=steps,
        optimizer_steps=0,
        config=setup.config.flags(),
        world_size=comm.world_size(),
        zero_stage=setup.zero.stage,
        global_batch_size=setup.sizes.global_batch_size,
        base=base,
        data=setup.data_digest,
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
    found: regions.Regions | None,
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
        log.info(regions.describe_regions(found, config))
        if not (goes_on_here and start.regions and (folder.path / PICTURE).is_file()):  # the last that is written
            regions.write_regions(folder, config, found)
    folder.finish_scoring()
    log.info(describe_record(record))


def _record_start(asked: RunConfig, setup: Setup) -> dict[str, Any]:
    """Return what every ``run.json`` begins with: what was asked for, and where."""
    return {
        "schema_version": SCHEMA,
        "config": asked.flags(),
        "started_in": str(Path.cwd()),
        "deepspeed": without_secrets(setup.zero.raw),
        "world_size": comm.world_size(),
        "versions": versions(),
    }


def run_record(
    asked: RunConfig, setup: Setup, model: nn.Module, groups: Sequence[Group], schedule: Schedule
) -> dict[str, Any]:
    """Return the content of a training run's ``run.json``."""
    trainable = sum(zero.full_numel(value) for group in groups for value in group.parameters)
    total = num_parameters(model)
    return _record_start(asked, setup) | {
        "parameters": {"trainable": trainable, "total": total, "share": trainable / total},
        "batch": dataclasses.asdict(setup.sizes) | {"global_batch_size": setup.sizes.global_batch_size},
        "steps": schedule.total_steps,
        "learning_rates": learning_rate_table(groups, schedule),
        "data": {"train": setup.data.train_source, "evaluation": setup.data.eval_source},
    }


def describe_record(record: dict[str, Any]) -> str:
    """Return counts and learning rates as lines."""
    parameters = record["parameters"]
    return "\n".join(
        [
            f"parameters: {parameters['trainable']:,} trainable of {parameters['total']:,} ({parameters['share']:.3%});"
            f" {record['steps']} steps",
            *describe_groups(record["learning_rates"]),
        ]
    )


def describe_extension(progress: Progress, group: Group, schedule: Schedule) -> str:
    """Return one line about the schedule of a run that is to be longer than it was."""
    peak = group.peak * ROLLBACK_FACTOR**progress.rollbacks
    next_rate, last_rate = peak * schedule(progress.step), peak * schedule(schedule.total_steps - 1)
    return (
        f"extended: {schedule.total_steps} steps in place of {progress.total_steps}; the {schedule.kind} schedule is"
        f" now that of {schedule.total_steps} steps: learning rate {next_rate:.3e} at step {progress.step + 1},"
        f" {last_rate:.3e} at the last"
    )


def _in_words(scores: Mapping[str, float]) -> str:
    return ", ".join(
        f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}" for name, value in scores.items()
    )


def save(setup: Setup, folder: RunFolder, base: BaseModel, live: nn.Module) -> Proof | None:
    """Export what was trained and prove it in a fresh process; None when not asked for."""
    _write_trained(setup, folder, base)
    if not setup.config.run.verify_export:
        return None
    rows = probe_rows(setup.rows)
    live.eval()
    logits = probe_logits(live, rows)  # every rank takes part: ZeRO-3 gathers each layer
    return comm.on_main(lambda: prove(setup, folder.path, base, rows, logits))


def _write_trained(setup: Setup, folder: RunFolder, base: BaseModel) -> Path:
    """Write what was trained into the run folder; returns its own folder there."""
    config = setup.config
    path = folder.path / folder_name(config.method)
    config.method.save(path, base)
    return path


def prove(setup: Setup, run: Path, base: BaseModel, rows: Sequence[list[int]], live: Sequence[Tensor]) -> Proof:
    """Open the run's adapter with peft, or its model with transformers, in a fresh process; say how logits differ."""
    config, is_model = setup.config, setup.config.method.trains_base
    export = Export(
        folder=str(saved_folder(config.adapter.method, run)),
        source=None if is_model else setup.base.source,
        revision=config.model.model_revision,
        trust_remote_code=config.model.trust_remote_code,
        head=setup.base.head,
        num_labels=setup.objective.num_labels,
        dtype="bfloat16" if config.model.bf16 else "float32",
        quantization=None if setup.base.quantization is None else setup.base.quantization.settings(base.model),
        pad_id=pad_token_id(setup.base.tokenizer),
    )
    proof = prove_export(export, rows=rows, live=live)
    log.info("opened with %s: %s", "transformers" if is_model else "peft", proof)
    return proof


def calibrate(config: RunConfig) -> Path:
    """Score the base and write its core regions only; returns the folder.

    Raises:
        UserError: on every rank, before anything is written.
    """
    if config.calibration.core_regions is not None or not config.method.needs_regions:
        raise UserError("calibrate: makes core regions; drop --core_regions and --method")
    with _folder_of(config, goes_on=False) as (config, path), reports_in(path):
        if comm.on_main(lambda: find_calibration(config, path)):
            log.info("%s holds these core regions; --resume none scores again", path)
        else:
            _calibrate(config, RunFolder(path))
        return path


def _calibrate(config: RunConfig, folder: RunFolder) -> None:
    setup = comm.together(lambda: set_up(config))
    base, targets = load_base(setup)
    found = find_regions(setup, base, targets)
    record = _record_start(config, setup) | {
        "data": {"train": setup.data.train_source},
        "concentration": found.mean_concentration(config.calibration.element_fraction),
    }

    def write() -> None:
        folder.start()
        folder.write_json(RUN, record)  # first: it makes the folder ours
        log.info(regions.describe_regions(found, config))
        regions.write_regions(folder, config, found)

    comm.on_main(write)


def _save_last_good(setup: Setup, folder: RunFolder, base: BaseModel, error: Diverged) -> None:
    """Keep the adapter that the finished steps trained."""
    if error.good_steps == 0 or error.applied or setup.config.method.trains_base:
        return
    path = _write_trained(setup, folder, base)
    raise UserError(f"{error}; the adapter after step {error.good_steps} is in {path}") from error
