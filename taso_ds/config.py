"""What a run is told: argument groups from ``--config run.yaml`` with flags on top, checked before anything loads.

Names are Hugging Face's where one exists. Every group is a frozen dataclass; a value that cannot work raises a
``UserError`` that names the field, the value and what would be valid. Derived values are computed, not configured.
"""

import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taso_ds.adapters.compensation import parse_rho
from taso_ds.adapters.importance import REDUCTIONS, SCORES
from taso_ds.adapters.structure import STRUCTURES
from taso_ds.errors import UserError, nearest
from taso_ds.flags import LENGTH, SCHEDULE, START, arg, flags_of, given_names, parse_groups, require

METHODS = ("taso", "lora", "full")
IMPORTANCE_WEIGHTS = ("loaded", "original")
HEADS = ("auto", "lm", "classification")
EVAL_METRICS = ("none", "exact_match", "rouge")
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")


def _is_positive(value: float) -> bool:
    return 0.0 < value < math.inf


def _one_of(name: str, value: str, valid: Sequence[str]) -> None:
    if value not in valid:
        raise UserError(f"{name}: {value!r} is not one of {', '.join(valid)}{nearest(str(value), list(valid))}")


@dataclass(frozen=True)
class ModelArguments:
    """The base model."""

    model_name_or_path: str | None = arg(
        None, "Folder or Hub id of the base; default: the embedded SmolLM2-135M.", path=True
    )
    model_revision: str = arg("main", "Hub revision of the base.")
    gguf_file: str | None = arg(None, "GGUF file inside model_name_or_path; dequantized once into the cache.")
    tokenizer_name: str | None = arg(None, "Folder or Hub id of the tokenizer; default: the base's.", path=True)
    head: str = arg("auto", "lm, classification, or auto: a classification head if the base has no LM head.")
    attn_implementation: str | None = arg(
        None, "Attention kernel as transformers names it (sdpa, flash_attention_2).", effect=SCHEDULE
    )
    trust_remote_code: bool = arg(False, "Run model code that comes with the checkpoint.")
    load_in_4bit: bool = arg(False, "Quantize the base as it loads: NF4, statistics quantized too (bitsandbytes).")
    load_in_8bit: bool = arg(False, "Quantize the base as it loads: LLM.int8() (bitsandbytes).")
    bf16: bool = arg(True, "Train and score in bfloat16; --no_bf16 for fp32.")
    fp16: bool = arg(False, "Not supported; named here to say so.")

    def __post_init__(self) -> None:
        _one_of("head", self.head, HEADS)
        if self.load_in_4bit and self.load_in_8bit:
            raise UserError("load_in_4bit and load_in_8bit are both on: pass one of them")
        if self.fp16 and self.bf16:
            raise UserError("fp16 and bf16 are both on: pass --bf16 alone, or --no_bf16 for fp32")
        if self.fp16:
            raise UserError("fp16 is not supported (its loss scaling skips steps): use --bf16, or --no_bf16 for fp32")


