"""A run refused before it loads what this machine cannot hold: its plan on the ranks and rows that are really there."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from taso_ds.adapters.targets import MatrixShape
from taso_ds.config import RunConfig
from taso_ds.data.encode import EncodedRow
from taso_ds.distributed import comm, environment
from taso_ds.planning.devices import DEVICES
from taso_ds.planning.host import available_host_bytes, check_host_memory
from taso_ds.planning.memory import phase_usage
from taso_ds.planning.strategy import Limits, Strategy
from taso_ds.training.forecast import count_model, workload


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
    work = workload(
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
