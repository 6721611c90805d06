"""How the loop runs, and the rows of its steps."""

import math
from dataclasses import dataclass

from taso_ds.errors import UserError
from taso_ds.flags.flag import LENGTH, SCHEDULE, arg, is_positive, require, require_one_of

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")


@dataclass(frozen=True)
class TrainArguments:
    """The training loop: optimizer, batches, length, evaluation, checkpoints."""

    learning_rate: float = arg(2e-4, "Peak learning rate before compensation.", first=True)
    per_device_train_batch_size: int = arg(
        4, "Micro-batch: rows per rank and forward.", effect=SCHEDULE, unit="rows", first=True
    )
    gradient_accumulation_steps: int | None = arg(
        None, "Micro-batches per step; default: from global_batch_size.", effect=SCHEDULE, unit="forwards"
    )
    global_batch_size: int | None = arg(
        None, "Rows per step over all ranks; default: micro-batch × ranks.", unit="rows"
    )
    num_train_epochs: float = arg(
        3.0, "Passes over the training rows, unless max_steps is set.", effect=LENGTH, unit="epochs", first=True
    )
    max_steps: int = arg(-1, "Steps to train; overrides num_train_epochs.", effect=LENGTH, unit="steps")
    lr_scheduler_type: str = arg("linear", f"One of {', '.join(SCHEDULES)}.")
    warmup_ratio: float = arg(0.03, "Share of the steps with a rising learning rate.", unit="share")
    weight_decay: float = arg(0.0, "AdamW weight decay.")
    adam_beta1: float = arg(0.9, "AdamW beta1.")
    adam_beta2: float = arg(0.999, "AdamW beta2.")
    adam_epsilon: float = arg(1e-8, "AdamW epsilon.")
    max_grad_norm: float = arg(1.0, "Clip the global gradient norm; 0 for no clipping.")
    gradient_checkpointing: bool = arg(
        False, "Recompute activations in backward to save memory.", effect=SCHEDULE, planned=True
    )
    logging_steps: int = arg(1, "Steps between two lines of metrics.jsonl.", effect=SCHEDULE, unit="steps")
    eval_steps: int | None = arg(
        None, "Steps between evaluations; default: before and after training only.", effect=SCHEDULE, unit="steps"
    )
    save_steps: int | None = arg(
        None, "Steps between checkpoints; default: by save_minutes only.", effect=SCHEDULE, unit="steps"
    )
    save_minutes: float | None = arg(
        15.0, "Minutes between checkpoints; one is always written at the end.", effect=SCHEDULE, unit="minutes"
    )
    save_total_limit: int = arg(2, "Checkpoints to keep.", effect=SCHEDULE, unit="checkpoints")
    max_loss_jump: float = arg(
        5.0, "A loss this far above the median of the last 16 is divergence; 0 for never.", effect=SCHEDULE
    )
    on_divergence: str = arg(
        "stop", "stop, or rollback to the last checkpoint and go on at half the learning rate.", effect=SCHEDULE
    )
    max_rollbacks: int = arg(3, "Rollbacks before the run stops.", effect=SCHEDULE, unit="rollbacks")
    per_device_eval_batch_size: int = arg(8, "Rows per rank and forward in evaluation.", effect=SCHEDULE, unit="rows")
    max_new_tokens: int = arg(256, "Tokens generated per answer in generation tasks.", unit="tokens")

    def __post_init__(self) -> None:
        require_one_of("lr_scheduler_type", self.lr_scheduler_type, SCHEDULES)
        for name in ("learning_rate", "num_train_epochs", "adam_epsilon"):
            require(is_positive(getattr(self, name)), name, getattr(self, name), "positive and finite")
        require(0.0 <= self.warmup_ratio <= 1.0, "warmup_ratio", self.warmup_ratio, "in [0, 1]")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "logging_steps", "max_new_tokens"):
            require(getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        require_one_of("on_divergence", self.on_divergence, ("stop", "rollback"))
        minutes = self.save_minutes
        require(minutes is None or is_positive(minutes), "save_minutes", minutes, "positive and finite")
        require(self.save_total_limit > 0, "save_total_limit", self.save_total_limit, "a positive number")
        require(self.max_rollbacks >= 0, "max_rollbacks", self.max_rollbacks, "0 or more")
        for name in ("gradient_accumulation_steps", "global_batch_size", "eval_steps", "save_steps"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "a positive number")
        for name in ("weight_decay", "max_grad_norm", "max_loss_jump"):
            require(0.0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 or more and finite")
        for name in ("adam_beta1", "adam_beta2"):
            require(0.0 <= getattr(self, name) < 1.0, name, getattr(self, name), "in [0, 1)")
        require(self.max_steps == -1 or self.max_steps > 0, "max_steps", self.max_steps, "positive, or -1")


@dataclass(frozen=True)
class BatchSizes:
    """Rows per forward, forwards per step and their product over the ranks."""

    micro_batch_size: int
    grad_accum_steps: int
    world_size: int

    @property
    def global_batch_size(self) -> int:
        return self.micro_batch_size * self.grad_accum_steps * self.world_size

    def in_words(self) -> str:
        return (
            f"{self.micro_batch_size} rows per rank × {self.grad_accum_steps} micro-batches × {self.world_size} ranks"
            f" = {self.global_batch_size} rows per step"
        )


def batch_sizes(training: TrainArguments, world_size: int) -> BatchSizes:
    """Compute the one free batch number.

    Raises:
        UserError: when the numbers do not multiply.
    """
    micro, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    per_forward = micro * world_size
    if training.global_batch_size is None:
        return BatchSizes(micro, accumulation or 1, world_size)
    if training.global_batch_size % per_forward:
        raise UserError(
            f"global_batch_size: {training.global_batch_size} is not a multiple of per_device_train_batch_size {micro}"
            f" × {world_size} ranks = {per_forward}"
        )
    derived = training.global_batch_size // per_forward
    if accumulation is not None and accumulation != derived:
        raise UserError(
            f"global_batch_size: {training.global_batch_size} ≠ {micro} rows × {accumulation} micro-batches ×"
            f" {world_size} ranks = {per_forward * accumulation}; --gradient_accumulation_steps must be {derived}"
        )
    return BatchSizes(micro, derived, world_size)
