"""A reader of ranges of the tensors in a safetensors checkpoint, so that no rank reads what it does not keep.

The format (https://huggingface.co/docs/safetensors): 8 bytes with the header's length, little-endian; a JSON header
with dtype, shape and byte range of every tensor; then the bytes, row-major. A sharded checkpoint has an index that
names the file of every tensor.
"""

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from taso_ds.errors import UserError
from taso_ds.files.json_text import parse_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLE_INDEX = "pytorch_model.bin.index.json"  # transformers reads it where there are no safetensors files
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
# Bytes read at once where they must be converted or copied to a device on their way.
_STAGING_BYTES = 1 << 26


class _Entry(TypedDict):
    """What a header says of a tensor."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        start: its first byte in the file.
    """

    path: Path
    dtype: torch.dtype
    shape: torch.Size
    start: int

    @property
    def numel(self) -> int:
        return self.shape.numel()

    @property
    def as_bytes(self) -> "StoredTensor":
        return StoredTensor(self.path, torch.uint8, torch.Size((self.numel * self.dtype.itemsize,)), self.start)

    def ranges(self, first: int, count: int) -> Iterator[tuple["StoredTensor", int, int]]:
        """Yield where ``count`` elements from ``first`` on lie: the tensor, its first element, how many."""
        yield self, first, count


@dataclass(frozen=True)
class JoinedTensor:
    """Stored tensors of one shape and dtype, end to end, as the one tensor they are in the model."""

    parts: tuple[StoredTensor, ...]
    shape: torch.Size

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def numel(self) -> int:
        return self.shape.numel()

    @property
    def as_bytes(self) -> "JoinedTensor":
        return JoinedTensor(
            tuple(part.as_bytes for part in self.parts), torch.Size((self.numel * self.dtype.itemsize,))
        )

    def ranges(self, first: int, count: int) -> Iterator[tuple[StoredTensor, int, int]]:
        """Yield where ``count`` elements from ``first`` on lie, part by part, as ``StoredTensor.ranges`` does."""
        size = self.parts[0].numel
        while count:
            part, inside = divmod(first, size)
            here = min(count, size - inside)
            yield self.parts[part], inside, here
            first, count = first + here, count - here


