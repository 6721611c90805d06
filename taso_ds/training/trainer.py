"""The loop: micro-batches through the engine, one optimizer step, the hooks. It knows no method and no task."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from taso_ds.distributed import comm
from taso_ds.distributed import engine as engines
from taso_ds.errors import UserError
from taso_ds.training.feed import Feed, Step
from taso_ds.training.loss import LossSum
from taso_ds.training.optim import Group, Schedule


class Diverged(UserError):
    """The loss is not finite. Raised on every rank before the step is applied: the parameters are still good."""

    def __init__(self, message: str, *, good_steps: int) -> None:
        super().__init__(message)
        self.good_steps = good_steps


class Trainer:
    """Trains for ``schedule.total_steps`` steps.

    The loss of a step is the mean over the supervised units of its global batch, whatever the split over micro-batches
    and ranks: each micro-batch contributes its sum divided by the units of the whole batch.

    Args:
        engine: a DeepSpeed engine.
        feed: the rows.
        loss_sum: loss summed over supervised units, and their number.
        groups: the parameter groups, in the optimizer's order.
        on_log: called on every rank with each logged step's metrics.
        on_eval: called every ``eval_steps`` steps with the number of steps done.
    """

    def __init__(
        self,
        engine: Any,
        feed: Feed,
        *,
        loss_sum: LossSum,
        groups: Sequence[Group],
        schedule: Schedule,
        logging_steps: int,
        eval_steps: int | None,
        on_log: Callable[[dict[str, Any]], None],
        on_eval: Callable[[int], None],
    ) -> None:
        self.engine = engine
        self.feed = feed
        self.loss_sum = loss_sum
        self.groups = groups
        self.schedule = schedule
        self.logging_steps = logging_steps
        self.eval_steps = eval_steps
        self.on_log = on_log
        self.on_eval = on_eval

    def fit(self) -> None:
        """Run all steps.

        Raises:
            Diverged: when the loss is not finite.
            UserError: when the first step moved nothing, or a gradient is not finite.
        """
        total = self.schedule.total_steps
        with tqdm(total=total, desc="training", unit="step", disable=not comm.is_main()) as bar:
            for step in range(total):
                started = time.perf_counter()
                metrics = self.step(step)
                metrics["tokens_per_second"] = metrics["tokens"] / (time.perf_counter() - started)
                bar.update()
                bar.set_postfix(loss=f"{metrics['loss']:.4f}", tok_s=f"{metrics['tokens_per_second']:.0f}")
                if metrics["step"] % self.logging_steps == 0 or metrics["step"] == total:
                    self.on_log(metrics)
                if self.eval_steps and metrics["step"] % self.eval_steps == 0 and metrics["step"] < total:
                    self.on_eval(metrics["step"])

    def step(self, step: int) -> dict[str, Any]:
        """Run one optimizer step (0-based) and return its metrics."""
        share = self.schedule(step)
        for live, group in zip(engines.optimizer_groups(self.engine), self.groups, strict=True):
            live["lr"] = group.peak * share
        data = self.feed.step(step)
        loss = self._accumulate(step, data)
        norm = engines.step(self.engine)
        if norm == 0.0 and step == 0:
            raise UserError("training: no gradient reached the trained parameters in the first step")
        if not math.isfinite(norm):
            raise UserError(f"training: the gradient norm of step {step + 1} is {norm}; lower --learning_rate")
        return {
            "step": step + 1,
            "epoch": (step + 1) / self.feed.plan.steps_per_epoch,
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": {group.name: group.peak * share for group in self.groups},
            "tokens": data.tokens,
        }

    def _accumulate(self, step: int, data: Step) -> float:
        """Run the micro-batches of one step and return the loss of the global batch."""
        # DeepSpeed averages gradients over ranks; ours are shares of one sum, so that average is undone here.
        scale = comm.world_size() / data.units
        losses = []
        for number, rows in enumerate(data.micro_batches):
            loss, _ = self.loss_sum(self.engine, self.feed.batch(rows))
            losses.append(loss.detach().double())
            self.engine.backward(loss * scale, scale_wrt_gas=False)
            del loss  # what its graph still holds must not meet the next forward
            if number + 1 < len(data.micro_batches):
                self.engine.step()  # counts the micro-batch; only the last one of a step updates
        total = torch.stack(losses).sum()
        comm.sum_everywhere(total)
        value = float(total) / data.units
        if not math.isfinite(value):
            self._stop(step, data, [float(loss) for loss in losses], value)
        return value

    def _stop(self, step: int, data: Step, losses: list[float], value: float) -> None:
        suspects = [
            rows for rows, loss in zip(data.micro_batches, losses, strict=True) if not math.isfinite(loss) and rows
        ]
        rows = [row for found in comm.gather_objects(suspects) for batch in found for row in batch]
        raise Diverged(
            f"training: the loss of step {step + 1} is {value} on training rows {rows};"
            f" the parameters after step {step} are the last good ones",
            good_steps=step,
        )
