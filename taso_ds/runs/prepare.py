"""Everything a run decides before weights are loaded: defaults, data, tokens, batch numbers, the DeepSpeed dict."""

from collections.abc import Sequence

import torch
from torch import nn

from taso_ds.adapters.experts import find_experts
from taso_ds.adapters.targets import Targets
from taso_ds.adapters.towers import left_out_in_words
from taso_ds.config import RunConfig
from taso_ds.data.encode import EncodedRow
from taso_ds.data.tasks import Task, get_task
from taso_ds.distributed import environment
from taso_ds.distributed.ds_config import read_ds_config, resolve_ds_config
from taso_ds.distributed.ds_config_check import check_ds_config
from taso_ds.distributed.zero_config import ZeroConfig
from taso_ds.errors import UserError
from taso_ds.methods.peft_names import check_read_back
from taso_ds.models.bfloat16 import check_bfloat16
from taso_ds.models.spec import BaseSpec
from taso_ds.training.arguments import BatchSizes, batch_sizes


def check_flags(config: RunConfig, world_size: int) -> None:
    """Refuse ranks that are missing, an unknown task, an unreadable DeepSpeed JSON and batches that do not multiply."""
    check_world_size(config, world_size)
    assert config.data.task is not None
    get_task(config.data.task)
    read_ds_config(config.run.ds_config)
    batch_sizes(config.training, world_size)


def check_world_size(config: RunConfig, world_size: int) -> None:
    """Refuse another number of ranks than was asked for."""
    expected = config.run.expected_world_size
    if expected not in (None, world_size):
        raise UserError(
            f"expected_world_size: {expected} ranks were asked for and {world_size} came; compare the nodes and tasks"
            " of the allocation with those of the script, or the launcher's flags"
        )


def check_accumulation(sizes: BatchSizes, rows: Sequence[EncodedRow]) -> None:
    """Refuse more micro-batches per step than there are rows: most would be empty, for ever."""
    if sizes.grad_accum_steps > len(rows):
        raise UserError(
            f"gradient_accumulation_steps: {sizes.in_words()}, but there are {len(rows)} training rows; lower"
            " --gradient_accumulation_steps or --global_batch_size"
        )


def calibration_rows(config: RunConfig, rows: list[EncodedRow]) -> list[EncodedRow]:
    """Return the calibration set: rows of the training split, drawn by seed, in split order."""
    number = min(config.calibration.calibration_samples, len(rows))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.run.seed))
    return [rows[index] for index in sorted(order[:number].tolist())]


def check_length(config: RunConfig, base: BaseSpec) -> None:
    """Refuse sequences the base has no positions for."""
    limit = base.num_positions
    if limit is not None and config.data.max_seq_length > limit:
        raise UserError(f"max_seq_length: {config.data.max_seq_length} exceeds the model's {limit} positions")


def can_recompute(model: nn.Module) -> bool:
    """Say whether a transformers model has blocks that can be recomputed in backward."""
    supports = getattr(model, "supports_gradient_checkpointing", False)
    return supports and any(hasattr(module, "gradient_checkpointing") for module in model.modules())


def check_checkpointing(config: RunConfig, model: nn.Module) -> None:
    """Refuse to recompute the blocks of a model (without weights) that cannot do that."""
    if config.training.gradient_checkpointing and not can_recompute(model):
        raise UserError(
            f"gradient_checkpointing: {type(model).__name__} has no blocks that transformers can recompute; drop the"
            " flag, and lower --per_device_train_batch_size or --max_seq_length if memory is short"
        )


def check_quantization(config: RunConfig, base: BaseSpec, zero: ZeroConfig) -> None:
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


def check_base(config: RunConfig, base: BaseSpec, zero: ZeroConfig, targets: Targets, *, trains: bool = True) -> None:
    """Refuse what a base cannot do.

    Args:
        targets: the matrices to adapt.
        trains: whether there will be an adapter to export.
    """
    check_checkpointing(config, base.meta)
    check_quantization(config, base, zero)
    check_bfloat16(base)
    if trains and not config.method.trains_base and config.run.verify_export:
        check_read_back(base.meta, list(targets))


def check_labels(task: Task, *, head: bool) -> None:
    """Refuse a classification head for a task without labels."""
    if head and not task.num_labels:
        raise UserError(
            f"task {task.name} has no labels for a classification head; use a causal language model (--head lm, if the"
            " base is one)"
        )


def resolve_deepspeed(
    config: RunConfig, world_size: int, *, ranks_per_node: int | None = None
) -> tuple[ZeroConfig, BatchSizes]:
    """Return the DeepSpeed configuration of this run, and the batch numbers.

    Args:
        ranks_per_node: default: those of this node.
    """
    sizes = batch_sizes(config.training, world_size)
    resolved = resolve_ds_config(
        read_ds_config(config.run.ds_config),
        micro_batch_size=sizes.micro_batch_size,
        grad_accum_steps=sizes.grad_accum_steps,
        world_size=world_size,
        bf16=config.model.bf16,
        max_grad_norm=config.training.max_grad_norm,
        ranks_per_node=ranks_per_node or environment.local_world_size(),
        nvme_path=config.run.nvme_path,
        source=config.run.ds_config,
    )
    check_ds_config(resolved, config.run.ds_config)
    return resolved, sizes


def targets_of(config: RunConfig, base: BaseSpec) -> Targets:
    """Return the matrices to adapt."""
    return base.targets(config.adapter.target_modules, experts=config.adapter.adapt_experts)


def base_in_words(config: RunConfig, base: BaseSpec, targets: Targets) -> list[str]:
    """Return lines on what was decided about the base: its head, and what of it stays as it is."""
    lines = [base.head_in_words]
    if not config.method.trains_base:
        lines += [left_out_in_words(base.meta), find_experts(base.meta).left_in_words(targets)]
    return [line for line in lines if line is not None]
