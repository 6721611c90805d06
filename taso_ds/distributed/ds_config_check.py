"""What a resolved DeepSpeed dict needs of this machine, and what DeepSpeed says of it: both before anything loads."""

import importlib.util
import json
import logging
import os
from pathlib import Path

from taso_ds.distributed.accelerator import find_accelerator
from taso_ds.distributed.ds_config_values import Section, section_of
from taso_ds.distributed.zero_config import ZeroConfig
from taso_ds.errors import UserError

# What a monitor imports when it is switched on, and how to get it.
_LIBRARIES = {
    "tensorboard": ("tensorboard", "pip install tensorboard"),
    "wandb": ("wandb", "pip install wandb"),
    "comet": ("comet_ml", "pip install 'comet_ml>=3.41.0'"),
}
_FOLDERS = ("tensorboard", "csv_monitor")


def check_ds_config(zero: ZeroConfig, source: str) -> None:
    """Refuse monitors that cannot start here, and whatever DeepSpeed refuses.

    Args:
        source: what to call the JSON in errors.

    Raises:
        UserError: naming the key, its value and what would be valid.
    """
    resolved = zero.raw
    for name, (library, command) in _LIBRARIES.items():
        if _is_on(resolved, name) and importlib.util.find_spec(library) is None:
            raise UserError(f"{source}: {name} is enabled, but {library} is not installed: {command}, or remove {name}")
    for name in _FOLDERS:
        if _is_on(resolved, name):
            _check_folder(Path(_text(resolved, name, "output_path")), f"{source}: {name}.output_path")
    file = _text(resolved, "flops_profiler", "output_file")
    if file and _is_on(resolved, "flops_profiler"):
        if Path(file).is_dir():
            raise UserError(f"{source}: flops_profiler.output_file: {file} is a folder; name a file")
        _check_folder(Path(file).parent, f"{source}: flops_profiler.output_file")
    if importlib.util.find_spec("deepspeed") is not None:  # a dry run needs none
        _ask_deepspeed(resolved, source)


def check_device(zero: ZeroConfig, source: str) -> None:
    """Refuse what DeepSpeed can do on GPUs only, where this rank has none; UserError."""
    for name in ("zero_quantized_weights", "zero_quantized_gradients"):
        if zero.section.get(name) and find_accelerator().is_host:
            raise UserError(f"{source}: zero_optimization.{name} needs a GPU, and there is none here: remove it")


def _is_on(resolved: Section, name: str) -> bool:
    return bool(section_of(resolved, name).get("enabled"))


def _text(resolved: Section, name: str, key: str) -> str:
    return str(section_of(resolved, name).get(key, ""))


def _check_folder(folder: Path, name: str) -> None:
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{name}: cannot write {folder}: {existing} is not a writable folder")


def _ask_deepspeed(resolved: Section, source: str) -> None:
    """Let DeepSpeed read the dict, without the batch of all ranks: before they meet, it counts one rank."""
    from pydantic import ValidationError

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it tells which accelerator it takes, and nothing runs here
    try:
        from deepspeed.runtime.config import DeepSpeedConfig

        DeepSpeedConfig({key: value for key, value in resolved.items() if key != "train_batch_size"})
    except ValidationError as error:
        first = error.errors()[0]
        value = json.dumps(first["input"], default=str)[:200]
        what = f"{'.'.join(map(str, first['loc']))} {value}" if first["loc"] else "it"  # one value, or several together
        raise UserError(f"{source}: DeepSpeed refuses {what}: {first['msg']}") from error
    except Exception as error:
        # Its sections are read by assertions, look-ups and arithmetic: what is wrong with a value shows as any of them.
        raise UserError(f"{source}: DeepSpeed refuses it: {error or type(error).__name__}") from error
    finally:
        logging.disable(before)
