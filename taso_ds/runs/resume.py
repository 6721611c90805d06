"""Where a run begins: anew, with the regions of an interrupted run, or at one of its checkpoints.

Rank 0 decides before anything heavy loads. A run goes on only if it is the same run: what differs in the configuration
is listed, and anything that would change the result is refused. Its place is the ``step`` in the checkpoint's
``progress.json``, and nothing more: rows, learning rate and random numbers are functions of the step's number.
"""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from taso_ds.config import RunConfig
from taso_ds.errors import UserError
from taso_ds.flags.flag import flags_of
from taso_ds.flags.verbs import command
from taso_ds.methods.folders import MODEL
from taso_ds.runs.folder import PICTURE, REGIONS, RUN
from taso_ds.runs.recorded import (
    Difference,
    RunRecord,
    differences,
    is_calibration,
    is_finished,
    length_of,
    read_run,
)
from taso_ds.training.arguments import TrainArguments
from taso_ds.training.checkpoint import CHECKPOINTS, PROGRESS, Checkpoints, resolve_checkpoint
from taso_ds.training.progress import Progress, Saved, read_progress

log = logging.getLogger(__name__)

AUTO, NONE = "auto", "none"


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        origin: folder of the run, or of the core regions, that goes on; None for a new one.
        checkpoint: the one to go on from; None to start at step 0.
        progress: what that checkpoint says.
        regions: region file of the interrupted run; None to score.
        global_batch_size: of the interrupted run; None where nothing was trained.
        is_finished: whether there is nothing left to do.
    """

    origin: Path | None = None
    checkpoint: Path | None = None
    progress: Progress | None = None
    regions: Path | None = None
    global_batch_size: int | None = None
    is_finished: bool = False

    @property
    def is_new(self) -> bool:
        return self.origin is None

    @property
    def step(self) -> int:
        return self.progress.step if self.progress else 0

    @property
    def saved(self) -> Saved | None:
        """The checkpoint to go on from."""
        return None if self.checkpoint is None or self.progress is None else Saved(self.checkpoint, self.progress)

    def is_same_folder(self, folder: Path) -> bool:
        """Say whether the run goes on where it was begun."""
        return self.origin is not None and self.origin.resolve() == folder.resolve()

    def adapt(self, config: RunConfig, world_size: int) -> RunConfig:
        """Return the configuration with the global batch of the interrupted run, divided over the ranks there are now.

        Raises:
            UserError: that many ranks cannot share it.
        """
        if self.global_batch_size is None:
            return config
        rows, odd = divmod(self.global_batch_size, world_size)
        if odd:
            raise UserError(
                f"resume: {world_size} ranks cannot share the {self.global_batch_size} rows of each step of this run;"
                f" start it with a number of ranks that divides {self.global_batch_size}"
            )
        asked = config.training.per_device_train_batch_size
        micro = next(number for number in range(min(asked, rows), 0, -1) if rows % number == 0)
        if micro != asked:
            log.info("resume: %d rows per rank and forward in place of %d, for the same global batch", micro, asked)
        training = dataclasses.replace(
            config.training,
            global_batch_size=self.global_batch_size,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=None,  # what is left of the global batch
        )
        return dataclasses.replace(config, training=training)


def find_start(config: RunConfig, folder: Path) -> Start:
    """Decide where the run in ``folder`` begins. Rank 0 only; nothing is written.

    Raises:
        UserError: the folder holds a run of another configuration, or ``--resume`` names no complete checkpoint.
    """
    resume = config.run.resume
    if resume not in (AUTO, NONE):
        checkpoint = resolve_checkpoint(Path(resume))
        start = _from(config, checkpoint.parent.parent, checkpoint)
        if (folder / RUN).is_file() and not start.is_same_folder(folder) and not config.run.overwrite_output_dir:
            raise UserError(
                f"output_dir: {folder} holds a run already; choose another --output_dir to go on from {checkpoint}, or"
                " pass --overwrite_output_dir"
            )
        return start
    if config.run.overwrite_output_dir or not (folder / RUN).is_file():
        return Start()
    run = read_run(folder)
    if resume == NONE:
        _check_same(config, folder, run)
        _refuse_to_replace_others(config, folder, run)
        return Start()
    if is_calibration(run):
        return _from_calibration(config, folder, run)
    finished = is_finished(folder, run)
    if finished and not any(entry.is_length for entry in differences(run, config, folder / RUN)):
        _check_same(config, folder, run)
        return Start(is_finished=True)
    found = Checkpoints(folder / CHECKPOINTS).newest()
    for line in found.skipped:
        log.warning("checkpoint: skipped %s", line)
    if finished:
        _refuse_to_replace_others(config, folder, run)
    if finished and found.path is None:
        raise UserError(
            f"output_dir: {folder} is finished, and no checkpoint is left to extend it from; choose another"
            " --output_dir, or undo the change of --max_steps or --num_train_epochs"
        )
    if found.skipped and found.path is None:
        log.warning("checkpoint: none in %s is complete; training starts at step 0", folder)
    return _from(config, folder, found.path)


def find_calibration(config: RunConfig, folder: Path) -> bool:
    """Say whether the core regions of this configuration are in ``folder`` already. Rank 0 only.

    Raises:
        UserError: the folder holds a training run, or core regions of another configuration.
    """
    if config.run.overwrite_output_dir or not (folder / RUN).is_file():
        return False
    run = read_run(folder)
    if not is_calibration(run):
        raise UserError(
            f"output_dir: {folder} holds a training run, which core regions alone would replace; choose another"
            " --output_dir, or pass --overwrite_output_dir"
        )
    _check_same(config, folder, run)
    return config.run.resume == AUTO and (folder / REGIONS).is_file() and (folder / PICTURE).is_file()


def _refuse_to_replace_others(config: RunConfig, folder: Path, run: RunRecord) -> None:
    """Refuse to train over what another verb of this package has made; UserError."""
    others = {
        f"core regions that {command('calibrate')} made": is_calibration(run),
        f"{MODEL}, which {command('export')} made": not config.method.trains_base and (folder / MODEL).exists(),
    }
    for words, is_there in others.items():
        if is_there:
            raise UserError(
                f"output_dir: {folder} holds {words}; move that away, choose another --output_dir, or pass"
                " --overwrite_output_dir"
            )


def check_length(steps: int, start: Start) -> None:
    """Refuse to make a run shorter; UserError."""
    if start.progress is not None and steps < start.progress.total_steps:
        raise UserError(
            f"max_steps: {steps} steps are fewer than the {start.progress.total_steps} of the run that"
            f" {start.checkpoint} belongs to; ask for more (--max_steps, --num_train_epochs) to extend it"
        )


def check_data(data_digest: str, start: Start) -> None:
    """Refuse to go on with other training rows; UserError."""
    if start.progress is not None and start.progress.data != data_digest:
        raise UserError(
            f"resume: the training rows are not those that {start.checkpoint} was trained on; put the data back, or"
            " start anew with --resume none in another --output_dir"
        )


def check_base(fingerprint: str, start: Start) -> None:
    """Refuse to go on on another base; UserError."""
    if start.progress is not None and start.progress.base != fingerprint:
        raise UserError(
            f"resume: the base is not the one that {start.checkpoint} was trained on (its weights have another"
            " fingerprint); pass the same --model_name_or_path"
        )


def _from_calibration(config: RunConfig, folder: Path, run: RunRecord) -> Start:
    """Train in the core regions that a calibration has left in this folder for this configuration."""
    _check_same(config, folder, run)
    regions = folder / REGIONS
    return Start(folder, regions=regions if regions.is_file() else None)


def _from(config: RunConfig, folder: Path, checkpoint: Path | None) -> Start:
    run = read_run(folder)
    if is_calibration(run):
        raise UserError(f"{folder / RUN}: is not the record of a training run")
    progress = None if checkpoint is None else read_progress(checkpoint)
    if checkpoint is None or progress is None:
        changed = differences(run, config, folder / RUN)
    else:  # how long the run is to be is what was asked for last, which a checkpoint may be older than
        record: RunRecord = {"config": progress.config | length_of(run), "started_in": progress.started_in}
        changed = differences(record, config, checkpoint / PROGRESS)
    _refuse_other(
        changed,
        folder,
        remedy="undo the change, start anew with --resume none in another --output_dir, or",
        extends=progress is not None and is_finished(folder, run),
    )
    regions = folder / REGIONS
    if checkpoint is not None:
        log.info("resume: goes on after step %d (%s)", progress.step if progress else 0, checkpoint)
    has_regions = config.method.needs_regions and regions.is_file()
    if config.method.needs_regions and checkpoint is not None and not has_regions:
        raise UserError(f"resume: {regions} is missing, which {checkpoint} belongs to; put it back")
    batch = progress.global_batch_size if progress else _global_batch(run)
    if not isinstance(batch, int):
        raise UserError(f"{folder / RUN}: has no batch.global_batch_size")
    return Start(folder, checkpoint, progress, regions if has_regions else None, batch)


def _global_batch(run: RunRecord) -> object:
    batch = run["batch"]
    return batch.get("global_batch_size") if isinstance(batch, dict) else None


def _check_same(config: RunConfig, folder: Path, run: RunRecord) -> None:
    """Refuse a folder with another configuration; UserError."""
    found, remedy = differences(run, config, folder / RUN), "choose another --output_dir, or pass"
    if not is_calibration(run):
        _refuse_other(found, folder, remedy=remedy)
        return
    loop = flags_of([TrainArguments])  # core regions are the same however one trains in them
    others = [entry for entry in found if entry.name not in loop]
    _refuse_other(others, folder, what="core regions of other flags", remedy=remedy)


def _refuse_other(
    found: Sequence[Difference], folder: Path, *, what: str = "another run", remedy: str, extends: bool = False
) -> None:
    """Refuse to go on with, or to replace, another run; UserError lists what differs.

    Args:
        what: what the folder holds, in words.
        remedy: what to do, in words that end before the name of a flag.
        extends: whether the length may differ.
    """
    if any(not (entry.is_harmless or (entry.is_length and extends)) for entry in found):
        listed = "; ".join(map(str, found))
        raise UserError(f"output_dir: {folder} holds {what} ({listed}); {remedy} --overwrite_output_dir")
    if found:
        log.info("resume: the same run with %s", "; ".join(map(str, found)))
