"""Limits of this login and of shared memory: small by default, and a job that meets them ends late and unclearly."""

import resource
import shutil
from pathlib import Path

from taso_ds.doctor.finding import Finding, fail, ok, warn

SHARED_MEMORY = Path("/dev/shm")
INFINIBAND = Path("/sys/class/infiniband")
# DeepSpeed's reductions between CPU ranks, per rank: two buffers of 1 and two of 32 MiB (csrc/cpu/comm/shm.cpp).
_HOST_BUFFER = 66 << 20
# NCCL's documentation asks containers for as much (--shm-size=1g).
_NCCL_SHARED = 1 << 30
# Every rank has connections to the others, the model's files, and what Python has loaded open at a time.
_FEW_FILES, _SOME_FILES = 256, 1024


def check_open_files(*, ranks: int) -> Finding:
    """Compare the limit of open files with a rank's libraries and its connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{_number(soft)} per process ({_number(hard)} with ulimit)"
    needed = _SOME_FILES + 2 * ranks
    remedy = f"ulimit -n {max(needed, 65536)}"
    if _below(soft, _FEW_FILES + 2 * ranks):
        return fail("open files", found, remedy)
    return warn("open files", found, remedy) if _below(soft, needed) else ok("open files", found)


def check_locked_memory(*, pinned: int, infiniband: Path = INFINIBAND) -> Finding:
    """Compare the limit of locked memory with offload's pinned buffers and with what InfiniBand registers.

    Args:
        pinned: bytes of a rank's buffers for offload to NVMe; 0 without.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    found = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft / 1e6:.1f} MB"
    remedy = "ulimit -l unlimited (containers: --ulimit memlock=-1)"
    if _below(soft, pinned):
        return warn("locked memory", f"{found}, offload to NVMe pins {pinned / 1e6:.0f} MB per rank", remedy)
    has_adapter = infiniband.is_dir() and any(infiniband.iterdir())
    if has_adapter and soft != resource.RLIM_INFINITY:
        return warn("locked memory", f"{found}, and this node has InfiniBand, which locks what it sends", remedy)
    return ok("locked memory", found)


def check_core_files() -> Finding:
    """A rank that crashes may leave its whole memory as a file."""
    soft, _ = resource.getrlimit(resource.RLIMIT_CORE)
    if soft == 0:
        return ok("core files", "off")
    found = "unlimited" if soft == resource.RLIM_INFINITY else f"up to {soft / 1e6:.0f} MB"
    return warn("core files", f"{found}: a crash may write each rank's memory to disk", "ulimit -c 0")


def check_shared_memory(*, ranks: int, is_host: bool, folder: Path = SHARED_MEMORY) -> Finding:
    """Compare shared memory with what the ranks of this node exchange through it.

    Args:
        ranks: of this node.
        is_host: whether they compute on the CPU.
    """
    remedy = "containers: --shm-size=1g or more; else remount /dev/shm larger, or remove what earlier jobs left there"
    if not folder.is_dir():
        return fail("shared memory", f"{folder} does not exist", remedy)
    free = shutil.disk_usage(folder).free
    needed = 0 if ranks < 2 else ranks * _HOST_BUFFER if is_host else _NCCL_SHARED
    found = f"{folder}: {free / 1e6:.0f} MB free"
    if needed:
        found += f", {ranks} ranks need {needed / 1e6:.0f} MB"
    if free >= needed:
        return ok("shared memory", found)
    return fail("shared memory", found, remedy) if is_host else warn("shared memory", found, remedy)


def _below(limit: int, needed: int) -> bool:
    return limit != resource.RLIM_INFINITY and limit < needed


def _number(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)
