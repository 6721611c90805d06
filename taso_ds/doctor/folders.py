"""Folders a job writes into: whether writing, syncing and renaming work there, how much fits, who else sees them."""

import os
import re
import resource
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

from taso_ds.doctor.finding import Finding, fail, ok, warn

GB = 1e9
_LITTLE = 1 * GB
_SHARED = {
    "nfs", "nfs4", "lustre", "gpfs", "beegfs", "cephfs", "ceph", "cifs", "smb3", "glusterfs", "fuse.glusterfs",
    "fuse.ceph", "fuse.sshfs", "fuse.juicefs", "fuse.gcsfuse", "wekafs", "panfs", "pvfs2", "orangefs", "afs",
}  # fmt: skip
_LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs"}
_TEMPORARY = {"tmpfs": "in memory", "ramfs": "in memory", "overlay": "in the container"}
MOUNTS = Path("/proc/self/mountinfo")


def existing(folder: Path) -> Path:
    """Return the folder, or the closest one above it that exists."""
    folder = folder.expanduser().absolute()
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def check_writing(name: str, folder: Path, *, remedy: str) -> Finding:
    """Write, sync and rename a file and a folder where ``folder`` is or would be made, as a run does."""
    place = existing(folder)
    probe = place / f".taso-doctor-{uuid.uuid4().hex}"
    step = "make a folder"
    try:
        probe.mkdir()
        step = "write"
        with (probe / "file.tmp").open("wb") as file:
            file.write(b"\0" * (1 << 16))
            file.flush()
            step = "fsync"
            os.fsync(file.fileno())
        step = "rename"
        os.replace(probe / "file.tmp", probe / "file")
        renamed = probe.with_name(f"{probe.name}.renamed")
        os.replace(probe, renamed)
        probe = renamed
        step = "fsync the folder"
        _sync_folder(probe)
    except OSError as error:
        return fail(name, f"{place}: cannot {step}: {error.strerror}", remedy)
    finally:
        shutil.rmtree(probe, ignore_errors=True)
    return ok(name, f"{place}: write, fsync and rename work")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_space(name: str, folder: Path, needed: Mapping[str, float] | None, *, remedy: str) -> Finding:
    """Compare free space, and the largest file this user may write, with what will be written.

    Args:
        needed: bytes by cause; None where nobody knows, then little space is all that can be said.
    """
    place = existing(folder)
    free = float(shutil.disk_usage(place).free)
    total, largest = (sum(needed.values()), max(needed.values())) if needed else (0.0, 0.0)
    causes = ", ".join(f"{cause} {_size(size)}" for cause, size in (needed or {}).items() if size)
    found = f"{place}: {_size(free)} free" + (f", {_size(total)} needed ({causes})" if needed else "")
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY and limit < max(largest, _LITTLE):
        severe = fail if limit < largest else warn
        return severe(name, f"{found}, but no file may exceed {_size(limit)}", "ulimit -f unlimited")
    if free < total or free == 0:
        return fail(name, found, remedy)
    return warn(name, found, remedy) if free - total < _LITTLE else ok(name, found)


def _size(number: float) -> str:
    unit, name = next(((unit, name) for unit, name in ((GB, "GB"), (1e6, "MB")) if number >= 0.1 * unit), (1e3, "kB"))
    return f"{number / unit:.1f} {name}"


def check_sharing(name: str, folder: Path, *, nodes: int, mounts: Path = MOUNTS) -> Finding:
    """Say what kind of file system holds a folder, and whether several nodes would see the same one."""
    place = existing(folder).resolve()
    kind = file_system(place, mounts)
    if kind in _SHARED:
        return ok(name, f"{kind}: a network file system, seen by every node that mounts it")
    remedy = "choose a folder on a network file system"
    if kind in _TEMPORARY:
        return warn(name, f"{kind}: {_TEMPORARY[kind]}, gone when that ends", "choose a folder on a disk")
    if nodes > 1:
        where = "on this node's disk" if kind in _LOCAL else "perhaps on this node only"
        return warn(name, f"{kind}: {where}, and the job has {nodes} nodes", remedy)
    return ok(name, f"{kind}: on this node's disk" if kind in _LOCAL else kind)


def file_system(place: Path, mounts: Path = MOUNTS) -> str:
    """Return the type of the file system a resolved path is on; the last of the deepest mounts is on top."""
    kind, depth = "unknown", -1
    for line in mounts.read_text(encoding="utf-8").splitlines() if mounts.exists() else ():
        mounted, _, described = line.partition(" - ")
        point = Path(re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), mounted.split()[4]))
        if place.is_relative_to(point) and len(point.parts) >= depth:
            kind, depth = described.split()[0], len(point.parts)
    return kind
