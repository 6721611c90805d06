"""A run that was stopped goes on as if nothing had happened: the same losses and the same adapter, bit by bit.

All ranks are real processes running ``launch/train.py``'s ``main()``; they are forked, so that a run takes seconds.
``benchmarks/faults.py`` strikes at random; here every promise is tried once, on purpose.
"""

import json
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from forked import ForkServer
from other_process import holding
from run_files import read_lines, saved_tensors
from sample_rows import write_rows, write_sentences, write_splits

from taso_ds.training.checkpoint import checkpoint_name

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

STEPS = 6
_SIGNALS = {"signal": int(signal.SIGTERM), "all": False}
STEP = "taso_ds.training.trainer:Trainer.step"


@dataclass(frozen=True)
class Outcome:
    """What a started run left: exit codes, rank 0's messages, its folder."""

    codes: list[int]
    hung: bool
    log: Path
    run: Path

    @property
    def errors(self) -> list[str]:
        lines = (self.log / "rank0.err").read_text().splitlines()
        return [line for line in lines if line.startswith(("error: ", "stopped by "))]

    @property
    def said(self) -> str:
        return (self.log / "rank0.out").read_text()

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return read_lines(self.run / "metrics.jsonl")

    @property
    def losses(self) -> list[tuple[int, float, float]]:
        return [(line["step"], line["loss"], line["grad_norm"]) for line in self.metrics if "loss" in line]

    @property
    def trained(self) -> dict[str, bytes]:
        return saved_tensors(self.run)


@dataclass(frozen=True)
class Desk:
    path: Path
    server: ForkServer

    def start(self, name: str, *flags: str, ranks: int = 2, stop_at: int | None = None, **more: Any) -> Outcome:
        """Start the run ``name``, or start it again; ``stop_at`` sends SIGTERM to the last rank at that step."""
        argv = [
            *("--model_name_or_path", str(self.path / "llama"), "--task", "completion", "--max_seq_length", "64"),
            *("--train_file", str(self.path / "train.jsonl"), "--eval_file", str(self.path / "eval.jsonl")),
            *("--max_steps", str(STEPS), "--calibration_samples", "8", "--learning_rate", "1e-2"),
            *("--global_batch_size", "8", "--calibration_batch_size", "2", "--no_verify_export", "--ds_config"),
            *("zero3.json", "--output_dir", str(self.path / name), *flags),
        ]
        if stop_at is not None:
            more["faults"] = [{"rank": ranks - 1, "point": STEP, "call": stop_at, "when": "before", **_SIGNALS}]
        log = self.path / f"{name}.log"
        answer = self.server.run(argv, log, ranks=ranks, **more)
        return Outcome(answer["codes"], answer["hung"], log, self.path / name)

    def stopped(self, name: str, *flags: str, ranks: int = 2) -> Outcome:
        """A run that was asked to stop in its fourth step."""
        outcome = self.start(name, *flags, ranks=ranks, stop_at=4)
        assert outcome.codes == [75] * ranks, outcome.errors
        assert outcome.errors == ["stopped by SIGTERM after step 4; the same command goes on from there"]
        assert not (outcome.run / "results.json").exists()
        return outcome


