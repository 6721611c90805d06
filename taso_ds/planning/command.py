"""The command line of a strategy, and the flags that a plan decides."""

from collections.abc import Sequence

from taso_ds.planning.strategy import Strategy, Workload


def ds_config_name(strategy: Strategy) -> str:
    """Return the shipped DeepSpeed JSON of a strategy."""
    variant = "_offload" if strategy.offload else "_hpz" if strategy.hpz else ""
    if strategy.stage == 3 and strategy.load_in_4bit and not variant:
        variant = "_nf4"
    return f"zero{strategy.stage}{variant}.json"


def command_line(strategy: Strategy, work: Workload, flags: Sequence[str]) -> str:
    """Return the command that trains this way; ``flags`` are the run's own, without the ones decided here."""
    words = ["deepspeed"]
    if work.nodes > 1:
        words += ["--hostfile", "hostfile", "--num_nodes", str(work.nodes)]
    words += ["--num_gpus", str(work.gpus_per_node), "launch/train.py", *strategy_flags(strategy)]
    return " ".join([*words, *flags])


DECIDED_FLAGS = ("ds_config", "gradient_checkpointing", "load_in_4bit")


def strategy_flags(strategy: Strategy) -> list[str]:
    """Return the flags that make a run take this strategy."""
    words = ["--ds_config", ds_config_name(strategy)]
    if strategy.load_in_4bit:
        words.append("--load_in_4bit")
    if strategy.gradient_checkpointing:
        words.append("--gradient_checkpointing")
    return words
