"""Every verb into every kind of folder: nothing that another verb, or somebody else, has made is lost."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from desks import Desk
from launching import Finished, call_main
from mistakes import assert_one_line, contents, unchanged
from other_process import holding
from run_files import read_json
from sample_rows import write_splits

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

STEPS = 2


FLAGS = (
    *("--ds_config", "zero0.json", "--max_steps", str(STEPS), "--calibration_samples", "4", "--no_verify_export"),
    *("--lr_scheduler_type", "constant"),
)


@pytest.fixture(scope="module")
def desk(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """Rows, a base and one run of every kind."""
    desk = Desk(tmp_path_factory.mktemp("folders"), llama_folder, FLAGS)
    write_splits(desk.path, 8, 4)
    for method, name in (("taso", "finished"), ("lora", "finished lora"), ("full", "finished full")):
        desk.call("train", name, "--method", method).succeeded()
    interrupt(shutil.copytree(desk.folder("finished"), desk.folder("interrupted")))
    shutil.copytree(desk.folder("finished"), desk.folder("merged"))
    call_main("export", ["--run", desk.folder("merged"), "--merge"]).succeeded()
    desk.call("calibrate", "calibrated").succeeded()
    return desk


def interrupt(run: Path) -> None:
    """Make of a finished run one that was killed after its last checkpoint."""
    (run / "results.json").unlink()
    shutil.rmtree(run / "adapter")


def write_cats(path: Path) -> None:
    path.mkdir()
    (path / "run.json").write_text('{"config": {"cat": 1}}')


def write_foreign(path: Path) -> None:
    (path / "model").mkdir(parents=True)
    for name in ("thesis.tex", "model/weights.bin", "results.json"):
        (path / name).write_text("years of work")


def write_killed(path: Path) -> None:
    path.mkdir()
    (path / ".lock").write_text("{")


# What lies in the folder: made by the desk, or by a function.
KINDS: dict[str, Callable[[Path], object]] = {
    **{
        name: lambda path, name=name: shutil.copytree(path.parent.parent / "runs" / name, path)  # type: ignore[misc]
        for name in ("finished", "interrupted", "finished lora", "finished full", "merged", "calibrated")
    },
    "empty": Path.mkdir,
    "killed before its record": write_killed,
    "foreign": write_foreign,
    "foreign run.json": write_cats,
    "base": lambda path: shutil.copytree(os.environ["TASO_TEST_BASE"], path),
    "file": lambda path: path.write_text("years of work"),
}

# verb: script and flags; {run} are those of a run, {folder} is the folder.
VERBS: dict[str, tuple[str, str]] = {
    "train": ("train", "{run} --output_dir {folder}"),
    "train lora": ("train", "{run} --output_dir {folder} --method lora"),
    "train full": ("train", "{run} --output_dir {folder} --method full"),
    "train anew": ("train", "{run} --output_dir {folder} --resume none"),
    "train otherwise": ("train", "{run} --output_dir {folder} --seed 3"),
    "calibrate": ("calibrate", "{run} --output_dir {folder}"),
    "calibrate anew": ("calibrate", "{run} --output_dir {folder} --resume none"),
    "dry run": ("train", "{run} --output_dir {folder} --dry_run"),
    "evaluate": ("evaluate", "--run {folder}"),
    "export": ("export", "--run {folder}"),
    "merge": ("export", "--run {folder} --merge"),
    "plan": ("plan", "{run} --json {folder}/results.json --plot {folder}/core_regions.png"),
    "slurm": ("slurm", "{run} --output_dir elsewhere --write {folder}/run.json"),
}
_EVERYTHING = "**"
# (verb, kind): what the verb may change, since it, or the same verb before it, has made it.
OWN: dict[tuple[str, str], tuple[str, ...]] = {
    ("train", "interrupted"): ("run.json", "metrics.jsonl", "log.txt"),
    ("train", "calibrated"): ("run.json", "log.txt"),
    ("train anew", "finished"): (_EVERYTHING,),
    ("train anew", "interrupted"): (_EVERYTHING,),
    ("calibrate anew", "calibrated"): (_EVERYTHING,),
    **{(verb, "killed before its record"): (".lock",) for verb in VERBS},
}


# Here nothing can be lost, and a whole run would begin: once with each program is enough.
_BEGINS = {("empty", verb) for verb in ("train lora", "train full", "train anew", "train otherwise", "calibrate anew")}
_BEGINS |= {("killed before its record", verb) for _, verb in _BEGINS}
CASES = [(verb, kind) for verb in VERBS for kind in KINDS if (kind, verb) not in _BEGINS]


def call(desk: Desk, verb: str, folder: Path) -> Finished:
    script, flags = VERBS[verb]
    words = [word.format(folder=folder) for word in flags.split() if word != "{run}"]
    return call_main(script, [*(desk.flags if "{run}" in flags else []), *words])


@pytest.fixture
def here(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, one below the desk."""
    monkeypatch.setenv("TASO_TEST_BASE", str(desk.base))
    here = desk.path / tmp_path.name
    here.mkdir()
    monkeypatch.chdir(here)
    return here


