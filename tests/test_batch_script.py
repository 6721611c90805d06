"""Batch scripts from flags: the shipped ones are what taso-slurm writes, and shellcheck finds nothing in any."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from taso_ds.batch_script import batch_script, parse_job, write_script
from taso_ds.errors import UserError
from taso_ds.launch import slurm

SHIPPED = Path(__file__).resolve().parents[1] / "launch" / "slurm"
# What each shipped script was written with; write it again with --write after a change.
FLAGS = {
    "single_node.sbatch": "--partition gpu --output_dir runs/slurm",
    "multi_node.sbatch": "--nodes 2 --partition gpu --output_dir runs/slurm",
    "array.sbatch": "--partition gpu --job_name sweep --sweep_tasks rte mrpc --sweep_seeds 0 1",
}
SITE = [
    *("--nodes", "3", "--devices_per_node=2", "--no_gpus", "--cpus_per_device", "16", "--account", "project"),
    *("--time", "2-12", "--no_requeue", "--network_interface", "ib0", "--activate", "module load taso"),
    *("--container", "apptainer exec --nv taso.sif"),
    *("--output_dir", "runs/a", "--task", "gsm8k", "--no_bf16", "--max_steps", "100"),
]

SITE_SCRIPT = """\
#!/bin/bash
# 3 nodes with 2 devices: one process per device.
# Further flags go on to the program: sbatch THIS_FILE --max_steps 100
#SBATCH --job-name=taso
#SBATCH --account=project
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=16
#SBATCH --time=2-12
#SBATCH --signal=USR1@120
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --no-requeue

module load taso
set -euo pipefail
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"  # srun does not take it over by itself
export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

status=0
srun --wait=60 --mpi=none \\
    apptainer exec --nv taso.sif "${PROGRAM:-taso-train}" --expected_world_size 6 \\
    --output_dir runs/a --task gsm8k --no_bf16 --max_steps 100 "$@" || status=$?

exit "$status"
"""


def written(words: list[str]) -> str:
    job, _, flags = parse_job(words)
    return batch_script(job, flags)


def shellcheck(*scripts: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck: apt-get install shellcheck")
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", FLAGS)
def test_the_shipped_scripts_are_what_is_written(name: str) -> None:
    assert written(FLAGS[name].split()) == (SHIPPED / name).read_text(encoding="utf-8")


def test_every_shipped_script_is_tested() -> None:
    assert {path.name for path in SHIPPED.iterdir()} == {*FLAGS, "chain.sh"}


def test_a_site_with_its_own_ways() -> None:
    assert written(SITE) == SITE_SCRIPT


def test_the_plan_chooses_the_strategy(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["slurm", "--output_dir", "runs/a", "--model_name_or_path", str(llama_folder), "--max_seq_length", "64"]
    monkeypatch.setattr(sys, "argv", [*words, "--plan_for", "a100-80", "--nodes", "2"])
    slurm.main()
    assert "--expected_world_size 16 \\\n    --ds_config zero1.json --output_dir runs/a" in capsys.readouterr().out


@pytest.mark.parametrize("given", ["--ds_config zero2.json", "--gradient_checkpointing", "--load_in_8bit"])
def test_the_plan_keeps_what_is_given(
    given: str, llama_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["slurm", "--output_dir", "runs/a", "--model_name_or_path", str(llama_folder), "--max_seq_length", "64"]
    monkeypatch.setattr(sys, "argv", [*words, "--plan_for", "a100-80", *given.split()])
    slurm.main()
    script = capsys.readouterr().out
    assert script.count(given) == 1
    assert script.count("--ds_config") == 1
    assert "load_in_4bit" not in script


def test_shellcheck_finds_nothing(tmp_path: Path) -> None:
    site, quoted = tmp_path / "site.sbatch", tmp_path / "quoted.sbatch"
    site.write_text(SITE_SCRIPT)
    quoted.write_text(written(["--output_dir", "runs/it's mine", "--tokenizer_name", "a;b"]))
    shellcheck(*SHIPPED.iterdir(), site, quoted)


def test_each_job_of_a_chain_names_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script names some run folder of its own, and an evaluation refuses any but its run's."""
    sbatch, log = tmp_path / "sbatch", tmp_path / "log"
    sbatch.write_text(f'#!/bin/bash\necho "${{PROGRAM:-taso-train}} $*" >> {log}\necho 7\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    run = [*("bash", str(SHIPPED / "chain.sh"), "few.sbatch", "many.sbatch", "runs/chain"), "--task", "sst2"]
    assert subprocess.run(run, check=True, capture_output=True, text=True).stdout.startswith("queued: 7 calibrates")
    calibrate, train, evaluate = log.read_text().splitlines()
    assert calibrate.startswith("taso-calibrate ")
    assert "--output_dir runs/chain/regions --task sst2" in calibrate
    assert train.startswith("taso-train ")
    assert "--output_dir runs/chain/train --task sst2" in train
    assert evaluate.startswith("taso-evaluate ")
    assert evaluate.endswith("few.sbatch --run runs/chain/train --output_dir runs/chain/train")


def test_the_script_is_written_where_it_should_be(tmp_path: Path) -> None:
    job, _, flags = parse_job(["--output_dir", "runs/a", "--write", str(tmp_path / "new" / "job.sbatch")])
    text = batch_script(job, flags)
    assert write_script(text, job) == f"SCRIPT {tmp_path}/new/job.sbatch"
    assert (tmp_path / "new" / "job.sbatch").read_text() == text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--task gsm8k", "output_dir: name a run folder"),
        ("--output_dir a --learning_rat 1", "unknown flag '--learning_rat' .*'learning_rate'"),
        ("--output_dir a --learning_rate -1", "learning_rate: -1.0 is not positive"),
        ("--output_dir a --partitoin b", "unknown flag '--partitoin' .*'partition'"),
        ("--output_dir a --nodes 0", "nodes: 0 is not a positive number"),
        ("--output_dir a --time 1d", "time: '1d' is not a time limit"),
        ("--output_dir a --job_name $(x)", "job_name: .* is not a word"),
        ("--sweep_tasks rte", "pass both"),
        ("--sweep_tasks rte --sweep_seeds -1", "seed: -1 is not"),
        ("--sweep_tasks rte --sweep_seeds 0 0", "sweep_seeds: 0 0 names one twice"),
        ("--output_dir r --dry_run", "dry_run: the job would only print"),
        ("--output_dir r --expected_world_size 3", "expected_world_size: 3 is not 1 nodes × 8 devices = 8"),
        ("--output_dir r --global_batch_size 30", "global_batch_size: 30 is not a multiple"),
        ("--output_dir a --overwrite_output_dir", "a requeued job would begin there again"),
        ("--output_dir a --resume none", "a requeued job would begin there again"),
        ("--sweep_tasks rte --sweep_seeds 0 --seed=1", "seed: a job array decides it"),
        ("--sweep_tasks rte --sweep_seeds 0 --output-dir x", "output_dir: a job array decides it"),
    ],
)
def test_a_mistake_is_said_before_the_job_waits(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_job(words.split())
