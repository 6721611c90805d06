"""A run's plan from its flags: the model counted on the meta device, the hardware from flags.

The job is checked as a training run checks it. What the user has decided stays, and the search chooses the rest.
"""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from taso_ds.adapters.selection import ladder_with
from taso_ds.config import RunConfig
from taso_ds.defaults import with_defaults
from taso_ds.distributed.ds_config_keys import ZERO_AUTO
from taso_ds.distributed.ds_config_values import number_of, section_of
from taso_ds.distributed.zero_config import ZeroConfig
from taso_ds.flags.flag import flags_of
from taso_ds.job import Job, preflight
from taso_ds.planning.arguments import PlanArguments
from taso_ds.planning.count_model import can_quantize, count_model
from taso_ds.planning.numbers.disk import disk_bytes
from taso_ds.planning.numbers.model_shape import ModelShape
from taso_ds.planning.numbers.plan import Candidate, Hardware
from taso_ds.planning.numbers.search import Freedom, assess_scoring, fastest, strategies, variants
from taso_ds.planning.numbers.strategy import Limits, Strategy, Workload
from taso_ds.training.arguments import batch_sizes


@dataclass(frozen=True, eq=False)
class Forecast:
    """All strategies of one run on one kind of hardware.

    Attributes:
        candidates: every strategy, those of the user's DeepSpeed JSON last.
        choices: those that may be proposed.
        kept: names of the flags that the user has decided.
        stored_bits: 4 or 8 when the checkpoint is quantized already.
    """

    config: RunConfig
    shape: ModelShape
    work: Workload
    hardware: Hardware
    candidates: list[Candidate]
    choices: list[Candidate]
    kept: frozenset[str]
    stored_bits: int

    @property
    def best(self) -> Candidate | None:
        return fastest(self.choices)


def make_forecast(config: RunConfig, plan: PlanArguments, given: Collection[str] = ()) -> Forecast:
    """Read ``config.json``, check the run, count, and assess every strategy.

    Args:
        given: names of the flags that the user gave, with values that may be the defaults.

    Raises:
        UserError: whatever a run would refuse before it reads weights and data.
    """
    if config.model.model_name_or_path is None:
        config = with_defaults(config)
    job = preflight(config, plan.nodes * plan.gpus_per_node, ranks_per_node=plan.gpus_per_node, read_rows=False)
    base, zero = job.base, job.zero
    shape = count_model(config, base, job.targets)
    work = workload(config, nodes=plan.nodes, gpus_per_node=plan.gpus_per_node, share=plan.supervised_share)
    hardware = plan.hardware()

    quantization = base.quantization
    kept = _decided(config, given)
    bits: tuple[int, ...] = (16, 4)
    if quantization is not None:
        bits = (quantization.bits,)
    elif "load_in_4bit" in kept or not can_quantize(config, base):
        bits = (16,)
    decided = "gradient_checkpointing" in kept or not base.can_recompute
    freedom = Freedom(
        bits=bits,
        checkpointing=(config.training.gradient_checkpointing,) if decided else (False, True),
        passes="calibration_passes" not in kept,
        sums_on_host="calibration_offload" not in kept,
        nvme=config.run.nvme_path is not None,
        hpz=not shape.trains_base,
    )
    ways = strategies(work, limits=limits_of(ZERO_AUTO), freedom=freedom, is_host=hardware.device.is_host)
    candidates = [assess_scoring(shape, way, work, hardware, freedom) for way in ways]
    choices = candidates
    if "ds_config" in kept:
        if zero.alters_bits is not None:
            freedom = dataclasses.replace(freedom, bits=(16,))
        theirs = strategy_of(config, zero)
        choices = [assess_scoring(shape, way, work, hardware, freedom) for way in variants(theirs, freedom)]
        candidates = [*candidates, *choices]
    stored = 16 if quantization is None or quantization.stored is None else quantization.bits
    return Forecast(config, shape, work, hardware, candidates, choices, kept, stored)


def _decided(config: RunConfig, given: Collection[str]) -> frozenset[str]:
    """Return the names of the flags that the plan may not decide: given, or set to another value than the default."""
    return frozenset(
        entry.name
        for group in (config.model, config.training, config.run, config.calibration)
        for entry in dataclasses.fields(group)
        if flags_of([group])[entry.name].is_planned
        if entry.name in given or getattr(group, entry.name) != entry.default
    )


def limits_of(section: Mapping[str, object]) -> Limits:
    """Return the limits of a resolved ``zero_optimization`` section; DeepSpeed's defaults where it says nothing."""
    offload = section_of(section, "offload_param")
    return Limits(
        max_live_parameters=number_of(section, "stage3_max_live_parameters", Limits.max_live_parameters),
        max_reuse_distance=number_of(section, "stage3_max_reuse_distance", Limits.max_reuse_distance),
        prefetch_bucket=number_of(section, "stage3_prefetch_bucket_size", Limits.prefetch_bucket),
        reduce_bucket=number_of(section, "reduce_bucket_size", Limits.reduce_bucket),
        nvme_buffer=number_of(offload, "buffer_size", Limits.nvme_buffer),
        nvme_buffers=number_of(offload, "buffer_count", Limits.nvme_buffers),
    )


def strategy_of(config: RunConfig, zero: ZeroConfig, *, bits: int = 16) -> Strategy:
    """Return the strategy of a run with this DeepSpeed configuration."""
    return Strategy(
        zero.stage,
        place="device" if zero.parameter_place == "none" else zero.parameter_place,
        bits=bits,
        gradient_checkpointing=config.training.gradient_checkpointing,
        hpz=zero.has_second_shards,
        limits=limits_of(zero.section),
        ds_config=config.run.ds_config,
    )


def planned_files(job: Job, shape: ModelShape) -> dict[str, float]:
    """Return the bytes a run will have in its folder at most, by cause."""
    config = job.config
    return disk_bytes(
        shape,
        element=2 if config.model.bf16 else 4,
        edges=job.targets.edges if config.method.needs_regions else 0,
        core_fraction=config.calibration.core_fraction,
        ladder=len(ladder_with(config.calibration.element_fraction)),
        checkpoints=config.training.save_total_limit + 1,  # the oldest goes when the newest is whole
    )


def workload(config: RunConfig, *, nodes: int, gpus_per_node: int, share: float, length: int | None = None) -> Workload:
    """Return what a run does on so many ranks."""
    training, calibration = config.training, config.calibration
    sizes = batch_sizes(training, nodes * gpus_per_node)
    return Workload(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        max_seq_length=length or config.data.max_seq_length,
        micro_batch_size=sizes.micro_batch_size,
        grad_accum_steps=sizes.grad_accum_steps,
        calibration_samples=calibration.calibration_samples,
        calibration_batch_size=calibration.calibration_batch_size or training.per_device_train_batch_size,
        calibration_passes=calibration.calibration_passes,
        calibration_offload=calibration.calibration_offload == "cpu",
        supervised_share=share,
        bf16=config.model.bf16,
        scores=config.method.needs_regions and calibration.core_regions is None,
        proves=config.run.verify_export,
        steps=training.max_steps if training.max_steps > 0 else Workload.steps,
    )
