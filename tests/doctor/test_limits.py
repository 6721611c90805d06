"""Limits: the real ones of this process, lowered for the moment of the check."""

import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
from faked import soft_limit

from taso_ds.doctor import limits
from taso_ds.doctor.finding import FAIL, OK, WARN
from taso_ds.doctor.limits import check_core_files, check_locked_memory, check_open_files, check_shared_memory


@pytest.mark.parametrize(("number", "status"), [(1500, OK), (600, WARN), (200, FAIL)])
def test_open_files(number: int, status: str) -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 2000:
        pytest.skip("the hard limit is lower")
    with soft_limit(resource.RLIMIT_NOFILE, number):
        found = check_open_files(ranks=8)
    assert found.status == status
    assert str(number) in found.found


def test_more_ranks_open_more_files() -> None:
    with soft_limit(resource.RLIMIT_NOFILE, 1100):
        assert check_open_files(ranks=8).status == OK
        assert check_open_files(ranks=64).status == WARN
        assert check_open_files(ranks=512).status == FAIL


def test_locked_memory(tmp_path: Path) -> None:
    with soft_limit(resource.RLIMIT_MEMLOCK, 1 << 20):
        assert check_locked_memory(pinned=0, infiniband=tmp_path).status == OK
        small = check_locked_memory(pinned=10**9, infiniband=tmp_path)
        assert small.status == WARN
        assert "1.0 MB, offload to NVMe pins 1000 MB" in small.found
        (tmp_path / "mlx5_0").mkdir()
        assert check_locked_memory(pinned=0, infiniband=tmp_path).status == WARN


def test_unlimited_locked_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mlx5_0").mkdir()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert check_locked_memory(pinned=10**9, infiniband=tmp_path).status == OK
    assert check_open_files(ranks=512).status == OK


def test_core_files() -> None:
    with soft_limit(resource.RLIMIT_CORE, 0):
        assert check_core_files().status == OK
    if resource.getrlimit(resource.RLIMIT_CORE)[1] == 0:
        pytest.skip("the hard limit is 0")
    with soft_limit(resource.RLIMIT_CORE, 1 << 20):
        assert check_core_files().status == WARN


def test_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert check_shared_memory(ranks=1, is_host=True, folder=tmp_path).status == OK
    assert check_shared_memory(ranks=10**9, is_host=True, folder=tmp_path).status == FAIL
    assert check_shared_memory(ranks=2, is_host=True, folder=tmp_path / "none").status == FAIL
    docker = SimpleNamespace(free=64 << 20)  # what a container gets unless it asks
    monkeypatch.setattr(limits.shutil, "disk_usage", lambda _: docker)
    assert check_shared_memory(ranks=8, is_host=False, folder=tmp_path).status == WARN
    assert check_shared_memory(ranks=2, is_host=True, folder=tmp_path).status == FAIL
    assert check_shared_memory(ranks=1, is_host=False, folder=tmp_path).status == OK
