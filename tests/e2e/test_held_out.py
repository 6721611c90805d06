"""A run on one file: rows are held out of it, answers are generated and compared, and evaluate finds the same rows."""

import json
from pathlib import Path

import pytest
from launching import Finished, call_main
from run_files import read_json
from sample_rows import write_rows

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("held_out")
    write_rows(path / "rows.jsonl", 12)
    write_rows(path / "others.jsonl", 5)
    return path


@pytest.fixture(scope="module")
def trained(desk: Path, llama_folder: Path) -> Finished:
    flags: list[str | Path] = [
        *("--model_name_or_path", llama_folder, "--task", "completion", "--train_file", desk / "rows.jsonl"),
        *("--eval_fraction", "0.25", "--eval_metric", "exact_match", "--seed", "3", "--max_new_tokens", "4"),
        *("--no_bf16", "--ds_config", "zero0.json", "--max_seq_length", "64", "--max_steps", "1"),
        *("--calibration_samples", "4", "--no_verify_export", "--output_dir", desk / "run"),
    ]
    return call_main("train", flags).succeeded()


def test_the_log_and_the_record_say_which_rows(trained: Finished, desk: Path) -> None:
    source = f"25 % of {desk / 'rows.jsonl'}, 3 rows, seed 3"
    assert f"evaluation: 3 rows from {source}" in trained.out + trained.err
    assert read_json(desk / "run" / "run.json")["data"]["evaluation"] == source


@pytest.mark.usefixtures("trained")
def test_the_headline_is_the_metric(desk: Path) -> None:
    results = read_json(desk / "run" / "results.json")
    assert results["headline"] == "exact_match"
    for scores in (results["before"], results["after"]):
        assert scores.keys() == {"loss", "exact_match", "num_examples"}


@pytest.mark.usefixtures("trained")
def test_evaluate_finds_the_same_rows_or_takes_others(desk: Path) -> None:
    after = read_json(desk / "run" / "results.json")["after"]
    again = json.loads(call_main("evaluate", ["--run", desk / "run"]).succeeded().lines[-1])
    assert {name: again[name] for name in after} == pytest.approx(after, rel=1e-5)
    flags: list[str | Path] = ["--run", desk / "run", "--eval_file", desk / "others.jsonl", "--eval_metric", "rouge"]
    others = json.loads(call_main("evaluate", flags).succeeded().lines[-1])
    assert (others["num_examples"], "rouge" in others) == (5, True)
