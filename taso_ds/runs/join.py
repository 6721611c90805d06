"""The start of every run over ranks: they meet, and each node has the same base."""

from taso_ds.config import RunConfig
from taso_ds.distributed import engine as engines
from taso_ds.distributed import environment, process_group
from taso_ds.job import check_flags
from taso_ds.models.quantized_linear import quiet_bitsandbytes
from taso_ds.models.source import model_source
from taso_ds.runs.nodes import check_same_model


def join(config: RunConfig) -> None:
    """Meet the other ranks, bring the base onto this node if that has not been done, then join the process group.

    The order matters. A node that has no base ends all. Inside a group, transformers saves a model on rank 0 only, and
    ranks that wait could time out. Cheap checks come first, because a download or a conversion takes its time.
    """
    environment.check()
    check_flags(config, environment.world_size())
    process_group.meet()
    source = model_source(config.model)
    process_group.init()
    check_same_model(config, source)
    engines.quiet_deepspeed()
    quiet_bitsandbytes()