class SafetensorsCheckpoint:
    """The tensors of a folder's checkpoint by name. A file is opened when it is first read."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self.tensors: dict[str, StoredTensor | JoinedTensor] = dict(tensors)
        self._files: dict[Path, int] = {}
        self._staging = torch.empty(0, dtype=torch.uint8)
        self.bytes_read = 0

    def join(self, name: str, keys: Sequence[str], shape: torch.Size) -> None:
        """Put one tensor in the place of several, end to end.

        Args:
            name: of the new tensor.
            keys: names of the tensors that it takes the place of.
            shape: of the new tensor.
        """
        parts = tuple(part for part in map(self.tensors.pop, keys) if isinstance(part, StoredTensor))
        assert len(parts) == len(keys)
        assert {(part.shape, part.dtype) for part in parts} == {(parts[0].shape, parts[0].dtype)}
        assert shape.numel() == len(parts) * parts[0].numel
        self.tensors[name] = JoinedTensor(parts, shape)

    def read_into(self, out: Tensor, name: str, *, first: int = 0, as_bytes: bool = False) -> None:
        """Fill a tensor with elements of the stored one.

        Args:
            out: ``(number,)``, contiguous; its dtype and device stay.
            first: the first element to read.
            as_bytes: whether the elements are the stored tensor's bytes, whatever its dtype.

        Raises:
            UserError: the file ends early.
        """
        stored = self.tensors[name].as_bytes if as_bytes else self.tensors[name]
        assert out.dim() == 1
        assert out.is_contiguous()
        assert 0 <= first <= stored.numel - out.numel(), f"{name}: {first} + {out.numel()} of {stored.numel}"
        if out.device.type == "cpu" and out.dtype == stored.dtype:
            self._read(stored, first, out)
            return
        if not self._staging.numel():
            self._staging = torch.empty(_STAGING_BYTES, dtype=torch.uint8)
        staging = self._staging.view(stored.dtype)
        for start in range(0, out.numel(), staging.numel()):
            part = out[start : start + staging.numel()]
            self._read(stored, first + start, staging[: part.numel()])
            part.copy_(staging[: part.numel()])

    def read(self, name: str) -> Tensor:
        """Return one whole tensor in its stored dtype, on the CPU."""
        stored = self.tensors[name]
        found = torch.empty(stored.shape, dtype=stored.dtype)
        self.read_into(found.view(-1), name)
        return found

    def _read(self, stored: StoredTensor | JoinedTensor, first: int, out: Tensor) -> None:
        start = 0
        for tensor, inside, count in stored.ranges(first, out.numel()):
            self._read_range(tensor, inside, out[start : start + count])
            start += count

    def _read_range(self, stored: StoredTensor, first: int, out: Tensor) -> None:
        if stored.path not in self._files:
            self._files[stored.path] = os.open(stored.path, os.O_RDONLY)
        position = stored.start + first * stored.dtype.itemsize
        view = memoryview(out.view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy arrays are buffers
        self.bytes_read += len(view)
        while len(view):
            count = os.preadv(self._files[stored.path], [view], position)
            if count == 0:
                raise UserError(f"model_name_or_path: {stored.path} ends early, copy it again")
            view, position = view[count:], position + count

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()
        self._staging = torch.empty(0, dtype=torch.uint8)


@contextmanager
def open_checkpoint(folder: Path) -> Iterator[SafetensorsCheckpoint]:
    """Open a folder's safetensors checkpoint and close its files afterwards.

    Raises:
        UserError: an unreadable index, an index that names a file that is not there, a damaged header, a file shorter
            or longer than its header says.
    """
    assert sys.byteorder == "little", "safetensors stores little-endian numbers"
    single = folder / SINGLE
    checkpoint = SafetensorsCheckpoint(_header(single) if single.is_file() else _read_index(folder))
    try:
        yield checkpoint
    finally:
        checkpoint.close()


def has_checkpoint(folder: Path) -> bool:
    """Say whether a folder holds a safetensors checkpoint at all."""
    return (folder / INDEX).is_file() or (folder / SINGLE).is_file()


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that a model is read from, whichever library reads it, and no other files.

    Raises:
        UserError: an index, of pickles too, names what is not a file of its folder.
    """
    if (folder / SINGLE).is_file():  # before an index, as transformers has it
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return [folder / name for name in dict.fromkeys(_indexed_files(folder / INDEX).values())]
    if (folder / _PICKLE_INDEX).is_file():
        _indexed_files(folder / _PICKLE_INDEX)
    return []


def _indexed_files(index: Path) -> dict[str, str]:
    """Return the file name of every tensor. No name leads out of the index's folder."""
    try:
        files = parse_json(index.read_text(encoding="utf-8"), f"model_name_or_path: {index}")["weight_map"]
        found = {str(name): str(file) for name, file in files.items()}
    except (OSError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"model_name_or_path: {index} is not a checkpoint index: copy it again") from error
    for file in dict.fromkeys(found.values()):
        if file in ("", "..") or Path(file).name != file or not file.isprintable() or len(file.encode()) > 255:
            raise UserError(f"model_name_or_path: {index} names {file!r}, which is not a file of its folder")
        if not (index.parent / file).is_file():
            raise UserError(f"model_name_or_path: {index} names {file}, which is missing: download it")
    return found


def _read_index(folder: Path) -> dict[str, StoredTensor]:
    files = _indexed_files(folder / INDEX)
    headers = {file: _header(folder / file) for file in dict.fromkeys(files.values())}
    for name, file in files.items():
        if name not in headers[file]:
            raise UserError(f"model_name_or_path: {folder / INDEX} says {name} is in {file}, which does not hold it")
    return {name: headers[file][name] for name, file in files.items()}


def _header(path: Path) -> dict[str, StoredTensor]:
    try:
        # Checks the header, and the file's length against it; for torch it would map the whole file.
        with safe_open(path, framework="np"):
            pass
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            entries: dict[str, _Entry] = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"model_name_or_path: {path} is damaged, copy it again ({error})") from error
    tensors = {}
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise UserError(f"model_name_or_path: {path} holds {name} as {entry['dtype']}, which is not supported")
        dtype, shape = _DTYPES[entry["dtype"]], torch.Size(entry["shape"])
        begin, end = entry["data_offsets"]
        assert end - begin == math.prod(shape) * dtype.itemsize
        tensors[name] = StoredTensor(path, dtype, shape, 8 + length + begin)
    return tensors
