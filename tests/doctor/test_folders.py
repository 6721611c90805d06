"""Folders: real ones that work, cannot be written, hit a limit, lie in memory or on a network file system."""

import errno
import os
import resource
from pathlib import Path

import pytest
from faked import soft_limit

from taso_ds.doctor.finding import FAIL, OK, WARN
from taso_ds.doctor.folders import check_sharing, check_space, check_writing, existing, file_system

MOUNTS = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
23 22 0:40 / /home rw - nfs4 server:/home rw
24 22 0:41 / /scratch rw - lustre mds@tcp:/scratch rw
25 22 0:42 / /my\\040disk rw - xfs /dev/nvme0n1 rw
26 22 0:43 / /layer rw - overlay overlay rw
27 22 0:44 / /fuse rw - fuse.unheard-of thing rw
28 23 0:45 / /home/local rw - btrfs /dev/sdb rw
"""


def test_a_folder_that_works_is_left_as_it_was(tmp_path: Path) -> None:
    found = check_writing("output folder", tmp_path / "runs" / "new", remedy="another")
    assert (found.status, found.found) == (OK, f"{tmp_path}: write, fsync and rename work")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "runs", Path("/proc/runs")):
        found = check_writing("output folder", folder, remedy="another")
        assert found.status == FAIL, found
        assert "cannot make a folder" in found.found


def test_a_full_file_size_limit(tmp_path: Path) -> None:
    with soft_limit(resource.RLIMIT_FSIZE, 1000):
        found = check_writing("output folder", tmp_path, remedy="another")
        space = check_space("output space", tmp_path, {"adapter": 5e6, "checkpoints": 100.0}, remedy="another")
        unknown = check_space("output space", tmp_path, None, remedy="another")
    assert (found.status, found.found) == (FAIL, f"{tmp_path}: cannot write: File too large")
    assert (space.status, unknown.status) == (FAIL, WARN)
    assert "no file may exceed" in space.found
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "step"), [("fsync", "fsync"), ("replace", "rename")])
def test_a_file_system_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, step: str) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, name, refuse)
    found = check_writing("output folder", tmp_path, remedy="another")
    assert (found.status, found.found) == (FAIL, f"{tmp_path}: cannot {step}: Invalid argument")
    assert not list(tmp_path.iterdir())


def test_space(tmp_path: Path) -> None:
    fits = check_space("output space", tmp_path, {"adapter": 2e6, "checkpoints": 0.0}, remedy="another")
    assert fits.status == OK
    assert "2.0 MB needed (adapter 2.0 MB)" in fits.found
    too_much = check_space("output space", tmp_path, {"adapter": 2e6, "checkpoints": 1e18}, remedy="another")
    assert too_much.status == FAIL
    assert "checkpoints 1000000000.0 GB" in too_much.found
    status = os.statvfs(tmp_path)
    tight = status.f_bavail * status.f_frsize - 0.5e9
    assert check_space("output space", tmp_path, {"adapter": tight}, remedy="another").status == WARN


@pytest.mark.parametrize(
    ("folder", "nodes", "kind", "status"),
    [
        ("/home/me/runs", 4, "nfs4", OK), ("/scratch", 4, "lustre", OK), ("/home/local/runs", 4, "btrfs", WARN),
        ("/home/local/runs", 1, "btrfs", OK), ("/var/runs", 1, "ext4", OK), ("/my disk/runs", 2, "xfs", WARN),
        ("/layer/runs", 1, "overlay", WARN), ("/fuse/runs", 1, "fuse.unheard-of", OK),
        ("/fuse/runs", 2, "fuse.unheard-of", WARN),
    ],
)  # fmt: skip
def test_who_sees_a_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: str, nodes: int, kind: str, status: str
) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    assert file_system(Path(folder), mounts) == kind
    monkeypatch.setattr("taso_ds.doctor.folders.existing", lambda path: path)
    found = check_sharing("file system", Path(folder), nodes=nodes, mounts=mounts)
    assert found.status == status
    assert found.found.startswith(kind)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs Linux")
def test_memory_is_no_place_for_results() -> None:
    found = check_sharing("file system", Path("/dev/shm/runs"), nodes=1)
    assert (found.status, found.found.split(":")[0]) == (WARN, "tmpfs")


def test_existing(tmp_path: Path) -> None:
    assert existing(tmp_path / "a" / "b") == tmp_path
    assert existing(tmp_path) == tmp_path
