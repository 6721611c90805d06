"""Training between the first and the last step: save, go on from a checkpoint, go back to one where asked for."""

import dataclasses
import logging

from taso_ds.distributed import comm
from taso_ds.interrupts import Interrupts
from taso_ds.training.arguments import TrainArguments
from taso_ds.training.divergence import Diverged, LossWatch
from taso_ds.training.progress import Progress, Saved
from taso_ds.training.saver import Saver
from taso_ds.training.trainer import Trainer

log = logging.getLogger(__name__)

ROLLBACK_FACTOR = 0.5


class RecoverableTraining:
    """A trainer and its checkpoints, which know of each other through this alone.

    Args:
        origin: what a checkpoint says before the first step; later ones differ in how far the run is.
        training: whether to go back when training diverges, and how often.
    """

    def __init__(self, trainer: Trainer, saver: Saver, *, origin: Progress, training: TrainArguments) -> None:
        self._trainer, self._saver = trainer, saver
        self._origin, self._training = origin, training
        self._rollbacks = 0

    def train(self, interrupts: Interrupts, *, saved: Saved | None = None) -> None:
        """Train from a checkpoint, or from the start, to the last step.

        Raises:
            Diverged: and no rollback was asked for, or left.
        """
        self._trainer.engine.train()
        with interrupts.deferred():
            if saved is not None:
                self._restore(saved, rollbacks=saved.progress.rollbacks)
            elif self._training.on_divergence == "rollback":
                self._save(0)
            first = 0 if saved is None else saved.progress.step
            while True:
                try:
                    self._trainer.fit(first=first, save=self._save, interrupts=interrupts)
                    return
                except Diverged as error:
                    if self._training.on_divergence == "stop" or self._rollbacks == self._training.max_rollbacks:
                        raise
                    first = self._roll_back(error)

    def _roll_back(self, error: Diverged) -> int:
        """Go back to the last checkpoint at a lower learning rate; returns its step."""
        if not error.applied:
            self._trainer.discard_gradients()
        saved = comm.on_main(self._saver.last)
        self._restore(saved, rollbacks=self._rollbacks + 1)
        step, factor, observer = saved.progress.step, self._trainer.brake, self._trainer.observer
        comm.on_main(lambda: observer.on_rollback(step, number=self._rollbacks, factor=factor))
        log.warning("%s", error)
        log.warning("rollback %d: back to step %d, learning rates × %g", self._rollbacks, step, factor)
        return step

    def _restore(self, saved: Saved, *, rollbacks: int) -> None:
        self._saver.restore(saved)
        self._rollbacks = rollbacks
        self._trainer.brake = ROLLBACK_FACTOR**rollbacks
        self._trainer.loss_watch = LossWatch(self._training.max_loss_jump, saved.progress.recent_losses)

    def _save(self, step: int) -> None:
        """Write the checkpoint of ``step``. A collective."""
        self._saver.save(
            dataclasses.replace(
                self._origin,
                step=step,
                recent_losses=list(self._trainer.loss_watch.recent),
                rollbacks=self._rollbacks,
            )
        )
        self._trainer.observer.on_save(step)