@pytest.mark.parametrize(("verb", "kind"), CASES)
def test_nothing_is_lost(desk: Desk, here: Path, verb: str, kind: str) -> None:
    folder = here / "folder"
    KINDS[kind](folder)
    before = contents(here)
    done = call(desk, verb, folder)
    after = contents(here)
    own = OWN.get((verb, kind), ())
    lost = [path for path, held in before.items() if path not in after or after[path] != held]
    assert own == (_EVERYTHING,) or {path.relative_to(folder).as_posix() for path in lost} <= {*own}
    if done.code:
        assert_one_line(done)
        assert after == before
    shutil.rmtree(here)


def test_what_goes_is_said(desk: Desk, here: Path) -> None:
    folder = here / "folder"
    shutil.copytree(desk.folder("merged"), folder)
    (folder / "thesis.tex").write_text("years of work")
    done = call_main("calibrate", [*desk.flags, "--output_dir", folder, "--overwrite_output_dir"]).succeeded()
    gone = "results.json, metrics.jsonl, calibration.jsonl, core_regions.safetensors, core_regions.png, adapter, model"
    assert f"output_dir: {folder}: removes {gone}, checkpoints, log.txt, run.json" in done.lines
    made = {"calibration.jsonl", "core_regions.safetensors", "core_regions.png", "log.txt", "run.json"}
    assert {path.name for path in folder.iterdir()} == {"thesis.tex", *made}
    again = call_main("calibrate", [*desk.flags, "--output_dir", folder]).succeeded()
    assert f"{folder} holds these core regions; --resume none scores again" in again.lines
    trained = call_main("train", [*desk.flags, "--output_dir", folder]).succeeded()
    assert not any(" removes " in line for line in trained.lines)
    assert adapter(folder) == adapter(desk.folder("finished")), "trained in the regions that were there"


@pytest.mark.parametrize("verb", ["train", "calibrate", "merge", "dry run"])
@pytest.mark.usefixtures("forbid_weights")
def test_a_folder_in_use_is_refused(desk: Desk, here: Path, verb: str) -> None:
    folder = here / "folder"
    shutil.copytree(desk.folder("finished"), folder)
    with holding(folder) as process:
        before = contents(here)
        assert_one_line(
            call(desk, verb, folder), f"{folder} is in use by process {process.pid} on ", "another --output"
        )
        assert contents(here) == before


