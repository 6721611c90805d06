"""Refuses a run whose plan, for the ranks and rows that are really here, this machine's memory cannot hold."""

import dataclasses
import logging
from collections.abc import Mapping

from taso_ds.distributed import comm, environment
from taso_ds.errors import UserError
from taso_ds.job import Job
from taso_ds.planning.count_model import NotCountedError, count_model
from taso_ds.planning.forecast import strategy_of, workload
from taso_ds.planning.host_memory import available_host_bytes
from taso_ds.planning.numbers.advice import host_advice
from taso_ds.planning.numbers.devices import DEVICES, GB
from taso_ds.planning.numbers.memory import Usage, phase_usage

log = logging.getLogger(__name__)


def check_this_host(job: Job, *, trains: bool) -> None:
    """Refuse to load what this node's memory cannot hold; ``--force`` skips this.

    Args:
        job: with its rows.
        trains: whether the model is scored and trained, not only loaded.

    Raises:
        UserError: names what is needed and what is there.
    """
    config, base, rows = job.config, job.base, job.rows
    if config.run.force:
        return
    device = DEVICES["cpu" if comm.device().type == "cpu" else "a100-80"]  # of which only the kind matters here
    bits = 16 if base.quantization is None else base.quantization.bits
    strategy = strategy_of(config, job.zero, bits=bits)
    if device.is_host and strategy.place == "cpu":  # where they are anyway
        strategy = dataclasses.replace(strategy, place="device")
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
    try:
        shape = count_model(config, base, job.targets)
    except NotCountedError as error:
        log.warning("%s; whether it fits into memory was not checked", error)
        return
    usage = phase_usage(shape, strategy, work, device)
    check_host_memory(usage if trains else {"load": usage["load"]}, available_host_bytes())


def check_host_memory(plan: Mapping[str, Usage], available: float) -> None:
    """Refuse a run whose host memory will not be enough, before it spends minutes on loading.

    Args:
        plan: peaks by phase, of this node.
        available: bytes.

    Raises:
        UserError: names the phase, both sizes and what helps.
    """
    phase = max(plan, key=lambda name: plan[name].host_bytes)
    needed = plan[phase].host_bytes
    if needed <= available:
        return
    largest = max(plan[phase].host, key=plan[phase].host.__getitem__)
    raise UserError(
        f"host memory: {phase} needs {needed / GB:.1f} GB on this node and {available / GB:.1f} GB are available"
        f" ({host_advice(largest)}); --force starts anyway"
    )
