"""The command line of a strategy, and the flags that make a run take it."""

from collections.abc import Collection, Sequence

from taso_ds.planning.numbers.plan import Candidate
from taso_ds.planning.numbers.strategy import Strategy, Workload


def ds_config_name(strategy: Strategy) -> str:
    """Return the DeepSpeed JSON of a strategy: the user's, or the shipped one."""
    if strategy.ds_config is not None:
        return strategy.ds_config
    variant = {"cpu": "_offload", "nvme": "_nvme"}.get(strategy.place, "_hpz" if strategy.hpz else "")
    if strategy.stage == 3 and strategy.bits == 4 and not variant:
        variant = "_nf4"
    return f"zero{strategy.stage}{variant}.json"


def decided_flags(candidate: Candidate, *, given: Collection[str] = (), stored_bits: int = 16) -> list[str]:
    """Return the flags that make a run take this way, those the user has ``given`` left out.

    Args:
        stored_bits: 4 or 8 when the checkpoint is quantized already, which needs no flag.
    """
    strategy, work = candidate.strategy, candidate.work
    wanted = {
        "ds_config": ["--ds_config", ds_config_name(strategy)],
        "gradient_checkpointing": ["--gradient_checkpointing"] * strategy.gradient_checkpointing,
        "load_in_4bit": ["--load_in_4bit"] * (strategy.bits == 4 != stored_bits),
        "load_in_8bit": ["--load_in_8bit"] * (strategy.bits == 8 != stored_bits),
        "calibration_passes": ["--calibration_passes", str(work.calibration_passes)] * (work.calibration_passes > 1),
        "calibration_offload": ["--calibration_offload", "cpu"] * work.calibration_offload,
    }
    return [word for name, words in wanted.items() if name not in given for word in words]


def command_line(work: Workload, program: str, flags: Sequence[str]) -> str:
    """Return the command that runs a program with these flags on so many devices."""
    words = ["deepspeed"]
    if work.nodes > 1:
        words += ["--hostfile", "hostfile", "--num_nodes", str(work.nodes)]
    return " ".join([*words, "--num_gpus", str(work.gpus_per_node), program, *flags])
