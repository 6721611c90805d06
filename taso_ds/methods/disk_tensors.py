"""Tensors kept in files: a whole model is put together there, because no process should hold one in memory."""

import os
import tempfile
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from taso_ds.errors import UserError


class DiskTensors:
    """Copies of tensors, mapped from temporary files in ``folder``; the system drops them from memory when it runs low.

    The files are removed on exit, and the tensors must not be used afterwards. No file exists before the first tensor.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: tempfile.TemporaryDirectory[str] | None = None
        self._number = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """Return a copy that lies in a file. Its room on the disk is reserved before anything is written.

        Raises:
            UserError: the disk has no room.
        """
        size = tensor.numel() * tensor.element_size()
        try:
            if self._files is None:
                self._files = tempfile.TemporaryDirectory(prefix=".weights_", dir=self._folder)
            path = Path(self._files.name) / str(self._number)
            self._number += 1
            with path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, size))
        except OSError as error:
            raise UserError(f"output_dir: {self._folder} has no room for {size} bytes ({error.strerror})") from error
        kept = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
        return kept.view(tensor.shape).copy_(tensor)

    def __enter__(self) -> "DiskTensors":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._files is not None:
            self._files.cleanup()
