"""Tensors in files: what they hold, and that nothing stays behind."""

import errno
import os
from pathlib import Path

import pytest
import torch

from taso_ds.errors import UserError
from taso_ds.methods.disk_tensors import DiskTensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_copies_live_in_files_until_the_end(tmp_path: Path, dtype: torch.dtype) -> None:
    original = torch.arange(12).reshape(3, 4).to(dtype)
    with DiskTensors(tmp_path) as disk:
        assert list(tmp_path.iterdir()) == []
        kept = [disk.keep(original), disk.keep(original.t()), disk.keep(original[:0])]
        files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
        assert [file.stat().st_size for file in files[:2]] == [original.numel() * dtype.itemsize] * 2
        for tensor, wanted in zip(kept, (original, original.t(), original[:0]), strict=True):
            assert torch.equal(tensor, wanted)
        original += 1
        assert torch.equal(kept[0] + 1, original)
        stored = torch.frombuffer(bytearray(files[0].read_bytes()), dtype=dtype)
        assert torch.equal(stored, kept[0].flatten())
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail() -> None:
        with DiskTensors(tmp_path) as disk:
            disk.keep(torch.ones(3))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with DiskTensors(tmp_path) as disk, pytest.raises(UserError, match=r"has no room for 12 bytes \(No space left"):
        disk.keep(torch.ones(3))
    assert list(tmp_path.iterdir()) == []
