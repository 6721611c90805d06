"""Mistakes in folders: of a run to make, and of one that has finished."""

import os
from pathlib import Path

import pytest
from launching import call_main
from mistakes import GOOD, NO_EVAL, REGIONS, Mistake, Mistakes, assert_one_line, assert_refused

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

MISTAKES = Mistakes()
add = MISTAKES.add

add("output_dir is a file", "--output_dir train.jsonl", "output_dir", "train.jsonl is a file")
add("output_dir under a file", "--output_dir train.jsonl/run", "output_dir", "train.jsonl is not a writable folder")
add("output_dir in use", "--output_dir .", "output_dir", "holds no run", "--overwrite_output_dir")
add(
    "output_dir with another run",
    "--train_file {runs}/train.jsonl --eval_file {runs}/eval.jsonl --max_steps 1 --output_dir {runs}/taso --seed 5",
    "output_dir", "seed: 0 there, 5 here", "--overwrite_output_dir",
)  # fmt: skip
add(
    "output_dir is the model", "--model_name_or_path {models}/whole --output_dir {models}/whole", "output_dir",
    "the base",
)  # fmt: skip
add(
    "output_dir is the model, by force",
    "--model_name_or_path {models}/whole --output_dir {models}/whole --overwrite_output_dir",
    *("output_dir", "is where the base", "choose another --output_dir"),
)
add(
    "output_dir is the run whose model is the base",
    "--model_name_or_path {models}/run/model --output_dir {models}/run --overwrite_output_dir",
    *("output_dir", "is where the base", "choose another --output_dir"),
)
add("output_dir with a broken run", "--output_dir {runs}/broken", "run.json", "not a readable run")
add("dry run without target", "--dry_run --target_modules q_prj", "target_modules", "nearest: 'q_proj'")
add("dry run without regions", f"--dry_run {REGIONS}none.safetensors", "none.safetensors", "no such file")
add("calibrate into a file", "--output_dir train.jsonl", "output_dir", "train.jsonl is a file", script="calibrate")

# Finished runs --------------------------------------------------------------------------------------------------------

for script in ("evaluate", "export"):
    for name, word in (("none", "No such file"), ("broken", "not a readable run"), ("empty", "has no config")):
        add(f"{script} {name}", f"--run {{runs}}/{name}", "run.json", word, script=script, alone=True)
    add(f"{script} without adapter", "--run {runs}/regions", "does not exist", "adapter", script=script, alone=True)
    add(
        f"{script} truncated adapter", "--run {runs}/truncated", "truncated/adapter/taso_adapter.safetensors",
        "not a readable safetensors file", script=script, alone=True,
    )  # fmt: skip
    add(
        f"{script} on another base", "--run {runs}/taso --model_name_or_path {gpt2}", "model.layers.0.self_attn.q_proj",
        "this base does not have", script=script, alone=True,
    )  # fmt: skip
add("export nothing", NO_EVAL + " --task completion", "--run FOLDER", script="export", alone=True)
add("unknown flag of evaluate", "--run {runs}/taso --lr 1", "'--lr'", "--help", script="evaluate", alone=True)


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=list(MISTAKES))
def test_one_line_and_nothing_written(mistake: Mistake, desk: Path, request: pytest.FixtureRequest) -> None:
    assert_refused(mistake, desk, request)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(llama_folder: Path, desk: Path, forbid_weights: None) -> None:
    (desk / "locked").mkdir(mode=0o500)
    flags = [*GOOD.format(llama=llama_folder).split(), "--output_dir", "locked/run"]
    assert_one_line(call_main("train", flags), "output_dir", "locked is not a writable folder")
