"""A run's plan from its flags: the model counted on the meta device, the hardware from flags."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from taso_ds.adapters.selection import ladder_with
from taso_ds.adapters.structure import count_dense
from taso_ds.adapters.targets import MatrixShape
from taso_ds.config import RunConfig
from taso_ds.distributed.ds_config_keys import ZERO_AUTO
from taso_ds.planning.devices import get_device, get_network
from taso_ds.planning.disk import disk_bytes
from taso_ds.planning.model_shape import ModelShape, read_model_shape
from taso_ds.planning.plan import Candidate, Hardware, assess, fastest, strategies
from taso_ds.planning.strategy import Limits, Workload
from taso_ds.training import prepare
from taso_ds.training.base_model import BaseModel, meta_model, read_config, wants_head
from taso_ds.training.plan_arguments import PlanArguments


@dataclass(frozen=True, eq=False)
class Forecast:
    """All strategies of one run on one kind of hardware."""

    config: RunConfig
    shape: ModelShape
    work: Workload
    hardware: Hardware
    candidates: list[Candidate]

    @property
    def best(self) -> Candidate | None:
        return fastest(self.candidates)


def count_model(config: RunConfig, model: nn.Module, base_config: Any, shapes: Mapping[str, MatrixShape]) -> ModelShape:
    """Count a meta model: frozen and trainable parameters as a run would have them."""
    adapter = config.adapter
    head = wants_head(config.model, base_config)
    heads = sum(value.numel() for value in BaseModel(model, base_config, head).head_parameters.values())
    if adapter.method == "full":
        trainable = sum(value.numel() for value in model.parameters())
    else:
        trainable = prepare.count_adapter(config, dict(shapes)).trainable + heads
    dense = 0
    if adapter.method == "taso":
        dense = sum(
            count_dense(
                adapter.structure, out_features=shape.out_features, in_features=shape.in_features, rank=adapter.rank
            )
            for shape in shapes.values()
        )
    return read_model_shape(model, base_config, shapes, trainable=trainable, adapter_dense=dense)


def make_forecast(config: RunConfig, plan: PlanArguments) -> Forecast:
    """Read ``config.json``, count, and assess every strategy.

    Raises:
        UserError: a model that cannot be read or built, batch numbers that do not multiply.
    """
    if config.model.model_name_or_path is None:
        config = prepare.with_defaults(config)
    shape, _ = read_shape(config)
    work = workload(config, nodes=plan.nodes, gpus_per_node=plan.gpus_per_node, share=plan.supervised_share)
    device = get_device(plan.device, memory_gb=plan.device_memory_gb, tflops=plan.device_tflops)
    hardware = Hardware(device, get_network(plan.network, gb_per_s=plan.network_gb_per_s), plan.host_memory_gb)
    limits = Limits(
        max_live_parameters=int(ZERO_AUTO["stage3_max_live_parameters"]),
        max_reuse_distance=int(ZERO_AUTO["stage3_max_reuse_distance"]),
        prefetch_bucket=int(ZERO_AUTO["stage3_prefetch_bucket_size"]),
        reduce_bucket=int(ZERO_AUTO["reduce_bucket_size"]),
    )
    quantized = (False,) if config.adapter.method == "full" else (False, True)
    ways = strategies(work, limits=limits, quantized=quantized, offloads=not device.is_host)
    return Forecast(config, shape, work, hardware, [assess(shape, way, work, hardware) for way in ways])


def read_shape(config: RunConfig) -> tuple[ModelShape, dict[str, MatrixShape]]:
    """Count a run's model from ``config.json``; also returns the matrices to adapt.

    Raises:
        UserError: a model that cannot be read or built.
    """
    base_config = read_config(config.model)
    prepare.check_length(config, base_config)
    model = meta_model(config.model, base_config, head=wants_head(config.model, base_config))
    shapes = prepare.target_shapes(config, model)
    return count_model(config, model, base_config, shapes), shapes


def planned_files(config: RunConfig, shape: ModelShape, shapes: Mapping[str, MatrixShape]) -> dict[str, float]:
    """Return the bytes a run will have in its folder at most, by cause."""
    is_taso = config.adapter.method == "taso"
    return disk_bytes(
        shape,
        element=2 if config.model.bf16 else 4,
        edges=sum(matrix.out_features + matrix.in_features for matrix in shapes.values()) if is_taso else 0,
        core_fraction=config.calibration.core_fraction,
        ladder=len(ladder_with(config.calibration.element_fraction)),
        checkpoints=config.training.save_total_limit + 1,  # the oldest goes when the newest is whole
    )


def workload(config: RunConfig, *, nodes: int, gpus_per_node: int, share: float, length: int | None = None) -> Workload:
    """Return what a run does on so many ranks."""
    training, calibration = config.training, config.calibration
    sizes = prepare.batch_sizes(training, nodes * gpus_per_node)
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
        scores=config.adapter.method == "taso" and calibration.core_regions is None,
    )