@pytest.mark.usefixtures("forbid_weights")
def test_a_model_that_another_merge_has_just_written_is_kept(
    desk: Desk, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = here / "folder"
    shutil.copytree(desk.folder("finished"), folder)

    @contextmanager
    def waited_for_another(run: Path) -> Iterator[None]:
        (run / "model").mkdir()
        yield

    monkeypatch.setattr("taso_ds.runs.finished.locked", waited_for_another)
    assert_one_line(call(desk, "merge", folder), f"merge: {folder / 'model'} exists already")


# Going on -------------------------------------------------------------------------------------------------------------


def adapter(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def test_without_a_name_the_same_command_goes_on(desk: Desk, here: Path) -> None:
    runs = here / "runs"
    shutil.copytree(desk.folder("finished"), runs / "taso-completion")
    shutil.copytree(desk.folder("interrupted"), runs / "taso-completion-2")
    before = contents(runs / "taso-completion")
    assert "run folder: runs/taso-completion-2" in call_main("train", [*desk.flags, "--dry_run"]).lines
    done = call_main("train", desk.flags).succeeded()
    assert done.lines[-1] == "RUN runs/taso-completion-2"
    said = "output_dir: goes on in runs/taso-completion-2, the newest unfinished run of this configuration"
    assert said in done.lines
    assert adapter(runs / "taso-completion-2") == adapter(desk.folder("finished"))
    assert contents(runs / "taso-completion") == before
    third = call_main("train", [*desk.flags, "--dry_run"])
    assert "output_dir: runs/taso-completion-2 holds this run, finished" in third.lines
    assert "run folder: runs/taso-completion-3" in third.lines


def test_a_finished_run_is_extended(desk: Desk, here: Path) -> None:
    desk.call("train", "whole", "--max_steps", "4").succeeded()
    whole = desk.folder("whole")
    folder = here / "folder"
    shutil.copytree(desk.folder("finished"), folder)
    before = contents(folder)
    shorter = call_main("train", [*desk.flags, "--output_dir", folder, "--max_steps", "1"])
    assert_one_line(shorter, "max_steps: 1 steps are fewer than the 2 of the run", "step-00000002", "ask for more")
    other = call_main("train", [*desk.flags, "--output_dir", folder, "--max_steps", "4", "--seed", "3"])
    assert_one_line(other, "holds another run", "max_steps: 2 there, 4 here", "seed: 0 there, 3 here")
    assert contents(folder) == before
    done = call_main("train", [*desk.flags, "--output_dir", folder, "--max_steps", "4"]).succeeded()
    assert "resume: the same run with max_steps: 2 there, 4 here (changes its length)" in done.lines
    assert "resume: goes on after step 2" in done.out
    (line,) = [line for line in done.lines if line.startswith("extended: ")]
    peak = read_json(folder / "run.json")["learning_rates"][0]["peak"]
    assert line == (
        "extended: 4 steps in place of 2; the constant schedule is now that of 4 steps: learning rate"
        f" {peak:.3e} at step 3, {peak:.3e} at the last"
    )
    assert adapter(folder) == adapter(whole), "with a constant rate it is the longer run"
    assert read_json(folder / "results.json") == read_json(whole / "results.json")
    again = call_main("train", [*desk.flags, "--output_dir", folder, "--max_steps", "4"]).succeeded()
    assert "holds this run, finished" in again.out


def test_core_regions_serve_a_run_of_any_length_and_rate(desk: Desk, here: Path) -> None:
    """A folder of core regions does not depend on the loop, and one that was killed has no picture yet."""
    folder = here / "folder"
    shutil.copytree(desk.folder("calibrated"), folder)
    (folder / "core_regions.png").unlink()
    before = (folder / "core_regions.safetensors").read_bytes()
    loop = ["--max_steps", "1", "--learning_rate", "1e-3", "--weight_decay", "0.1"]
    again = desk.call("calibrate", "calibrated", *loop).succeeded()
    assert "holds these core regions" in again.out
    other = call_main("train", [*desk.flags, "--output_dir", folder, *loop, "--calibration_samples", "3"])
    assert_one_line(other, "holds core regions of other flags (calibration_samples: 4 there, 3 here", "choose another")
    done = call_main("train", [*desk.flags, "--output_dir", folder, *loop]).succeeded()
    assert f"core regions: read from {folder / 'core_regions.safetensors'}" in done.out
    assert (folder / "core_regions.safetensors").read_bytes() == before
    assert (folder / "core_regions.png").is_file()
    assert read_json(folder / "run.json")["steps"] == 1


def test_an_extension_that_was_killed_goes_on(desk: Desk, here: Path) -> None:
    """Its record says four steps; results and checkpoint are still those of two."""
    folder = here / "folder"
    shutil.copytree(desk.folder("finished"), folder)
    run = read_json(folder / "run.json")
    run["config"]["max_steps"] = run["steps"] = 4
    (folder / "run.json").write_text(json.dumps(run))
    done = call_main("train", [*desk.flags, "--output_dir", folder, "--max_steps", "4"]).succeeded()
    assert "resume: goes on after step 2" in done.out
    assert read_json(folder / "results.json")["steps"] == 4


def test_a_merged_model_keeps_a_run_as_long_as_it_is(desk: Desk, here: Path) -> None:
    folder = here / "folder"
    shutil.copytree(desk.folder("merged"), folder)
    with unchanged(folder):
        longer = call_main("train", [*desk.flags, "--output_dir", folder, "--max_steps", "4"])
    assert_one_line(longer, "holds model, which ", "launch/export.py made", "move that away")


# Another current folder -----------------------------------------------------------------------------------------------


def test_evaluate_finds_relative_paths_from_anywhere(desk: Desk, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk.path)
    relative = ["--train_file", "train.jsonl", "--eval_file", "eval.jsonl", "--output_dir", str(here / "run")]
    relative += ["--model_name_or_path", os.path.relpath(desk.base)]
    call_main("train", [*desk.flags, *relative]).succeeded()
    monkeypatch.chdir(here)
    found = json.loads(call_main("evaluate", ["--run", "run"]).succeeded().lines[-1])
    assert found["loss"] == pytest.approx(read_json(here / "run" / "results.json")["after"]["loss"], abs=1e-5)
    again = call_main("train", [*desk.flags, "--output_dir", "run"]).succeeded()  # the same paths, absolute
    assert "holds this run, finished" in again.out
