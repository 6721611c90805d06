"""The loop: micro-batches through the engine, one optimizer step, the hooks. It knows no method and no task."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn

from taso_ds.console.bar import Bar
from taso_ds.distributed import comm
from taso_ds.distributed import engine as engines
from taso_ds.errors import Interrupted, UserError
from taso_ds.interrupts import Interrupts
from taso_ds.objectives.loss import LossSum
from taso_ds.reports.observer import Observer, StepMetrics
from taso_ds.training.agreement import Place, agree, digest
from taso_ds.training.divergence import Diverged, LossWatch
from taso_ds.training.feed import Feed, Step
from taso_ds.training.optim import Group, Schedule

_STOP, _SAVE = 1, 2  # what a rank may wish for at a step's start


@dataclass(eq=False)
class Trainer:
    """Trains for ``schedule.total_steps`` steps.

    The loss of a step is the mean over the supervised units of its global batch, whatever the split over micro-batches
    and ranks: each micro-batch contributes its sum divided by the units of the whole batch. A step is a function of its
    number and of the trained state: rows, learning rate and random numbers are drawn from the number, so nothing else
    has to be saved for a run to go on exactly.

    Attributes:
        engine: a DeepSpeed engine.
        feed: the rows.
        loss_sum: loss summed over supervised units, and their number.
        groups: the parameter groups, in the optimizer's order.
        digest: of what is trained, the same on all ranks.
        loss_watch: tells when the loss diverges.
        brake: factor on every learning rate; below 1 after a rollback.
        save_steps: steps between checkpoints; None for none by number.
        save_minutes: time between checkpoints on rank 0's clock; None for none by time.
        evaluate: returns the scores of the model, on every rank; called every ``eval_steps`` steps but the last.
        observer: told of logged steps and evaluations; on every rank, of which it may be deaf on all but rank 0.
    """

    engine: engines.Engine
    feed: Feed
    loss_sum: LossSum
    groups: Sequence[Group]
    schedule: Schedule
    logging_steps: int
    eval_steps: int | None
    evaluate: Callable[[], Mapping[str, float]] = dict
    observer: Observer = field(default_factory=Observer)
    save_steps: int | None = None
    save_minutes: float | None = None
    digest: int = 0
    loss_watch: LossWatch = field(default_factory=lambda: LossWatch(0.0))
    brake: float = 1.0
    _saved_at: float = field(default_factory=time.monotonic, init=False)

    def fit(
        self,
        *,
        first: int = 0,
        save: Callable[[int], None] = lambda step: None,
        interrupts: Interrupts | None = None,
    ) -> None:
        """Run all steps from ``first`` on; a checkpoint is due at the end too.

        Args:
            save: called on every rank with the number of steps done, when a checkpoint is due.

        Raises:
            Diverged: when loss or gradient is not finite, or the loss has jumped.
            UserError: when the first step moved nothing, or the ranks do not agree.
            Interrupted: on every rank, when a signal asked any of them to stop; a checkpoint is saved.
        """
        total = self.schedule.total_steps
        with Bar(total=total, initial=first, desc="training", unit="step") as bar:
            for step in range(first, total):
                self._meet(step, None if step == first else save, interrupts)
                started = time.perf_counter()
                metrics = self.step(step)
                metrics["tokens_per_second"] = metrics["tokens"] / (time.perf_counter() - started)
                bar.update()
                bar.set_postfix(loss=f"{metrics['loss']:.4f}", tok_s=f"{metrics['tokens_per_second']:.0f}")
                if metrics["step"] % self.logging_steps == 0 or metrics["step"] == total:
                    self.observer.on_step(metrics)
                if self.eval_steps and metrics["step"] % self.eval_steps == 0 and metrics["step"] < total:
                    self.observer.on_eval(metrics["step"], self.evaluate())
        self._meet(total, None if first == total else save, interrupts)

    def _meet(self, step: int, save: Callable[[int], None] | None, interrupts: Interrupts | None) -> None:
        """Compare with the other ranks before a step, and after the last; save and stop if any of them wishes so.

        Args:
            save: None where the state of this step is saved already.
        """
        late = self.save_minutes is not None and time.monotonic() - self._saved_at > 60.0 * self.save_minutes
        arrived = interrupts.arrived if interrupts else None
        data = self.feed.step(step)
        place = Place(step, len(data.micro_batches), digest([str(data.rows).encode()]), self.digest)
        wishes = agree(place, wishes=(_STOP if arrived else 0) | (_SAVE if late and comm.is_main() else 0))
        is_last = step == self.schedule.total_steps
        due = wishes or is_last or (self.save_steps and step % self.save_steps == 0)
        if due and save is not None:
            save(step)
            self._saved_at = time.monotonic()
        if wishes & _STOP:
            names = sorted({name for name in comm.gather_objects(arrived) if name})
            raise Interrupted(f"stopped by {', '.join(names)} after step {step}; the same command goes on from there")

    def step(self, step: int) -> StepMetrics:
        """Run one optimizer step (0-based) and return its metrics.

        Raises:
            Diverged: when loss or gradient is not finite, or the loss has jumped.
            UserError: when the first step moved nothing.
        """
        torch.manual_seed(digest([f"{self.feed.plan.seed}/{step}/{comm.rank()}".encode()]))
        share = self.schedule(step) * self.brake
        for live, group in zip(engines.optimizer_groups(self.engine), self.groups, strict=True):
            live["lr"] = group.peak * share
        data = self.feed.step(step)
        loss = self._accumulate(step, data)
        norm = engines.step(self.engine)
        if norm == 0.0 and step == 0:
            raise UserError("training: no gradient reached the trained parameters in the first step")
        if not math.isfinite(norm):
            raise Diverged(
                f"training: the gradient norm of step {step + 1} is {norm}; lower --learning_rate",
                good_steps=step,
                applied=True,
            )
        return {
            "step": step + 1,
            "epoch": (step + 1) / self.feed.plan.steps_per_epoch,
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": {group.name: group.peak * share for group in self.groups},
            "tokens": data.tokens,
        }

    def discard_gradients(self) -> None:
        """Bring the engine to the start of a step after one that was given up; the trained state is lost."""
        engines.step(self.engine)

    def _accumulate(self, step: int, data: Step) -> float:
        """Run the micro-batches of one step and return the loss of the global batch."""
        # DeepSpeed averages gradients over ranks; ours are shares of one sum, so that average is undone here.
        scale = comm.world_size() / data.units
        model = cast(nn.Module, self.engine)
        losses = []
        for number, rows in enumerate(data.micro_batches):
            loss, _ = self.loss_sum(model, self.feed.batch(rows))
            losses.append(loss.detach().double())
            self.engine.backward(loss * scale, scale_wrt_gas=False)
            del loss  # what its graph still holds must not meet the next forward
            if number + 1 < len(data.micro_batches):
                self.engine.step()  # counts the micro-batch; only the last one of a step updates
        total = torch.stack(losses).sum()
        comm.sum_everywhere(total)
        value = float(total) / data.units
        problem = self.loss_watch.problem(value)
        if problem is not None:
            self._stop(step, data, [float(loss) for loss in losses], problem)
        return value

    def _stop(self, step: int, data: Step, losses: list[float], problem: str) -> None:
        suspects = [
            rows for rows, loss in zip(data.micro_batches, losses, strict=True) if not math.isfinite(loss) and rows
        ]
        of_ranks = comm.gather_objects(suspects)
        ranks = [rank for rank, batches in enumerate(of_ranks) if batches]
        where = f" (rank {', '.join(map(str, ranks))})" if ranks and comm.world_size() > 1 else ""
        rows = [row for batches in of_ranks for batch in batches for row in batch]
        raise Diverged(
            f"training: the loss of step {step + 1} {problem} on training rows {rows or data.rows}{where};"
            f" the parameters after step {step} are the last good ones",
            good_steps=step,
            applied=False,
        )
