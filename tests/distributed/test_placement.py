"""A folder that cannot take parameters is refused by name before anything is loaded."""

import os
from pathlib import Path
from typing import Any

import pytest

from taso_ds.distributed.placement import check_nvme
from taso_ds.distributed.zero_config import ZeroConfig
from taso_ds.errors import UserError


def offload_to(folder: Path) -> ZeroConfig:
    offload = {"device": "nvme", "nvme_path": str(folder)}
    return ZeroConfig({"zero_optimization": {"stage": 3, "offload_param": offload}})


@pytest.fixture
def libaio(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_, **__: True)


def test_other_devices_are_not_looked_at(tmp_path: Path) -> None:
    check_nvme(ZeroConfig({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}))
    check_nvme(ZeroConfig({"zero_optimization": {"stage": 0}}))


@pytest.mark.usefixtures("libaio")
def test_a_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    check_nvme(offload_to(tmp_path / "disk" / "run"))
    assert not list((tmp_path / "disk" / "run").iterdir())


@pytest.mark.usefixtures("libaio")
def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"nvme_path: cannot write into .*file: "):
        check_nvme(offload_to(tmp_path / "file"))


@pytest.mark.usefixtures("libaio")
def test_a_disk_without_direct_io_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=r"has no direct I/O \(Invalid argument\): use a local disk"):
        check_nvme(offload_to(tmp_path))
    assert not os.listdir(tmp_path)


def test_without_libaio_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_, **__: False)
    with pytest.raises(UserError, match="nvme_path: DeepSpeed's async_io needs libaio: install libaio-dev"):
        check_nvme(offload_to(tmp_path))
