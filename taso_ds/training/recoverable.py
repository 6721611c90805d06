"""Training between the first and the last step: save, go on from a checkpoint, go back to one where asked for."""

import logging
from pathlib import Path
from typing import Any

from taso_ds.distributed import comm
from taso_ds.files.schema import SCHEMA
from taso_ds.interrupts import Interrupts
from taso_ds.runs.build import Setup, Trained
from taso_ds.runs.folder import RunFolder
from taso_ds.runs.resume import Start
from taso_ds.scoring.regions import Regions
from taso_ds.training.checkpoint import CHECKPOINTS, Checkpoints
from taso_ds.training.divergence import Diverged, LossWatch
from taso_ds.training.feed import Feed
from taso_ds.training.optim import Schedule
from taso_ds.training.progress import Progress, read_progress
from taso_ds.training.saver import Saver
from taso_ds.training.trainer import Trainer

log = logging.getLogger(__name__)

ROLLBACK_FACTOR = 0.5


class RecoverableTraining:
    """Trainer and checkpoints of one run, which know of each other through this alone."""

    def __init__(
        self,
        setup: Setup,
        folder: RunFolder,
        engine: Any,
        trained: Trained,
        schedule: Schedule,
        found: Regions | None,
        *,
        fingerprint: str,
        before: dict[str, float],
    ) -> None:
        self._setup, self._folder, self._schedule = setup, folder, schedule
        self._fingerprint, self._before = fingerprint, before
        self._rollbacks = 0
        training = setup.config.training
        self._checkpoints = Checkpoints(folder.path / CHECKPOINTS)
        self._saver = Saver(
            engine,
            self._checkpoints,
            regions={} if found is None else found.cut,
            describe=self._describe,
            limit=training.save_total_limit,
        )
        objective = setup.objective

        def on_eval(step: int) -> None:
            scores = objective.evaluate(engine.module)
            if comm.is_main():
                folder.log({"step": step, "eval": scores})

        self._trainer = Trainer(
            engine,
            Feed(setup.rows, setup.plan, setup.sizes, objective.collate),
            loss_sum=objective.loss_sum,
            groups=trained.groups,
            schedule=schedule,
            logging_steps=training.logging_steps,
            eval_steps=training.eval_steps,
            save_steps=training.save_steps,
            save_minutes=training.save_minutes,
            on_log=lambda metrics: folder.log(metrics) if comm.is_main() else None,
            on_eval=on_eval,
            on_save=self._saver.save,
            trained=self._saver.trained,
            loss_watch=LossWatch(training.max_loss_jump),
        )

    def train(self, start: Start, interrupts: Interrupts) -> None:
        """Train from where the run stands to the last step.

        Raises:
            Diverged: and no rollback was asked for, or left.
        """
        training = self._setup.config.training
        self._trainer.engine.train()
        with interrupts.deferred():
            if start.checkpoint is not None and start.progress is not None:
                self._restore(start.checkpoint, start.progress, rollbacks=start.progress.rollbacks)
            elif training.on_divergence == "rollback":
                self._saver.save(0)
            first = start.step
            while True:
                try:
                    self._trainer.fit(first=first, interrupts=interrupts)
                    return
                except Diverged as error:
                    if training.on_divergence == "stop" or self._rollbacks == training.max_rollbacks:
                        raise
                    first = self._roll_back(error)

    def _roll_back(self, error: Diverged) -> int:
        """Go back to the last checkpoint at a lower learning rate; returns its step."""
        if not error.applied:
            self._trainer.discard_gradients()
        checkpoint, progress = comm.on_main(self._last)
        self._restore(checkpoint, progress, rollbacks=self._rollbacks + 1)
        comm.on_main(lambda: self._folder.forget_after(progress.step))
        factor = self._trainer.brake
        log.warning("%s", error)
        log.warning("rollback %d: back to step %d, learning rates × %g", self._rollbacks, progress.step, factor)
        if comm.is_main():
            self._folder.log({"step": progress.step, "rollback": self._rollbacks, "learning_rate_factor": factor})
        return progress.step

    def _last(self) -> Any:
        found = self._checkpoints.newest()
        assert found.path is not None, "there is one of step 0"
        return found.path, read_progress(found.path)

    def _restore(self, checkpoint: Any, progress: Progress, *, rollbacks: int) -> None:
        self._saver.restore(checkpoint, progress)
        self._rollbacks = rollbacks
        self._trainer.brake = ROLLBACK_FACTOR**rollbacks
        self._trainer.loss_watch = LossWatch(self._setup.config.training.max_loss_jump, progress.recent_losses)

    def _describe(self, step: int, optimizer_steps: int) -> Progress:
        setup = self._setup
        return Progress(
            step=step,
            total_steps=self._schedule.total_steps,
            optimizer_steps=optimizer_steps,
            config=setup.config.flags(),
            world_size=comm.world_size(),
            zero_stage=setup.zero.stage,
            global_batch_size=setup.sizes.global_batch_size,
            base=self._fingerprint,
            data=setup.data_digest,
            before=self._before,
            recent_losses=list(self._trainer.loss_watch.recent),
            rollbacks=self._rollbacks,
            started_in=str(Path.cwd()),
            schema_version=SCHEMA,
        )
