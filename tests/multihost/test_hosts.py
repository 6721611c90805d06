"""Two hosts with a network between them: launched as a user would, told apart, and cut off from one another."""

import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_models
from hosts import NAMES, Cluster, what_is_missing
from launching import ROOT, Finished, finish
from run_files import saved_tensors
from sample_rows import write_splits

MISSING = what_is_missing()
pytestmark = [
    pytest.mark.multihost,
    pytest.mark.timeout(600),
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
]

STEPS = 40
SCRIPT = str(ROOT / "launch" / "train.py")


@dataclass(frozen=True)
class Desk:
    cluster: Cluster

    def flags(self, folder: Path) -> list[str]:
        words = (
            "--task completion --train_file train.jsonl --eval_file eval.jsonl --max_eval_samples 4 --max_seq_length 64"
            f" --max_steps {STEPS} --save_steps 5 --calibration_samples 8 --global_batch_size 8 --learning_rate 1e-2"
            " --ds_config zero3.json --no_verify_export"
        )
        where = ["--model_name_or_path", str(self.cluster.local / "llama"), "--output_dir", str(folder)]
        return [*words.split(), *where]

    def deepspeed(self, folder: Path, *choice: str) -> list[str]:
        """Return the command that starts a run on both hosts, or those chosen, through pdsh and ssh."""
        launcher = ["-m", "deepspeed.launcher.runner", "--hostfile", "hostfile", *choice]
        return [sys.executable, *launcher, SCRIPT, *self.flags(folder)]

    def torchrun(self, folder: Path) -> list[Finished]:
        """Run on both hosts, each of which is told where the ranks meet."""
        words = "-m torch.distributed.run --nnodes 2 --nproc_per_node 1 --rdzv_backend c10d --rdzv_endpoint"
        command = [sys.executable, *words.split(), "node-a:29400", SCRIPT, *self.flags(folder)]
        started = [self.cluster.start(host, command) for host in NAMES]
        return [finish(process, timeout=200) for process in started]

    def plain(self, folder: Path, port: int) -> list[Finished]:
        """Run on both hosts without any launcher, which could end the ranks that a failed one leaves behind."""
        ranks = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "node-a"}
        command = [sys.executable, SCRIPT, *self.flags(folder)]
        started = [
            self.cluster.start(host, command, RANK=str(rank), MASTER_PORT=str(port), **ranks)
            for rank, host in enumerate(NAMES)
        ]
        return [finish(process, timeout=120) for process in started]


def steps(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}") and "loss" in line]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    with Cluster(tmp_path_factory.mktemp("hosts")) as cluster:
        tiny_models.save(tiny_models.llama(), cluster.disk("node-a") / "llama")
        shutil.copytree(cluster.disk("node-a") / "llama", cluster.disk("node-b") / "llama")
        write_splits(cluster.shared, 21, 5)
        (cluster.shared / "hostfile").write_text("".join(f"{name} slots=1\n" for name in NAMES))
        (cluster.shared / ".deepspeed_env").write_text(
            "".join(f"{key}={value}\n" for key, value in cluster.settings.items() if key != "PYTHONPATH")
        )
        yield Desk(cluster)


@pytest.fixture(scope="module")
def whole(desk: Desk) -> list[Finished]:
    """The uninterrupted run, under torchrun, its output on the hosts' own disks."""
    return [done.succeeded() for done in desk.torchrun(desk.cluster.local / "whole")]


def errors(text: str) -> list[str]:
    """Return the lines for the user; pdsh puts the host before each."""
    return re.findall(r"^(?:[\w-]+: )?(error: .*)$", text, re.MULTILINE)


def test_torchrun_meets_over_the_network_and_only_rank_0_needs_the_output(desk: Desk, whole: list[Finished]) -> None:
    line = f"output: {desk.cluster.local / 'whole'} is on node-a; not on node-b, which need not see it"
    assert [done.out.count(line) for done in whole] == [1, 0]
    run = desk.cluster.disk("node-a") / "whole"
    assert steps(run) == list(range(1, STEPS + 1))
    assert saved_tensors(run)
    assert not (desk.cluster.disk("node-b") / "whole").exists()


def test_a_cut_cable_ends_all_ranks_and_the_same_command_goes_on(desk: Desk, whole: list[Finished]) -> None:
    run = desk.cluster.shared / "cut"
    process = desk.cluster.start("node-a", desk.deepspeed(run))
    deadline = time.monotonic() + 200
    while not (done := steps(run)) or done[-1] < 12:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "training has not begun"
        time.sleep(0.01)
    desk.cluster.plug("node-b", connected=False)
    cut = time.monotonic()
    while any(desk.cluster.ranks(host, SCRIPT) for host in NAMES):
        assert time.monotonic() - cut < 60, "ranks still run a minute after the cable was cut"
        time.sleep(0.2)
    ended = finish(process, timeout=60 - (time.monotonic() - cut))
    assert ended.code != 0
    assert errors(ended.err) == ["error: rank 1 on node-b: no sign of life for 20 s"], ended.err
    desk.cluster.plug("node-b", connected=True)
    again = desk.cluster.run("node-a", desk.deepspeed(run), timeout=200).succeeded()
    assert "resume: goes on after step" in again.out
    assert f"output: {run} is shared by all 2 nodes" in again.out
    assert steps(run) == list(range(1, STEPS + 1))
    assert saved_tensors(run) == saved_tensors(desk.cluster.disk("node-a") / "whole")


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        (("--exclude", "node-b"), "error: expected_world_size: 2 ranks were asked for and 1 came"),
        (("--include", "node-b"), "error: environment: deepspeed was to use node-b and, as it is the only host, has"),
        (("--include", "node-b", "--force_multi"), "node-b: error: expected_world_size: 2 ranks were asked for"),
    ],
)
def test_hosts_can_be_chosen_and_missing_ones_are_said(desk: Desk, choice: tuple[str, ...], said: str) -> None:
    command = desk.deepspeed(desk.cluster.shared / "chosen", *choice)
    done = desk.cluster.run("node-a", [*command, "--expected_world_size", "2"], timeout=60)
    assert done.code != 0
    (line,) = [line for line in done.err.splitlines() if "error: " in line]
    assert line.startswith(said), line
    assert not (desk.cluster.shared / "chosen").exists()


def test_a_node_with_another_model_is_named(desk: Desk) -> None:
    weights = desk.cluster.disk("node-b") / "llama" / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    refused = desk.plain(desk.cluster.local / "other", 29501)
    weights.write_bytes(kept)
    folder = desk.cluster.local / "llama"
    line = f"error: model_name_or_path: node-b has another model.safetensors in {folder}; make it the same as on node-a"
    assert [errors(done.err) for done in refused] == [[line], []]
    assert [done.code for done in refused] == [2, 2]


def test_a_host_whose_name_is_a_loopback_address_is_told_what_to_do(desk: Desk) -> None:
    desk.cluster.write_etc_hosts("node-b", **{"node-b": "127.0.1.1"})
    refused = desk.plain(desk.cluster.local / "loopback", 29502)
    desk.cluster.write_etc_hosts("node-b")
    (line,) = errors(refused[0].err)
    assert line.startswith("error: rank 1 on node-b: environment: the host name node-b resolves to 127.0.1.1"), line
    assert "export GLOO_SOCKET_IFNAME=eth0 on every node" in line
    assert [done.code for done in refused] == [2, 2]
