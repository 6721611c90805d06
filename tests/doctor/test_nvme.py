"""Offload to NVMe: recognised in the JSON, its folder tried with direct I/O, its buffers counted."""

from pathlib import Path

import pytest

from taso_ds.distributed.ds_config import read_ds_config
from taso_ds.doctor.finding import FAIL, OK
from taso_ds.doctor.nvme import check_folder, nvme_section, pinned_bytes


def test_which_runs_offload() -> None:
    assert nvme_section(read_ds_config("zero3.json")) is None
    assert nvme_section(read_ds_config("zero3_offload.json")) is None
    section = nvme_section(read_ds_config("zero3_nvme.json"))
    assert section is not None
    # 5 buffers of 100,000,000 numbers of 2 bytes
    assert pinned_bytes(section, element=2) == 1_000_000_000
    assert pinned_bytes({**section, "pin_memory": False}, element=2) == 0


def test_its_folder(tmp_path: Path) -> None:
    section = nvme_section(read_ds_config("zero3_nvme.json"))
    assert section is not None
    unnamed = check_folder(section, None)
    assert (unnamed.status, unnamed.remedy) == (FAIL, "pass --nvme_path FOLDER")
    assert check_folder(section, "/proc/disk").status == FAIL
    named = check_folder({**section, "nvme_path": "/proc/disk"}, str(tmp_path))
    assert named.status == FAIL  # the JSON's own folder goes first
    assert not list(tmp_path.iterdir())


def test_a_local_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.O_DIRECT", 0)  # the temporary folder may be in memory
    found = check_folder({"nvme_path": "auto"}, str(tmp_path / "disk"))
    assert (found.status, found.found) == (OK, f"{tmp_path / 'disk'}: direct I/O works")
    assert not list(tmp_path.iterdir())
