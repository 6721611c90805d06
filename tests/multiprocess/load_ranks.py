"""What ranks do for the tests of loading: load every case of a folder at ZeRO-3, on however many there are."""

import hashlib
import io
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from configs import zero_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from taso_ds.config import parse_run_config
from taso_ds.distributed import comm, zero
from taso_ds.distributed.placement import check_nvme
from taso_ds.errors import UserError
from taso_ds.files.safetensors_ranges import SafetensorsCheckpoint
from taso_ds.models.load import load_base_model
from taso_ds.models.spec import read_spec


def digest(tensor: Tensor) -> str:
    bits = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(bits).hexdigest()}"


def generation(model: Any) -> dict[str, Any] | None:
    """Return how a model would generate; None for one that cannot."""
    return model.generation_config.to_dict() if model.can_generate() else None


class _Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def heard() -> Iterator[list[str]]:
    """Collect what this rank logs."""
    said, logger = _Said(), logging.getLogger("taso_ds")
    level = logger.level
    logger.addHandler(said)
    logger.setLevel(logging.INFO)
    yield said.lines
    logger.removeHandler(said)
    logger.setLevel(level)


class _Terminal(io.StringIO):
    """Keeps what is written; has the descriptor of the real one, which DeepSpeed redirects when it looks for libaio."""

    def fileno(self) -> int:
        return sys.__stderr__.fileno()  # type: ignore[union-attr]


class _Collectives(TorchDispatchMode):
    """Names the collectives that carry floating-point tensors; objects travel as bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.of_weights: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [value for value in tree_leaves(args) if isinstance(value, Tensor)]
        if func.namespace == "c10d" and any(map(torch.is_floating_point, tensors)):
            self.of_weights.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def watched() -> Iterator[SimpleNamespace]:
    """Watch a load on this rank: bytes it reads from tensors, collectives of weights, what stands on the terminal."""
    close = SafetensorsCheckpoint.close

    def closed(checkpoint: SafetensorsCheckpoint) -> None:
        found.bytes_read += checkpoint.bytes_read
        close(checkpoint)

    found = SimpleNamespace(bytes_read=0, weights_sent=[], terminal="")
    with (
        patch.object(SafetensorsCheckpoint, "close", closed),
        redirect_stderr(_Terminal()) as terminal,
        _Collectives() as collectives,
    ):
        yield found
    found.weights_sent, found.terminal = collectives.of_weights, terminal.getvalue()


def load(folder: Path, flags: list[str], ds_config_file: str) -> dict[str, Any]:
    config = parse_run_config(["--model_name_or_path", str(folder), "--task", "sst2", *flags])
    nvme_path = str(folder.parent / f"nvme{comm.world_size()}")
    resolved = zero_config(ds_config_file, bf16=config.model.bf16, nvme_path=nvme_path)
    check_nvme(resolved)
    spec = read_spec(config.model, str(folder))
    with watched() as seen:
        base = load_base_model(spec, seed=7, zero=resolved)
    found = {name: digest(zero.full_copy(value)) for name, value in base.model.named_parameters(remove_duplicate=False)}
    buffers = {name: digest(value) for name, value in base.model.named_buffers()}
    shards = comm.gather_objects(sum(zero.local_shard(value)[0].numel() for value in base.model.parameters()))
    parameters: list[Any] = list(base.model.parameters())
    return {
        "seen": comm.gather_objects(vars(seen)),
        "parameters": found,
        "buffers": buffers,
        "generation": generation(base.model),
        "shards": shards,
        "checksum": zero.checksum(parameters),
        "training": base.model.training,
        "on_disk": [value.ds_tensor.ds_numel for value in parameters if value.ds_tensor.final_location == "nvme"],
        "secondary": [
            0 if value.ds_secondary_tensor is None else value.ds_secondary_tensor.numel() for value in parameters
        ],
    }


def load_all(folder: Path) -> dict[str, dict[str, Any]]:
    """Load every case of ``cases.json``; what is refused has its ``error``."""
    found = {}
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        with heard() as said:
            try:
                found[name] = load(folder / case["folder"], case["flags"], case["ds_config"])
            except UserError as error:
                found[name] = {"error": str(error)}
        found[name]["said"] = said
    return found
