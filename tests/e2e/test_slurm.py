"""Jobs under a real Slurm: the shipped batch scripts, on three nodes that are names for this machine.

Only what a site decides is given on sbatch's command line: the partition, one device per node, and where taso-train is.
The runs that they are compared with are plain ones on one node, forked for speed.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import slurm_cluster
import tiny_models
from forked import ForkServer
from launching import ROOT, call_main
from run_files import saved_tensors
from sample_rows import write_splits
from slurm_cluster import ENDED, Cluster, until

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slurm,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(slurm_cluster.missing()), reason=slurm_cluster.missing()),
]

SCRIPTS = ROOT / "launch" / "slurm"
ONE_DEVICE = ("--ntasks-per-node=1", "--gpus-per-node=1")
STEPS = 40  # long enough for a signal to arrive before the end


@dataclass(frozen=True)
class Desk:
    """Models, rows and a cluster; jobs are submitted in ``path``, where their logs appear."""

    path: Path
    cluster: Cluster
    server: ForkServer

    def flags(self, run: str | None, *more: str) -> list[str]:
        flags = [
            *("--model_name_or_path", str(self.path / "llama"), "--task", "completion", "--max_seq_length", "64"),
            *("--train_file", str(self.path / "train.jsonl"), "--eval_file", str(self.path / "eval.jsonl")),
            *("--max_steps", str(STEPS), "--calibration_samples", "12", "--learning_rate", "1e-2", "--no_bf16"),
            *("--per_device_train_batch_size", "2", "--global_batch_size", "12", "--calibration_batch_size", "2"),
            "--no_verify_export",
        ]
        return [*flags, *(() if run is None else ("--output_dir", str(self.path / run))), *more]

    def submit(self, script: str, nodes: int, run: str, *more: str) -> int:
        options = (*ONE_DEVICE, f"--nodes={nodes}", SCRIPTS / script)
        ranks = ("--expected_world_size", str(nodes))
        return self.cluster.submit(*options, *self.flags(run, *ranks, *more), cwd=self.path)

    def plain(self, run: str, ranks: int, *more: str) -> Path:
        """Train on this machine without Slurm."""
        answer = self.server.run(self.flags(run, *more), self.path / f"{run}.log", ranks=ranks)
        assert answer["codes"] == [0] * ranks
        return self.path / run

    def log(self, job: int) -> str:
        file = self.path / f"taso-{job}.out"
        # The ranks' progress bars may cut into one another's characters.
        return file.read_text(errors="replace") if file.exists() else "(it did not begin)"

    def ended(self, job: int, *, well: bool = True) -> str:
        """Wait for the job's end and return what it printed."""
        state, log = self.cluster.wait(job), self.log(job)
        assert (state == "COMPLETED") == well, f"{state}\n{log[-6000:]}"
        return log

    def losses(self, run: str) -> list[float]:
        lines = map(json.loads, (self.path / run / "metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if "loss" in line]

    def steps(self, run: str) -> int:
        metrics = self.path / run / "metrics.jsonl"
        return metrics.read_text().count('"loss"') if metrics.exists() else 0

    def wait_for_steps(self, job: int, run: str, number: int) -> None:
        until(lambda: self.steps(run) >= number or self.cluster.ended(job), f"{run} does not come to step {number}", 90)
        assert number <= self.steps(run) < STEPS, f"ended before it could be disturbed\n{self.log(job)[-6000:]}"


@pytest.fixture(scope="module")
def desk(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    path = tmp_path_factory.mktemp("slurm")
    tiny_models.save(tiny_models.llama(), path / "llama")
    write_splits(path, 21, 5)
    (path / "cluster").mkdir()
    # All nodes are this host, whose name may stand for the loopback address only.
    site = {"VENV": str(write_venv(path)), "GLOO_SOCKET_IFNAME": "lo"}
    with Cluster(path / "cluster", nodes=3, **site) as cluster:
        yield Desk(path, cluster, fork_server)


def write_venv(path: Path) -> Path:
    """Write what the scripts activate: this Python with the launch scripts of this checkout as commands."""
    commands = path / "venv" / "bin"
    commands.mkdir(parents=True)
    (commands / "activate").write_text(f'PATH="{commands}:{Path(sys.executable).parent}:$PATH"\n')
    for script in ("train", "calibrate", "evaluate"):
        command = commands / f"taso-{script}"
        command.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/launch/{script}.py "$@"\n')
        command.chmod(0o755)
    return path / "venv"


@pytest.fixture(scope="module")
def two_ranks(desk: Desk) -> Path:
    return desk.plain("plain-2", 2)


def test_a_signalled_job_is_requeued_and_ends_as_a_plain_run_does(desk: Desk, two_ranks: Path) -> None:
    job = desk.submit("multi_node.sbatch", 2, "requeued")
    desk.wait_for_steps(job, "requeued", 3)
    desk.cluster.ask("scancel", "--signal=USR1", str(job))
    log = desk.ended(job)
    assert desk.cluster.job(job)["Restarts"] == "1"
    assert log.count("stopped by SIGUSR1 after step ") == 1  # rank 0 alone speaks
    assert log.count("resume: goes on after step ") == 1
    assert f"RUN {desk.path / 'requeued'}" in log.splitlines()
    assert desk.steps("requeued") == STEPS
    assert saved_tensors(desk.path / "requeued") == saved_tensors(two_ranks)


@pytest.mark.slow
def test_three_nodes_end_as_a_plain_run_does(desk: Desk) -> None:
    few = ("--max_steps", "8")
    job = desk.submit("multi_node.sbatch", 3, "three", *few)
    plain = desk.plain("plain-3", 3, *few)
    desk.ended(job)
    assert saved_tensors(desk.path / "three") == saved_tensors(plain)


def test_fewer_nodes_than_expected_is_one_line(desk: Desk) -> None:
    job = desk.submit("multi_node.sbatch", 2, "fewer", "--expected_world_size", "16")
    log = desk.ended(job, well=False)
    assert desk.cluster.job(job)["ExitCode"] == "2:0", log
    (line,) = [line for line in log.splitlines() if line.startswith("error: ")]
    assert "expected_world_size: 16 ranks were asked for and 2 came" in line
    assert not (desk.path / "fewer").exists()


@pytest.mark.slow
def test_a_job_array_runs_each_task_and_seed(desk: Desk) -> None:
    options = (*ONE_DEVICE, "--array=0-1", SCRIPTS / "array.sbatch", "--expected_world_size", "1")
    first = desk.cluster.submit(*options, *desk.flags(None, "--max_steps", "3"), cwd=desk.path)
    until(lambda: desk.cluster.ended(first), "the array does not end", 120)
    runs = [desk.path / "runs" / "sweep" / f"rte-seed{seed}" for seed in (0, 1)]
    zero, one = map(saved_tensors, runs)
    assert zero, "".join(log.read_text()[-3000:] for log in desk.path.glob("sweep-*.out"))
    assert zero.keys() == one.keys()
    assert zero != one


@pytest.mark.slow
def test_a_chain_calibrates_trains_and_evaluates(desk: Desk) -> None:
    scripts = []
    for nodes in (1, 2):
        script = desk.path / f"nodes{nodes}.sbatch"
        call_main(
            "slurm", ["--nodes", str(nodes), *("--devices_per_node", "1", "--output_dir", "x", "--write", script)]
        )
        scripts.append(str(script))
    said = desk.cluster.ask(
        *("bash", str(SCRIPTS / "chain.sh"), *scripts, str(desk.path / "chain"), *desk.flags(None, "--max_steps", "3")),
        cwd=desk.path,
        SBATCH_PARTITION="batch",
    )
    *_, evaluate = jobs = [int(word) for word in said.replace(",", " ").split() if word.isdigit()]
    assert len(jobs) == 3
    log = desk.ended(evaluate)
    (scores,) = [json.loads(line) for line in log.splitlines() if line.startswith('{"run": ')]
    assert scores["run"] == str(desk.path / "chain" / "train")
    assert desk.steps("chain/train") == 3


def test_a_lost_node_ends_the_job_and_fewer_nodes_go_on(desk: Desk, two_ranks: Path) -> None:
    job = desk.submit("multi_node.sbatch", 3, "lost", "--save_steps", "2")
    desk.wait_for_steps(job, "lost", 4)
    desk.cluster.lose("node3")
    # Slurm queues it again, for three nodes, which there are not, unless it ended before the loss was noticed.
    until(lambda: desk.cluster.job(job)["JobState"] in (*ENDED, "PENDING"), "the job does not end", 90)
    assert "error: rank 2 on " in desk.log(job)
    assert desk.steps("lost") < STEPS
    if not desk.cluster.ended(job):
        desk.cluster.ask("scancel", str(job))
    again = desk.submit("multi_node.sbatch", 2, "lost", "--save_steps", "2")
    assert "resume: goes on after step " in desk.ended(again)
    whole, resumed = desk.losses(two_ranks.name), desk.losses("lost")
    assert len(resumed) == STEPS
    assert resumed == pytest.approx(whole, abs=1e-2)