@dataclass(frozen=True)
class DataArguments:
    """The task and its rows."""

    task: str | None = arg(None, "Task name; default: sst2 from the embedded data.")
    data_dir: str | None = arg(
        None, "Folder with <task>/<split>.jsonl(.gz); default: the Hub.", path=True, words=("embedded",)
    )
    train_file: str | None = arg(None, "JSONL file to train on, instead of data_dir's.", path=True)
    eval_file: str | None = arg(None, "JSONL file to evaluate on, instead of data_dir's.", path=True)
    eval_fraction: float | None = arg(None, "Evaluate on this share of the training rows, held out by the seed.")
    eval_metric: str = arg("none", "Of --task completion, beside the loss: exact_match or rouge of generated answers.")
    max_train_samples: int | None = arg(None, "Use only the first N training rows.")
    max_eval_samples: int | None = arg(None, "Use only the first N evaluation rows.")
    max_seq_length: int = arg(512, "Tokens of a row; longer prompts are cut from the left.")
    use_chat_template: bool = arg(False, "Wrap prompts in the tokenizer's chat template.")

    def __post_init__(self) -> None:
        require(self.max_seq_length >= 2, "max_seq_length", self.max_seq_length, "at least 2")
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "a positive number of rows")
        _one_of("eval_metric", self.eval_metric, EVAL_METRICS)
        if self.eval_metric != "none" and self.task not in (None, "completion"):
            raise UserError(
                f"eval_metric: {self.eval_metric} is for --task completion; {self.task} has its own metrics: drop it"
            )
        share = self.eval_fraction
        require(share is None or 0.0 < share < 1.0, "eval_fraction", share, "between 0 and 1")
        if share is not None and self.eval_file is not None:
            raise UserError(
                f"eval_fraction: --eval_file {self.eval_file} names the rows to evaluate on; drop one of both"
            )


@dataclass(frozen=True)
class CalibrationArguments:
    """Importance scoring and the core region (method sections 1 and 2)."""

    calibration_samples: int = arg(128, "Training rows that are scored.")
    calibration_batch_size: int | None = arg(None, "Rows per scoring micro-batch; default: the training micro-batch.")
    calibration_reduction: str = arg("signed_mean", "signed_mean over all tokens, or per_batch_abs.")
    importance: str = arg("importance", "Score: importance |W·g|, magnitude |W|, gradient |g|, or random.")
    element_fraction: float = arg(0.05, "Share of a matrix's elements that are core (the paper's k).")
    core_fraction: float = arg(0.10, "Share of rows and of columns in the core region (the paper's p).")
    calibration_passes: int = arg(
        1, "Score in this many groups of matrices: less memory, more passes over the rows.", effect=SCHEDULE
    )
    calibration_offload: str = arg("none", "cpu: gradient sums in host memory; none: on the device.", effect=SCHEDULE)
    importance_weights: str = arg("loaded", "W of the score: loaded (dequantized) or, if quantized here, original.")
    core_regions: str | None = arg(None, "Reuse this core_regions.safetensors instead of scoring.", path=True)

    def __post_init__(self) -> None:
        _one_of("calibration_reduction", self.calibration_reduction, REDUCTIONS)
        _one_of("importance", self.importance, SCORES)
        _one_of("calibration_offload", self.calibration_offload, ("none", "cpu"))
        require(self.calibration_passes > 0, "calibration_passes", self.calibration_passes, "a positive number")
        _one_of("importance_weights", self.importance_weights, IMPORTANCE_WEIGHTS)
        for name in ("element_fraction", "core_fraction"):
            value = getattr(self, name)
            require(0.0 < value <= 1.0, name, value, "in (0, 1]")
        require(self.calibration_samples > 0, "calibration_samples", self.calibration_samples, "a positive number")
        size = self.calibration_batch_size
        require(size is None or size > 0, "calibration_batch_size", size, "a positive number of rows")


