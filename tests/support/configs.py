"""The configuration of flags, and of the two that every run needs; a DeepSpeed JSON as a run resolves it."""

from typing import Any

from taso_ds.config import RunConfig, parse_run_config
from taso_ds.distributed import comm
from taso_ds.distributed.ds_config import read_ds_config, resolve_ds_config
from taso_ds.distributed.zero_config import ZeroConfig


def config_of(*flags: str, task: str = "completion") -> RunConfig:
    return parse_run_config(["--model_name_or_path", "base", "--task", task, *flags])


def zero_config(raw: str | dict[str, Any], *, micro: int = 1, accumulation: int = 1, **more: Any) -> ZeroConfig:
    """Resolve a JSON, or that of a shipped name, for these ranks: fp32 and clipping at 1 but for ``more``."""
    run = {"world_size": comm.world_size(), "bf16": False, "max_grad_norm": 1.0, **more}
    content = read_ds_config(raw) if isinstance(raw, str) else raw
    return resolve_ds_config(content, micro_batch_size=micro, grad_accum_steps=accumulation, **run)
