"""A run's plan from its flags: the model counted on the meta device, the hardware from flags or from this machine."""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from taso_ds.adapters.files import replacing, write_json
from taso_ds.adapters.selection import ladder_with
from taso_ds.adapters.structure import count_dense
from taso_ds.adapters.targets import MatrixShape
from taso_ds.config import GROUPS, RunConfig
from taso_ds.data.encode import EncodedRow
from taso_ds.distributed import comm, environment
from taso_ds.distributed.ds_config_keys import ZERO_AUTO
from taso_ds.errors import UserError
from taso_ds.flags import arg, parse_groups
from taso_ds.planning import report
from taso_ds.planning.devices import DEVICES, NETWORKS, get_device, get_network
from taso_ds.planning.disk import disk_bytes
from taso_ds.planning.host import available_host_bytes, check_host_memory
from taso_ds.planning.memory import Limits, Strategy, Workload, phase_usage
from taso_ds.planning.model_shape import ModelShape, read_model_shape
from taso_ds.planning.plan import (
    DECIDED_FLAGS,
    Candidate,
    Hardware,
    assess,
    command_line,
    fastest,
    scaling,
    strategies,
    strategy_flags,
)
from taso_ds.training import prepare
from taso_ds.training.base_model import BaseModel, meta_model, read_config, wants_head

_NODES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class PlanArguments:
    """The hardware to plan for. Every flag of ``launch/train.py`` is understood beside these."""

    device: str = arg("a100-80", f"One of {', '.join(DEVICES)}.")
    device_memory_gb: float | None = arg(None, "Memory of one device; default: the device's own.")
    device_tflops: float | None = arg(None, "Measured throughput of one device, instead of peak times efficiency.")
    host_memory_gb: float = arg(1000.0, "Memory of one node.")
    nodes: int = arg(1, "Number of nodes.")
    gpus_per_node: int = arg(8, "Devices of a node, one rank each.")
    network: str = arg("ib-400", f"Between nodes: one of {', '.join(NETWORKS)}.")
    network_gb_per_s: float | None = arg(None, "Measured all-gather bandwidth of one node, instead of the network's.")
    supervised_share: float = arg(1.0, "Share of the tokens that are supervised, where logits are computed.")
    json: str | None = arg(None, "Write all strategies as JSON to this file.")
    plot: str | None = arg(None, "Draw step time against nodes into this PNG.")

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "host_memory_gb", "device_memory_gb", "device_tflops"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"{name}: {value!r} is not positive and finite")
        if not 0.0 < self.supervised_share <= 1.0:
            raise UserError(f"supervised_share: {self.supervised_share!r} is not in (0, 1]")
        get_device(self.device)
        get_network(self.network)


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


def parse_plan(argv: Sequence[str] | None = None, *, description: str = "") -> tuple[RunConfig, PlanArguments]:
    """Parse a run's flags and the hardware's.

    Raises:
        UserError: unknown flag, or a value that cannot work.
    """
    *groups, plan = parse_groups((*GROUPS, PlanArguments), argv, description=description)
    return RunConfig(*groups), plan


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
    work = _workload(config, nodes=plan.nodes, gpus_per_node=plan.gpus_per_node, share=plan.supervised_share)
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


def _workload(
    config: RunConfig, *, nodes: int, gpus_per_node: int, share: float, length: int | None = None
) -> Workload:
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


def describe_forecast(forecast: Forecast) -> str:
    """Return a plan as text: counts, every strategy, the proposal with its phases, scaling, the command line."""
    shape, work, hardware = forecast.shape, forecast.work, forecast.hardware
    best = forecast.best
    lines = [
        f"model: {shape.parameters:,} frozen parameters, {shape.trainable:,} trainable in {shape.num_targets} matrices",
        f"hardware: {work.nodes} × {work.gpus_per_node} {hardware.device.name} with {hardware.device.memory_gb:g} GB,"
        f" {hardware.host_memory_gb:g} GB per node, {hardware.network.name} between nodes",
        f"work: {work.micro_batch_size} rows × {work.max_seq_length} tokens per rank and micro-batch,"
        f" {work.grad_accum_steps} micro-batches per step; {work.scoring_batches} scoring micro-batches per rank",
        "",
        *report.candidate_table(forecast.candidates),
        "",
    ]
    shown = best or min(forecast.candidates, key=lambda candidate: candidate.device_bytes)
    title = "fastest that fits" if best else "smallest (nothing fits)"
    lines += [f"{title}: {report.describe_strategy(shown.strategy)}", *report.phase_table(shown), ""]
    points = scaling(shape, shown.strategy, work, hardware, _NODES)
    lines += ["time per step at this micro-batch per rank:", *report.scaling_table(points), ""]
    if best is None:
        lines.append(f"does not fit: {shown.why_not}; use more or larger devices, or a shorter --max_seq_length")
        return "\n".join(lines)
    return "\n".join([*lines, f"fits: {command_line(best.strategy, work, run_flags(forecast.config))}"])


