"""Safetensors reading and writing for this package: atomic writes, and reading errors a user can act on."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from taso_ds.errors import UserError


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file under a temporary name and rename it; metadata values are stored as JSON."""
    temporary = path.with_name(f".{path.name}.tmp")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, temporary, metadata={key: json.dumps(value) for key, value in metadata.items()})
    os.replace(temporary, path)


def read_tensors(path: Path, *, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file written by ``write_tensors`` whose metadata says ``"kind": kind``.

    Raises:
        UserError: missing, unreadable or another kind of file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            stored = file.metadata() or {}
            found = stored.get("kind", "none").strip('"')
            if found != kind:
                raise UserError(f"{path}: not a {kind} file (its kind is {found!r})")
            metadata = {key: json.loads(value) for key, value in stored.items()}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error
    return tensors, metadata


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name and rename it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