@dataclass(frozen=True)
class AdapterArguments:
    """What is trained (method sections 3 and 4)."""

    method: str = arg("taso", "taso, or the baselines lora (the peft library) and full.")
    structure: str = arg("union", "union: whole core rows plus whole core columns; intersection: their block only.")
    rank: int = arg(1, "Rank of each branch (of the LoRA with --method lora).")
    alpha: float | None = arg(None, "Scaling is alpha / rank; default: alpha = rank.")
    rho: str = arg("mask", "Pruned share for the learning rate: mask (1 - p), parameters, a number, or off.")
    target_modules: list[str] | None = arg(None, "Names of the linears to adapt; default: all inside the blocks.")
    adapt_experts: bool = arg(False, "Take in the experts that a mixture of experts keeps in fused parameters.")

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        _one_of("structure", self.structure, list(STRUCTURES))
        require(self.rank > 0, "rank", self.rank, "a positive number")
        require(self.alpha is None or _is_positive(self.alpha), "alpha", self.alpha, "positive and finite")
        parse_rho(self.rho)
        if self.adapt_experts and self.method != "taso":
            raise UserError(f"adapt_experts: --method {self.method} does not adapt single experts; drop the flag")

    @property
    def scaling(self) -> float:
        """``s = alpha / rank``."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True)
class TrainArguments:
    """The loop."""

    learning_rate: float = arg(2e-4, "Peak learning rate before compensation.")
    per_device_train_batch_size: int = arg(4, "Micro-batch: rows per rank and forward.", effect=SCHEDULE)
    gradient_accumulation_steps: int | None = arg(
        None, "Micro-batches per step; default: from global_batch_size.", effect=SCHEDULE
    )
    global_batch_size: int | None = arg(None, "Rows per step over all ranks; default: micro-batch × ranks.")
    num_train_epochs: float = arg(3.0, "Passes over the training rows, unless max_steps is set.", effect=LENGTH)
    max_steps: int = arg(-1, "Steps to train; overrides num_train_epochs.", effect=LENGTH)
    lr_scheduler_type: str = arg("linear", f"One of {', '.join(SCHEDULES)}.")
    warmup_ratio: float = arg(0.03, "Share of the steps with a rising learning rate.")
    weight_decay: float = arg(0.0, "AdamW weight decay.")
    adam_beta1: float = arg(0.9, "AdamW beta1.")
    adam_beta2: float = arg(0.999, "AdamW beta2.")
    adam_epsilon: float = arg(1e-8, "AdamW epsilon.")
    max_grad_norm: float = arg(1.0, "Clip the global gradient norm; 0 for no clipping.")
    gradient_checkpointing: bool = arg(False, "Recompute activations in backward to save memory.", effect=SCHEDULE)
    logging_steps: int = arg(1, "Steps between two lines of metrics.jsonl.", effect=SCHEDULE)
    eval_steps: int | None = arg(
        None, "Steps between evaluations; default: before and after training only.", effect=SCHEDULE
    )
    save_steps: int | None = arg(None, "Steps between checkpoints; default: by save_minutes only.", effect=SCHEDULE)
    save_minutes: float | None = arg(
        15.0, "Minutes between checkpoints; one is always written at the end.", effect=SCHEDULE
    )
    save_total_limit: int = arg(2, "Checkpoints to keep.", effect=SCHEDULE)
    max_loss_jump: float = arg(
        5.0, "A loss this far above the median of the last 16 is divergence; 0 for never.", effect=SCHEDULE
    )
    on_divergence: str = arg(
        "stop", "stop, or rollback to the last checkpoint and go on at half the learning rate.", effect=SCHEDULE
    )
    max_rollbacks: int = arg(3, "Rollbacks before the run stops.", effect=SCHEDULE)
    per_device_eval_batch_size: int = arg(8, "Rows per rank and forward in evaluation.", effect=SCHEDULE)
    max_new_tokens: int = arg(256, "Tokens generated per answer in generation tasks.")

    def __post_init__(self) -> None:
        _one_of("lr_scheduler_type", self.lr_scheduler_type, SCHEDULES)
        for name in ("learning_rate", "num_train_epochs", "adam_epsilon"):
            require(_is_positive(getattr(self, name)), name, getattr(self, name), "positive and finite")
        require(0.0 <= self.warmup_ratio <= 1.0, "warmup_ratio", self.warmup_ratio, "in [0, 1]")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "logging_steps", "max_new_tokens"):
            require(getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        _one_of("on_divergence", self.on_divergence, ("stop", "rollback"))
        minutes = self.save_minutes
        require(minutes is None or _is_positive(minutes), "save_minutes", minutes, "positive and finite")
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
class RunArguments:
    """The run itself."""

    ds_config: str = arg(
        "zero3.json", "DeepSpeed JSON: a path, or the name of a shipped one.", effect=SCHEDULE, path=True
    )
    nvme_path: str | None = arg(
        None, "Folder on each node's local NVMe disk, for zero3_nvme.json.", effect=START, path=True
    )
    output_dir: str | None = arg(None, "Run folder; default: runs/<method>-<task>, numbered.", effect=START, path=True)
    overwrite_output_dir: bool = arg(False, "Replace a different run in output_dir.", effect=START)
    resume: str = arg(
        "auto",
        "auto: go on with an interrupted run in output_dir; none: anew; or a checkpoint folder.",
        effect=START,
        path=True,
        words=("auto", "none"),
    )
    seed: int = arg(0, "Seed of data order, initial adapters and new heads.")
    expected_world_size: int | None = arg(
        None, "Number of ranks; with fewer or more the run does not start.", effect=START
    )
    verify_export: bool = arg(True, "Re-open the exported adapter in a fresh process and compare logits.", effect=START)
    dry_run: bool = arg(False, "Print what would be done, without loading weights, and exit.", effect=START)
    force: bool = arg(False, "Start even where the plan says that host memory is too small.", effect=START)
    debug: bool = arg(False, "Print tracebacks of errors, and warnings of libraries.", effect=START)
    config: str | None = arg(None, "YAML file of these arguments; flags override it.", effect=START, path=True)
    local_rank: int = arg(-1, "Set by the deepspeed launcher; LOCAL_RANK is what counts.", effect=START)

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**32, "seed", self.seed, "in [0, 2**32)")
        ranks = self.expected_world_size
        require(ranks is None or ranks > 0, "expected_world_size", ranks, "a positive number")


GROUPS: tuple[Any, ...] = (
    ModelArguments,
    DataArguments,
    CalibrationArguments,
    AdapterArguments,
    TrainArguments,
    RunArguments,
)


# How core regions are scored: with --core_regions it is the file that says so, not these.
SCORING = (
    "calibration_samples",
    "calibration_batch_size",
    "calibration_reduction",
    "calibration_passes",
    "calibration_offload",
    "importance",
    "importance_weights",
)


@dataclass(frozen=True)
class RunConfig:
    """All argument groups of one run, and the names of the arguments that the user gave, be they the defaults."""

    model: ModelArguments
    data: DataArguments
    calibration: CalibrationArguments
    adapter: AdapterArguments
    training: TrainArguments
    run: RunArguments
    given: frozenset[str] = dataclasses.field(default=frozenset(), compare=False, kw_only=True)

    def __post_init__(self) -> None:
        quantizes = self.model.load_in_4bit or self.model.load_in_8bit
        if self.calibration.importance_weights == "original" and not quantizes:
            raise UserError("importance_weights: original is for --load_in_4bit and --load_in_8bit; drop it")

    def flags(self) -> dict[str, Any]:
        """Return every argument under its flag's name, without those that say how the run was started or do nothing."""
        groups = (self.model, self.data, self.calibration, self.adapter, self.training, self.run)
        merged = {key: value for group in groups for key, value in dataclasses.asdict(group).items()}
        meanings, idle = flags_of(groups), SCORING if self.calibration.core_regions is not None else ()
        return {key: value for key, value in merged.items() if meanings[key].effect != START and key not in idle}


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


def parse_run_config(argv: Sequence[str] | None = None, *, description: str = "") -> RunConfig:
    """Parse flags over ``--config FILE`` over defaults.

    Raises:
        UserError: unknown flag or key, or a value that cannot work.
    """
    groups = parse_groups(GROUPS, argv, description=description)
    return RunConfig(*groups, given=given_names(sys.argv[1:] if argv is None else argv))


def cache_dir() -> Path:
    """Return the folder for converted checkpoints: ``TASO_CACHE``, or ``~/.cache/taso_ds``."""
    return Path(os.environ.get("TASO_CACHE", Path.home() / ".cache" / "taso_ds"))
