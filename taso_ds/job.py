"""A job: what a run is made of before any weight is loaded, or one line that says why it cannot run.

A dry run, a plan, the doctor and the run itself ask the same ``preflight``, so they refuse the same things. What a flag
may be by itself stands in its group, ``<room>/arguments.py``; what it may be beside others, or a base, stands here.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from taso_ds.adapters.experts import find_experts
from taso_ds.adapters.region_file import RegionFile
from taso_ds.adapters.targets import Targets
from taso_ds.adapters.towers import left_out_in_words
from taso_ds.config import RunConfig
from taso_ds.data.batch_plan import BatchPlan
from taso_ds.data.encode import EncodedRow, pad_token_id
from taso_ds.data.task_data import TaskData, check_held_out, load_task_data
from taso_ds.data.tasks import Task, get_task
from taso_ds.distributed import environment
from taso_ds.distributed.ds_config import read_ds_config, resolve_ds_config
from taso_ds.distributed.ds_config_check import check_ds_config
from taso_ds.distributed.zero_config import ZeroConfig
from taso_ds.errors import UserError
from taso_ds.methods.peft_names import check_read_back
from taso_ds.models.bfloat16 import check_bfloat16
from taso_ds.models.spec import BaseSpec, check_weight_files, read_spec
from taso_ds.objectives.objective import Objective, make_objective
from taso_ds.objectives.vocabulary import check_padding
from taso_ds.scoring.regions import read_regions
from taso_ds.training.arguments import BatchSizes, batch_sizes


@dataclass(frozen=True, eq=False)
class Job:
    """Everything that is known of a run before weights are loaded. What follows from it is worked out once.

    Attributes:
        zero: the resolved DeepSpeed configuration.
        targets: the matrices to adapt, of the model without weights.
        region_file: what ``--core_regions`` names; None where regions are to be scored, or none are needed.
        data: the task's examples; None where they were not read.
    """

    config: RunConfig
    zero: ZeroConfig
    sizes: BatchSizes
    base: BaseSpec
    targets: Targets
    region_file: RegionFile | None
    data: TaskData | None

    @property
    def examples(self) -> TaskData:
        """The task's examples, which were read."""
        assert self.data is not None, "this job was made without its rows"
        return self.data

    @cached_property
    def objective(self) -> Objective:
        """One object for scoring, training and evaluation."""
        return make_objective(
            self.examples,
            self.config.data,
            self.base.tokenizer,
            head=self.base.head,
            adapted=self.targets,
            batch_size=self.config.training.per_device_eval_batch_size,
            max_new_tokens=self.config.training.max_new_tokens,
        )

    @cached_property
    def rows(self) -> list[EncodedRow]:
        """The training rows as tokens.

        Raises:
            UserError: a row leaves nothing to learn.
        """
        return self.objective.encode(self.examples.train, self.examples.train_source)

    @property
    def plan(self) -> BatchPlan:
        """Which rows each step sees."""
        return BatchPlan(len(self.examples.train), self.sizes.global_batch_size, seed=self.config.run.seed)

    @cached_property
    def data_digest(self) -> str:
        """Digest of the training rows, as tokens."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(np.asarray(row.input_ids, dtype=np.int64).tobytes())
            digest.update(np.asarray(row.labels, dtype=np.int64).tobytes())
            digest.update(str(row.target).encode())
        return digest.hexdigest()

    def base_in_words(self) -> list[str]:
        """Return lines on what was decided about the base: its head, and what of it stays as it is."""
        lines = [self.base.head_in_words]
        if not self.config.method.trains_base:
            lines += [left_out_in_words(self.base.meta), find_experts(self.base.meta).left_in_words(self.targets)]
        return [line for line in lines if line is not None]


def preflight(
    config: RunConfig,
    ranks: int,
    *,
    ranks_per_node: int | None = None,
    source: str | None = None,
    read_rows: bool = True,
    trains: bool = True,
) -> Job:
    """Read what a run is made of, and refuse what cannot work, without weights, DeepSpeed or an accelerator.

    Args:
        ranks: how many there are, or are planned.
        ranks_per_node: default: those of this node.
        source: the folder that ``model_source`` returned; None where the base need not be here.
        read_rows: read the task's examples too. A plan needs none, and no task.
        trains: whether something will be trained and exported, not only opened.

    Raises:
        UserError: names what is wrong, and what to do.
    """
    check_flags(config, ranks)
    if trains:
        check_held_out(config.data)
    task = None if config.data.task is None else get_task(config.data.task)
    zero, sizes = resolve_deepspeed(config, ranks, ranks_per_node=ranks_per_node)
    data = load_task_data(config.data, seed=config.run.seed) if read_rows else None
    if data is not None:
        _check_accumulation(sizes, len(data.train))
    base = read_spec(config.model, source, num_labels=None if task is None else task.num_labels)
    check_weight_files(base.source)
    _check_length(config, base)
    if source is not None:
        check_padding(base)
        base.pad_with(pad_token_id(base.tokenizer))
    if task is not None:
        _check_labels(task, head=base.head)
    targets = base.targets(config.adapter.target_modules, experts=config.adapter.adapt_experts)
    _check_checkpointing(config, base)
    _check_quantization(config, base, zero)
    check_bfloat16(base)
    if trains and not config.method.trains_base and config.run.verify_export:
        check_read_back(base.meta, list(targets))
    if config.calibration.core_regions is not None and not config.method.needs_regions:
        raise UserError(f"core_regions: --method {config.adapter.method} has none; drop --core_regions")
    region_file = read_regions(config.calibration, targets.shapes, given=config.given)
    return Job(config, zero, sizes, base, targets, region_file, data)


def check_flags(config: RunConfig, ranks: int) -> None:
    """Refuse what the flags alone show to be wrong, before a download or a conversion takes its time.

    Raises:
        UserError: names the flag.
    """
    expected = config.run.expected_world_size
    if expected not in (None, ranks):
        raise UserError(
            f"expected_world_size: {expected} ranks were asked for and {ranks} came; compare the nodes and tasks"
            " of the allocation with those of the script, or the launcher's flags"
        )
    if config.data.task is not None:
        get_task(config.data.task)
    read_ds_config(config.run.ds_config)
    batch_sizes(config.training, ranks)


def resolve_deepspeed(
    config: RunConfig, ranks: int, *, ranks_per_node: int | None = None
) -> tuple[ZeroConfig, BatchSizes]:
    """Return the DeepSpeed configuration of a run, and the batch numbers.

    Args:
        ranks_per_node: default: those of this node.

    Raises:
        UserError: the JSON says what cannot work, or the batch numbers do not multiply.
    """
    sizes = batch_sizes(config.training, ranks)
    zero = resolve_ds_config(
        read_ds_config(config.run.ds_config),
        micro_batch_size=sizes.micro_batch_size,
        grad_accum_steps=sizes.grad_accum_steps,
        world_size=ranks,
        bf16=config.model.bf16,
        max_grad_norm=config.training.max_grad_norm,
        ranks_per_node=ranks_per_node or environment.local_world_size(),
        nvme_path=config.run.nvme_path,
        source=config.run.ds_config,
    )
    check_ds_config(zero, config.run.ds_config)
    return zero, sizes


def _check_accumulation(sizes: BatchSizes, num_rows: int) -> None:
    """Refuse more micro-batches per step than there are rows: most would be empty, for ever."""
    if sizes.grad_accum_steps > num_rows:
        raise UserError(
            f"gradient_accumulation_steps: {sizes.in_words()}, but there are {num_rows} training rows; lower"
            " --gradient_accumulation_steps or --global_batch_size"
        )


def _check_length(config: RunConfig, base: BaseSpec) -> None:
    """Refuse sequences the base has no positions for."""
    limit = base.num_positions
    if limit is not None and config.data.max_seq_length > limit:
        raise UserError(f"max_seq_length: {config.data.max_seq_length} exceeds the model's {limit} positions")


def _check_labels(task: Task, *, head: bool) -> None:
    """Refuse a classification head for a task without labels."""
    if head and not task.num_labels:
        raise UserError(
            f"task {task.name} has no labels for a classification head; use a causal language model (--head lm, if the"
            " base is one)"
        )


def _check_checkpointing(config: RunConfig, base: BaseSpec) -> None:
    """Refuse to recompute the blocks of a model that cannot do that."""
    if config.training.gradient_checkpointing and not base.can_recompute:
        raise UserError(
            f"gradient_checkpointing: {type(base.meta).__name__} has no blocks that transformers can recompute; drop"
            " the flag, and lower --per_device_train_batch_size or --max_seq_length if memory is short"
        )


def _check_quantization(config: RunConfig, base: BaseSpec, zero: ZeroConfig) -> None:
    """Refuse what a quantized base cannot do, and a base that cannot be quantized."""
    if base.quantization is None:
        return
    base.quantization.names(base.meta)
    if config.adapter.adapt_experts:
        raise UserError("adapt_experts: the base is quantized; drop the flag, or load the base in 16 bits")
    if config.method.trains_base:
        raise UserError("method: full trains all weights, which quantized ones do not allow; use taso or lora")
    name = zero.alters_bits
    if name is not None:
        raise UserError(f"{config.run.ds_config}: zero_optimization.{name} alters the bits of quantized weights")