@pytest.fixture(scope="module")
def desk(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    path = tmp_path_factory.mktemp("resume")
    tiny_models.save(tiny_models.llama(), path / "llama")
    tiny_models.save(tiny_models.bert(), path / "bert")
    write_splits(path, 21, 5)
    for name in ("sentences", "held_out"):
        write_sentences(path / f"{name}.jsonl", 21)
    return Desk(path, fork_server)


# The same ranks: bit by bit -------------------------------------------------------------------------------------------

WAYS = {
    "taso-zero0-bf16": ("--ds_config", "zero0.json"),
    "lora-zero2-bf16": ("--method", "lora", "--rank", "2", "--ds_config", "zero2.json"),
    "full-zero1-bf16": ("--method", "full", "--ds_config", "zero1.json", "--learning_rate", "1e-3"),
    # Dropout: random numbers, and a task head that is trained beside the adapter.
    "head-zero3-bf16": ("--model_name_or_path", "../bert", "--task", "sst2", "--train_file", "../sentences.jsonl",
                        "--eval_file", "../held_out.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_it_goes_on_bit_by_bit(desk: Desk, way: str) -> None:
    flags = WAYS[way]
    whole = desk.start(f"{way}-whole", *flags)
    assert whole.codes == [0, 0], whole.errors
    desk.stopped(way, *flags)
    resumed = desk.start(way, *flags)
    assert resumed.codes == [0, 0], resumed.errors
    assert "resume: goes on after step 4" in resumed.said
    assert resumed.losses == whole.losses
    assert len(resumed.losses) == STEPS
    assert resumed.trained == whole.trained
    before = [json.loads((outcome.run / "results.json").read_text())["before"] for outcome in (whole, resumed)]
    assert before[0] == before[1]


# Other ranks: the same global batches ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(desk: Desk) -> Outcome:
    """The uninterrupted run, in fp32."""
    outcome = desk.start("whole", "--no_bf16")
    assert outcome.codes == [0, 0], outcome.errors
    return outcome


@pytest.fixture(scope="module")
def stopped(desk: Desk) -> Outcome:
    """The same run, stopped in its fourth step."""
    return desk.stopped("stopped", "--no_bf16")


@pytest.mark.parametrize(
    ("ranks", "stage", "micro"),
    [
        (1, 0, 2), (2, 2, 2), (4, 3, 2), pytest.param(1, 3, 8, marks=pytest.mark.slow),
        pytest.param(4, 1, 1, marks=pytest.mark.slow),
    ],
    ids=str,
)  # fmt: skip
def test_on_other_ranks_and_stages_the_curve_is_the_same(
    desk: Desk, whole: Outcome, stopped: Outcome, ranks: int, stage: int, micro: int
) -> None:
    name = f"elastic-{ranks}-{stage}"
    shutil.copytree(stopped.run, desk.path / name)
    flags = ("--no_bf16", "--ds_config", f"zero{stage}.json", "--per_device_train_batch_size", str(micro))
    resumed = desk.start(name, *flags, ranks=ranks)
    assert resumed.codes == [0] * ranks, resumed.errors
    assert "resume: the same run with " in resumed.said or stage == 3
    assert [step for step, _, _ in resumed.losses] == list(range(1, STEPS + 1))
    for (_, loss, norm), (_, expected, expected_norm) in zip(resumed.losses, whole.losses, strict=True):
        assert loss == pytest.approx(expected, abs=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)


# What may go on, and what may not -------------------------------------------------------------------------------------


def test_a_finished_run_is_left_alone_and_can_be_run_anew(desk: Desk) -> None:
    first = desk.start("finished", ranks=1)
    assert first.codes == [0]
    results, trained = (first.run / "results.json").stat().st_mtime_ns, first.trained
    again = desk.start("finished", ranks=1)
    assert again.codes == [0]
    assert "holds this run, finished; --resume none runs it again" in again.said
    assert again.said.splitlines()[-1] == f"RUN {first.run}"
    assert (first.run / "results.json").stat().st_mtime_ns == results
    anew = desk.start("finished", "--resume", "none", ranks=1)
    assert (anew.codes, anew.trained) == ([0], trained)
    assert (anew.run / "results.json").stat().st_mtime_ns > results
    assert len(anew.losses) == STEPS


@pytest.fixture(scope="module")
def interrupted(desk: Desk) -> Outcome:
    """A run of one rank that was stopped."""
    return desk.stopped("interrupted", ranks=1)


@pytest.fixture(scope="module")
def alone(desk: Desk) -> Outcome:
    """The uninterrupted run of one rank."""
    return desk.start("alone", ranks=1)


def copy_of(desk: Desk, interrupted: Outcome, name: str) -> Path:
    return shutil.copytree(interrupted.run, desk.path / name)


def test_a_changed_configuration_is_refused_with_all_differences(desk: Desk, interrupted: Outcome) -> None:
    flags = ("--learning_rate", "2e-2", "--seed", "3", "--logging_steps", "2", "--ds_config", "zero2.json")
    refused = desk.start("interrupted", *flags, ranks=1)
    (line,) = refused.errors
    assert refused.codes == [2]
    for part in (
        "learning_rate: 0.01 there, 0.02 here (changes the run)",
        "seed: 0 there, 3 here (changes the run)",
        "logging_steps: 1 there, 2 here (harmless)",
        "ds_config: 'zero3.json' there, 'zero2.json' here (harmless)",
    ):
        assert part in line


def test_a_named_checkpoint_goes_on_in_another_folder(desk: Desk, interrupted: Outcome, alone: Outcome) -> None:
    checkpoint = interrupted.run / "checkpoints" / checkpoint_name(4)
    elsewhere = desk.start("elsewhere", "--resume", str(checkpoint), ranks=1)
    assert elsewhere.codes == [0], elsewhere.errors
    assert elsewhere.trained == alone.trained
    assert elsewhere.losses == alone.losses[4:], "the metrics of the steps before stay where they are"
    assert (elsewhere.run / "core_regions.safetensors").read_bytes() == (
        alone.run / "core_regions.safetensors"
    ).read_bytes()


def test_a_run_is_not_replaced_by_one_that_goes_on_from_elsewhere(
    desk: Desk, interrupted: Outcome, alone: Outcome
) -> None:
    refused = desk.start("alone", "--resume", str(interrupted.run), ranks=1)
    assert refused.codes == [2]
    assert "holds a run already" in refused.errors[0]
    assert (alone.run / "results.json").is_file()


def test_a_folder_in_use_is_refused_on_all_ranks(desk: Desk) -> None:
    with holding(desk.path / "used") as process:
        refused = desk.start("used")
        assert refused.codes == [2, 2]
        (line,) = refused.errors
        assert f"used is in use by process {process.pid} on " in line
        assert not (refused.log / "rank1.err").read_text()
        assert [path.name for path in refused.run.iterdir()] == [".lock"]


def test_a_signal_in_the_last_step_saves_and_leaves(desk: Desk, alone: Outcome) -> None:
    stopped = desk.start("late", ranks=1, stop_at=STEPS)
    assert stopped.codes == [75]
    assert stopped.errors == [f"stopped by SIGTERM after step {STEPS}; the same command goes on from there"]
    resumed = desk.start("late", ranks=1)
    assert (resumed.codes, resumed.trained, resumed.losses) == ([0], alone.trained, alone.losses)


def test_other_rows_or_another_base_are_refused(desk: Desk, interrupted: Outcome) -> None:
    changed = desk.path / "changed"
    shutil.copytree(desk.path / "llama", changed / "llama")
    for name, spoil, words in (
        ("rows", lambda: write_rows(desk.path / "train.jsonl", 20), "the training rows are not those"),
        ("base", lambda: tiny_models.save(tiny_models.llama(seed=5), desk.path / "llama"), "on other weights"),
    ):
        copy_of(desk, interrupted, name)
        spoil()
        refused = desk.start(name, ranks=1)
        write_rows(desk.path / "train.jsonl", 21)
        shutil.copytree(changed / "llama", desk.path / "llama", dirs_exist_ok=True)
        assert refused.codes == [2]
        assert words in refused.errors[0], refused.errors


def test_a_damaged_checkpoint_is_passed_over_and_said(desk: Desk, interrupted: Outcome, alone: Outcome) -> None:
    run = copy_of(desk, interrupted, "damaged")
    newest = run / "checkpoints" / checkpoint_name(4)
    (newest / "state.safetensors").write_bytes(b"\0" * (newest / "state.safetensors").stat().st_size)
    outcome = desk.start("damaged", ranks=1)
    assert outcome.codes == [0], outcome.errors
    messages = (outcome.log / "rank0.out").read_text() + (outcome.log / "rank0.err").read_text()
    assert f"skipped {newest}: state.safetensors is damaged" in messages
    assert "training starts at step 0" in messages
    assert outcome.trained == alone.trained
    assert len(outcome.losses) == STEPS


def test_a_full_disk_is_one_line_and_nothing_is_lost(desk: Desk) -> None:
    flags = ("--method", "full", "--save_steps", "2", "--learning_rate", "1e-3")
    full = desk.start("disk", *flags, ranks=1, file_size=300_000)  # a checkpoint takes 444 kB
    assert full.codes == [2]
    (line,) = full.errors
    assert "checkpoint: cannot write to" in line
    assert "free some space" in line
    assert not (full.run / "checkpoints" / "latest").exists()
    resumed = desk.start("disk", *flags, ranks=1)
    assert (resumed.codes, len(resumed.losses)) == ([0], STEPS)


# A rank that fails ends all -------------------------------------------------------------------------------------------


def test_an_error_on_one_rank_is_the_last_line_of_the_job(desk: Desk) -> None:
    fault = {"rank": 1, "point": STEP, "call": 3, "when": "before", "error": "the cat ate rank one"}
    outcome = desk.start("cat", faults=[fault], timeout=40)
    assert not outcome.hung
    assert all(code == 1 for code in outcome.codes)
    (line,) = outcome.errors
    assert line.startswith("error: rank 1 on ")
    assert "RuntimeError: the cat ate rank one: not foreseen, so a bug" in line
    (file,) = outcome.run.glob("traceback-*")
    assert file.name.endswith("-rank1.txt")
    assert f"traceback: {file}" in line
    assert "RuntimeError: the cat ate rank one" in file.read_text()
    assert not [rank for rank in range(2) if "Traceback" in (outcome.log / f"rank{rank}.err").read_text()]


def test_ctrl_c_saves_and_leaves(desk: Desk) -> None:
    """A terminal sends it to all ranks at once, and a launcher SIGTERM after it."""
    fault = {"rank": 0, "point": STEP, "call": 3, "when": "before", "all": True}
    faults = [fault | {"signal": int(signal.SIGINT)}, fault | {"signal": int(signal.SIGTERM), "when": "after"}]
    outcome = desk.start("ctrl-c", faults=faults)
    assert outcome.codes == [75, 75]
    assert outcome.errors == ["stopped by SIGINT after step 3; the same command goes on from there"]
    assert (outcome.run / "checkpoints" / checkpoint_name(3) / "COMPLETE").is_file()


@pytest.mark.parametrize("point", ["taso_ds.runs.train:open_job", "taso_ds.scoring.gradient_sum:GradientSum.add"])
def test_ctrl_c_before_training_leaves_at_once(desk: Desk, point: str) -> None:
    fault = {"rank": 0, "point": point, "call": 1, "when": "before", "all": True, "signal": int(signal.SIGINT)}
    outcome = desk.start(f"ctrl-c-{point[-3:]}", faults=[fault])
    assert outcome.codes == [75, 75]
    assert outcome.errors == ["stopped by SIGINT; the same command goes on from what is saved"]
    assert not outcome.run.exists()


def test_a_rank_that_stands_still_is_noticed(desk: Desk) -> None:
    fault = {"rank": 1, "point": STEP, "call": 3, "when": "before", "signal": int(signal.SIGSTOP), "all": False}
    outcome = desk.start("still", faults=[fault], timeout=60)
    assert not outcome.hung
    assert outcome.codes == [1, -9]
    assert "rank 1 on " in outcome.errors[-1]
    assert "no sign of life for 20 s" in outcome.errors[-1]


# Divergence -----------------------------------------------------------------------------------------------------------

LOSS = "taso_ds.training.divergence:LossWatch.problem"


def test_rollback_goes_back_and_brakes(desk: Desk) -> None:
    flags = ("--on_divergence", "rollback", "--save_steps", "2", "--lr_scheduler_type", "constant")
    fault = {"rank": 0, "point": LOSS, "call": 5, "returns": "is nan"}
    outcome = desk.start("rollback", *flags, ranks=1, faults=[fault])
    assert outcome.codes == [0], outcome.errors
    (line,) = [line for line in outcome.metrics if "rollback" in line]
    assert line == {"step": 4, "rollback": 1, "learning_rate_factor": 0.5}
    rates = {line["step"]: line["learning_rate"]["adapter"] for line in outcome.metrics if "loss" in line}
    assert len(rates) == STEPS
    assert rates[5] == pytest.approx(rates[4] / 2)
    assert "rollback 1: back to step 4, learning rates × 0.5" in (outcome.log / "rank0.out").read_text()


def test_rollbacks_are_bounded(desk: Desk) -> None:
    flags = ("--on_divergence", "rollback", "--max_rollbacks", "2", "--learning_rate", "1e30")
    outcome = desk.start("hopeless", *flags, ranks=1)
    assert outcome.codes == [2]
    assert "rollback 2: back to step 0" in (outcome.log / "rank0.out").read_text()
    assert "rollback 3" not in (outcome.log / "rank0.out").read_text()
    assert "loss" in outcome.errors[-1]
