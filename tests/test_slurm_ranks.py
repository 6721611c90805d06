"""Slurm's variables become the rank variables of torch.distributed; the values here are of Slurm 22.05."""

import socket

import pytest

from taso_ds import slurm_ranks
from taso_ds.errors import UserError

BATCH = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "5"}
TASK = BATCH | {
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_NODELIST": "localhost,n[7-8]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
}


def test_a_task_of_srun_is_a_rank() -> None:
    environment = TASK | {"SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2"}
    slurm_ranks.adopt_ranks(environment)
    slurm_ranks.adopt_meeting_point(environment)
    found = {name: environment[name] for name in sorted(environment.keys() - TASK.keys())}
    assert found == {
        "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(slurm_ranks.port_of(7, 1)),
        "RANK": "4", "WORLD_SIZE": "5",
    }  # fmt: skip


@pytest.mark.parametrize(
    "environment",
    [
        {},
        BATCH,  # a batch script's own process: it would wait for four others
        TASK | {"SLURM_STEP_NUM_TASKS": "1"},  # a shell of srun --pty
    ],
    ids=["no-slurm", "batch-script", "one-task"],
)
def test_what_is_alone_stays_alone(environment: dict[str, str]) -> None:
    before = dict(environment)
    slurm_ranks.adopt_ranks(environment)
    slurm_ranks.adopt_meeting_point(environment)
    assert environment == before


def test_what_torchrun_set_stays() -> None:
    ranked = {"RANK": "3", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "MASTER_ADDR": "here", "MASTER_PORT": "29500"}
    environment = TASK | ranked
    slurm_ranks.adopt_ranks(environment)
    slurm_ranks.adopt_meeting_point(environment)
    assert environment == TASK | ranked


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"), ("node[1-3,7]", "node1"), ("gpu-a[001-004],b1", "gpu-a001"), ("b,a[1-2]", "b"),
        ("gpu-[003-005,9]x,login", "gpu-003x"), ("rack[0-1]n[2-3]-ib", "rack0n2-ib"),
    ],
)  # fmt: skip
def test_first_host(nodes: str, first: str) -> None:
    assert slurm_ranks.first_host(nodes) == first


def test_tasks_per_node() -> None:
    assert slurm_ranks.tasks_per_node("8") == [8]
    assert slurm_ranks.tasks_per_node("2(x3),1") == [2, 2, 2, 1]


def test_ports_of_jobs_and_steps_that_may_share_a_host_differ() -> None:
    ports = {slurm_ranks.port_of(job, step) for job in range(4_000_000, 4_001_000) for step in range(16)}
    assert len(ports) == 16_000
    assert min(ports) >= 12_000
    assert max(ports) < 32_768  # where Linux begins to hand out ports by itself


def test_a_host_without_a_name_here_is_looked_up_in_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"n7.invalid": "NodeName=n7 NodeAddr=10.0.0.7 NodeHostName=n7 Port=6818\n"}
    monkeypatch.setattr(slurm_ranks, "_ask_slurm", lambda *question: answers.get(question[-1], ""))
    environment = {"RANK": "1", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n7.invalid"}
    slurm_ranks.adopt_meeting_point(environment)
    assert environment["MASTER_ADDR"] == "10.0.0.7"
    with pytest.raises(UserError, match=r"n8\.invalid, where rank 0 is, has no address here; set MASTER_ADDR"):
        slurm_ranks.adopt_meeting_point(
            {key: value for key, value in environment.items() if "MASTER" not in key}
            | {"SLURM_STEP_NODELIST": "n8.invalid"}
        )


def test_a_port_that_is_taken_is_said_by_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        monkeypatch.setattr(slurm_ranks, "port_of", lambda job, step: other.getsockname()[1])
        slurm_ranks.adopt_meeting_point(TASK | {"RANK": "1"})
        with pytest.raises(UserError, match=r"port \d+ of .* is taken .*; set MASTER_PORT"):
            slurm_ranks.adopt_meeting_point(TASK | {"RANK": "0"})
