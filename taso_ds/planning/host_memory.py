"""The memory that a host can still give."""

from pathlib import Path

CGROUP, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available_host_bytes(cgroup: Path = CGROUP, own: Path = OWN_CGROUP) -> float:
    """Return what processes started now may use: the system's free memory, or what the least limit above leaves.

    A container has its limit at the top of what it sees; a job of Slurm has it in a cgroup further down.
    """
    import psutil

    rooms = [room for folder in _folders(cgroup, own) if (room := _room(folder)) is not None]
    return min([float(psutil.virtual_memory().available), *rooms])


def _folders(cgroup: Path, own: Path) -> list[Path]:
    """Return the cgroups of memory that this process is in, of versions 1 and 2, each with all above it."""
    found = [cgroup, cgroup / "memory"]
    for line in own.read_text().splitlines() if own.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            top = cgroup / controllers
            inner = [part for part in Path(path).parts if part not in ("/", "..")]
            found += [top.joinpath(*inner[:depth]) for depth in range(1, len(inner) + 1)]
    return found


def _room(folder: Path) -> float | None:
    """Return the rest of a cgroup's limit, page cache that can be dropped counted as free; None without a limit."""
    for limit_file, usage_file, cache_key in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        file = folder / limit_file
        if not file.is_file() or (text := file.read_text().strip()) == "max":
            continue
        entries = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        used = float((folder / usage_file).read_text()) - float(entries.get(cache_key, 0))
        return float(text) - used
    return None
