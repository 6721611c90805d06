"""Reading and writing this package's files: whole or not at all, with a checksum, and errors a user can act on."""

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from taso_ds.errors import UserError
from taso_ds.json_text import parse_json

CHECKSUM = "checksum"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name to write to; the file becomes ``path`` when all is written, and is removed when not.

    It gets the permissions the user's umask gives new files: safetensors makes its own readable by the owner alone.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    if os.path.isdir(path):  # False, too, where nobody may look
        raise UserError(f"cannot write {path}: it is a folder; name a file")
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            temporary.unlink(missing_ok=True)  # what a killed run left
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what a disk or a file system refuses while ``path`` is written into one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path} ({reason}): make room there, or choose another folder") from error


def open_to_umask(folder: Path) -> None:
    """Give every file below a folder the permissions that the folder itself got from the umask, execution apart."""
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file, whole or not at all; metadata values are stored as JSON, with a checksum of it all.

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
    """Put the metadata in order: the library writes it in another one each time, and equal files should be equal."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header.pop("__metadata__").items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= length
        file.seek(8)
        file.write(text.ljust(length))


def stream_tensors(path: Path, shapes: Mapping[str, torch.Size], tensors: Iterable[Tensor]) -> None:
    """Write fp32 tensors as they come, in the order of ``shapes``: a safetensors file that is never whole in memory."""
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
    """Read a file written by ``write_tensors`` whose metadata says ``"kind": kind``.

    A file without a checksum is taken as it is: it was made by another program.

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


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all; UserError when it cannot be written."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
