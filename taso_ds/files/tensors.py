"""This package's safetensors files: whole or not at all, with a checksum, and errors that a user can act on."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from taso_ds.errors import UserError
from taso_ds.files.atomic import replacing
from taso_ds.files.json_text import parse_json

CHECKSUM = "checksum"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, object]) -> None:
    """Write a safetensors file with a checksum, whole or not at all.

    Args:
        metadata: values that JSON can hold.

    Raises:
        UserError: when it cannot be written.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    stored = {key: json.dumps(value) for key, value in metadata.items() if key != CHECKSUM}
    stored[CHECKSUM] = json.dumps(_checksum(contiguous, stored))
    with replacing(path) as temporary:
        save_file(contiguous, temporary, metadata=stored)
        _sort_metadata(temporary)


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return a digest of names, types, shapes, contents and metadata, whatever their order."""
    shapes = [[name, str(tensor.dtype), list(tensor.shape)] for name, tensor in sorted(tensors.items())]
    digest = hashlib.sha256(json.dumps([shapes, sorted(metadata.items())]).encode())
    for _, tensor in sorted(tensors.items()):
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # arrays are buffers
    return digest.hexdigest()


def _sort_metadata(path: Path) -> None:
    """Sort the metadata: the library's order changes from call to call, and equal contents should make equal files."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header.pop("__metadata__").items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= length
        file.seek(8)
        file.write(text.ljust(length))


def stream_tensors(path: Path, shapes: Mapping[str, torch.Size], tensors: Iterable[Tensor]) -> None:
    """Write a safetensors file of fp32 tensors that is never whole in memory.

    Args:
        shapes: of all tensors, by name.
        tensors: as many, in the order of ``shapes``; each is written as it comes.
    """
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * shape.numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
            assert (tensor.dtype, tensor.shape) == (torch.float32, shape), name
            file.write(tensor.detach().cpu().contiguous().view(-1).numpy().data)


def read_tensors(path: Path, *, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that ``write_tensors`` wrote.

    A file without a checksum is taken as it is: another program made it.

    Args:
        kind: what the metadata must say under "kind".

    Returns:
        The tensors on the CPU, and the metadata without the checksum.

    Raises:
        UserError: missing, unreadable, damaged or another kind of file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            stored = file.metadata() or {}
            found = stored.get("kind", "none").strip('"')
            if found != kind:
                raise UserError(f"{path}: not a {kind} file (its kind is {found!r})")
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error
    metadata = {key: parse_json(value, f"{path}: {key}") for key, value in stored.items()}
    checksum = metadata.pop(CHECKSUM, None)
    if checksum not in (None, _checksum(tensors, {key: stored[key] for key in metadata})):
        raise UserError(f"{path}: damaged (its checksum differs): copy it again")
    return tensors, metadata


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
