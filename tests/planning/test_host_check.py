"""A host that is too small is refused; what it can give is the least that any limit leaves."""

from pathlib import Path

import pytest

from taso_ds.errors import UserError
from taso_ds.planning.host_check import check_host_memory
from taso_ds.planning.host_memory import available_host_bytes
from taso_ds.planning.numbers.memory import Usage


def test_too_small_a_host_is_refused_with_both_sizes() -> None:
    plan = {"load": Usage({}, {"checkpoint": 100e9}), "train": Usage({}, {"state": 1e9})}
    check_host_memory(plan, 100e9)
    with pytest.raises(UserError, match=r"load needs 100\.0 GB .* 99\.0 GB are available .*zero3\.json.*--force"):
        check_host_memory(plan, 99e9)


def limit(cgroup: Path, room: str, *, version: int = 2) -> None:
    """Write a cgroup of which 1.5 MB are used, and as much is cache that can be dropped."""
    cgroup.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    cache = "inactive_file" if version == 2 else "total_inactive_file"
    for name, text in zip(names, (room, "3000000"), strict=True):
        (cgroup / name).write_text(f"{text}\n")
    (cgroup / "memory.stat").write_text(f"anon 1000000\n{cache} 1500000\n")


def test_a_container_limit_counts(tmp_path: Path) -> None:
    limit(tmp_path, "5000000")
    assert available_host_bytes(tmp_path, tmp_path / "none") == 3_500_000
    limit(tmp_path, "max")
    assert available_host_bytes(tmp_path, tmp_path / "none") > 3_500_000


@pytest.mark.parametrize(
    ("version", "top", "line"), [(2, "", "0::/slurm/job_7/step_0"), (1, "memory", "5:memory:/slurm/job_7/step_0")]
)
def test_the_least_limit_of_a_jobs_cgroups_counts(tmp_path: Path, version: int, top: str, line: str) -> None:
    """Slurm's, for example, limits the job, and the step inside it has no limit of its own."""
    own = tmp_path / "own"
    own.write_text(f"7:cpuset:/other\n{line}\n")
    job = tmp_path / top / "slurm" / "job_7"
    limit(tmp_path / top, "9000000", version=version)
    limit(job, "6000000", version=version)
    limit(job / "step_0", "8000000", version=version)
    assert available_host_bytes(tmp_path, own) == 4_500_000


def test_a_cgroup_out_of_sight_is_none(tmp_path: Path) -> None:
    """In a container's own namespace the path may lead out of what is mounted."""
    own = tmp_path / "own"
    own.write_text("0::/../../elsewhere\n")
    limit(tmp_path, "5000000")
    assert available_host_bytes(tmp_path, own) == 3_500_000
