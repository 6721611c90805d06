"""The configuration of flags, and of the two that every run needs."""

from taso_ds.config import RunConfig, parse_run_config


def config_of(*flags: str, task: str = "completion") -> RunConfig:
    return parse_run_config(["--model_name_or_path", "base", "--task", task, *flags])