def run_flags(config: RunConfig) -> list[str]:
    """Return the run's flags that differ from the defaults, quoted for a shell; those the plan decides left out."""
    defaults = {entry.name: entry.default for group in GROUPS for entry in dataclasses.fields(group)}
    words: list[str] = []
    for name, value in config.flags().items():
        if name in DECIDED_FLAGS or value == defaults[name]:
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        else:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(shlex.quote(str(one)) for one in values)]
    return words


def planned_flags(config: RunConfig, plan: PlanArguments) -> list[str]:
    """Return the flags of the fastest strategy that fits.

    Raises:
        UserError: nothing fits.
    """
    best = make_forecast(config, plan).best
    if best is None:
        raise UserError(f"plan_for: nothing fits {plan.nodes} × {plan.gpus_per_node} {plan.device}; see launch/plan.py")
    return strategy_flags(best.strategy)


def write_forecast(forecast: Forecast, plan: PlanArguments) -> None:
    """Write what ``--json`` and ``--plot`` ask for."""
    best = forecast.best
    if plan.json is not None:
        content = {
            "model": dataclasses.asdict(forecast.shape),
            "work": dataclasses.asdict(forecast.work),
            "hardware": dataclasses.asdict(forecast.hardware),
            "strategies": [report.as_json(candidate) for candidate in forecast.candidates],
            "fastest": None if best is None else report.as_json(best),
        }
        write_json(Path(plan.json), content)
    if plan.plot is not None:
        strategy = (best or forecast.candidates[0]).strategy
        points = scaling(forecast.shape, strategy, forecast.work, forecast.hardware, _NODES)
        name = str(forecast.config.model.model_name_or_path)
        title = f"{Path(name).name} on {forecast.hardware.device.name}, {forecast.hardware.network.name}"
        with replacing(Path(plan.plot)) as temporary:
            report.draw_scaling(temporary, points, title=title)


def check_this_host(
    config: RunConfig,
    model: nn.Module,
    base_config: Any,
    shapes: Mapping[str, MatrixShape],
    rows: Sequence[EncodedRow],
    *,
    ds_config: Mapping[str, Any],
) -> None:
    """Refuse to load what this node's memory cannot hold; ``--force`` skips this.

    Raises:
        UserError: names what is needed and what is there.
    """
    if config.run.force:
        return
    zero = ds_config["zero_optimization"]
    stage = int(zero["stage"])
    strategy = Strategy(
        stage,
        load_in_4bit=config.model.load_in_4bit,
        offload=zero.get("offload_param", {}).get("device", "none") == "cpu",
        gradient_checkpointing=config.training.gradient_checkpointing,
        hpz=int(zero.get("zero_hpz_partition_size", 1)) > 1,
        limits=Limits(
            max_live_parameters=int(zero.get("stage3_max_live_parameters", Limits.max_live_parameters)),
            max_reuse_distance=int(zero.get("stage3_max_reuse_distance", Limits.max_reuse_distance)),
            prefetch_bucket=int(zero.get("stage3_prefetch_bucket_size", Limits.prefetch_bucket)),
            reduce_bucket=int(zero.get("reduce_bucket_size", Limits.reduce_bucket)),
        ),
    )
    local = min(environment.local_world_size(), comm.world_size())
    length = max(len(row.input_ids) for row in rows)
    supervised = max(row.num_supervised for row in rows)
    work = _workload(
        config,
        nodes=max(1, comm.world_size() // local),
        gpus_per_node=local,
        share=min(1.0, max(1, supervised) / length),
        length=length,
    )
    device = DEVICES["cpu" if comm.device().type == "cpu" else "a100-80"]  # of which only the kind matters here
    plan = phase_usage(count_model(config, model, base_config, shapes), strategy, work, device)
    if not config.run.verify_export:
        plan.pop("export")
    check_host_memory(plan, available_host_bytes())
