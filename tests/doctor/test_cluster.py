"""Slurm's variables, and hosts that do not resolve, do not let anyone in, or work."""

import os
from pathlib import Path

import pytest
from faked import script

from taso_ds.doctor.cluster import check_hosts, check_slurm, slurm_nodes
from taso_ds.doctor.finding import FAIL, OK, WARN, Finding


@pytest.mark.parametrize(
    ("nodes", "tasks", "status"), [(None, None, OK), (4, 4, OK), (4, None, OK), (4, 32, WARN), (4, 1, WARN)]
)
def test_slurm(monkeypatch: pytest.MonkeyPatch, nodes: int | None, tasks: int | None, status: str) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    if nodes is not None:
        monkeypatch.setenv("SLURM_JOB_ID", "17")
        monkeypatch.setenv("SLURM_JOB_NUM_NODES", str(nodes))
    if tasks is not None:
        monkeypatch.setenv("SLURM_NTASKS", str(tasks))
    assert slurm_nodes() == (nodes or 1)
    found = check_slurm()
    assert found.status == status
    assert nodes is None or f"job 17: {nodes} nodes" in found.found


@pytest.fixture
def bin_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """All commands a check can find; sh itself is named by its path."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def by_check(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


def test_hosts_that_work(bin_folder: Path) -> None:
    script(bin_folder / "ssh", 'case "$*" in *BatchMode=yes*" 127.0.0."?" true") exit 0;; esac; exit 1')
    script(bin_folder / "pdsh", "exit 0")
    found = by_check(check_hosts({"127.0.0.1": 8, "127.0.0.2": 8}))
    assert list(found) == ["hostfile", "pdsh", "hosts resolve", "ssh"]
    assert {finding.status for finding in found.values()} == {OK}
    assert found["hostfile"].found == "2 hosts with 8 slots"


def test_a_host_that_does_not_resolve(bin_folder: Path) -> None:
    script(bin_folder / "ssh", "exit 0")
    found = by_check(check_hosts({"127.0.0.1": 8, "no-such-node.invalid": 4}))
    assert found["hostfile"].status == WARN  # unequal slots
    assert found["pdsh"].status == FAIL
    assert found["hosts resolve"].status == FAIL
    assert found["hosts resolve"].found.startswith("1 of 2 fail: no-such-node.invalid (")
    assert (found["ssh"].status, found["ssh"].found) == (OK, "all 1 hosts")


def test_a_host_that_lets_nobody_in(bin_folder: Path) -> None:
    script(
        bin_folder / "ssh", "echo 'Warning: Permanently added' >&2; echo 'Permission denied (publickey).' >&2; exit 255"
    )
    found = by_check(check_hosts({"127.0.0.1": 8}))
    assert "pdsh" not in found  # one node is started without it
    assert found["ssh"].status == FAIL
    assert found["ssh"].found == "1 of 1 fail: 127.0.0.1 (Permission denied (publickey).)"


@pytest.mark.usefixtures("bin_folder")
def test_without_ssh() -> None:
    found = by_check(check_hosts({"127.0.0.1": 8}))
    assert (found["ssh"].status, found["ssh"].found) == (FAIL, "no ssh in PATH")


def test_many_bad_hosts_are_counted(bin_folder: Path) -> None:
    script(bin_folder / "ssh", "exit 3")
    found = by_check(check_hosts({f"127.0.0.{number}": 1 for number in range(1, 10)}))
    assert found["ssh"].found.startswith("9 of 9 fail: 127.0.0.1 (exit code 3), ")
    assert found["ssh"].found.endswith("and 5 more")
