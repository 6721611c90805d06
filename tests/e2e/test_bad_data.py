"""Mistakes in tasks and rows."""

from pathlib import Path

import pytest
from mistakes import NO_EVAL, Mistake, Mistakes, assert_refused

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

MISTAKES = Mistakes()
add = MISTAKES.add

ROW = '{"prompt": "a:", "completion": " b"}\n'


def add_rows(name: str, content: str, *words: str, flags: str = "") -> None:
    add(f"rows {name}", f"--train_file rows.jsonl {flags}", "rows.jsonl", *words, files={"rows.jsonl": content})


add("rows missing", "--train_file rows.jsonl", "rows.jsonl", "No such file")
add("rows in another format", "--train_file rows.csv", "rows.csv", ".jsonl", files={"rows.csv": "a,b"})
add_rows("none", "", "empty")
add_rows("blank", "\n\n", "empty")
add_rows("unparsable", ROW + "{\n", "rows.jsonl:2", "not valid JSON")
add_rows("no object", ROW + "[1]\n", "rows.jsonl:2", "JSON object")
add_rows("without fields", ROW + '{"prompt": "a"}\n', "row 2", "'completion'", "the record has 'prompt'")
add_rows("number for text", '{"prompt": "a", "completion": 5}\n', "row 1", "'completion' must be text", "5")
add_rows("hidden labels", '{"sentence": "a", "label": -1}\n', "row 1", "-1", "hidden", flags="--task sst2")
add_rows("bad label", '{"sentence": "a", "label": 2}\n', "row 1", "0 to 1", flags="--task sst2")
add_rows("empty completion", ROW + '{"prompt": "a", "completion": " "}\n', "row 2", "completion is empty")
add(
    "rows to evaluate on have an empty completion", "--eval_file rows.jsonl", "rows.jsonl, row 2",
    "completion is empty", files={"rows.jsonl": ROW + '{"prompt": "a", "completion": " "}\n'},
)  # fmt: skip
ONE_FILE = f"{NO_EVAL} --task completion --train_file train.jsonl"
add("no eval_file", ONE_FILE, "eval_file", "--eval_file", "--eval_fraction", alone=True)
for share in ("0.01", "0.99"):
    add(f"eval_fraction {share}", f"{ONE_FILE} --eval_fraction {share}", share, "8 rows of train.jsonl", alone=True)
for share in ("0", "1", "nan", "-0.5"):
    add(f"eval_fraction {share}", f"{ONE_FILE} --eval_fraction {share}", "eval_fraction", "between 0 and 1", alone=True)
add("eval_fraction and eval_file", "--eval_fraction 0.5", "eval_fraction", "--eval_file eval.jsonl", "drop one")
add("eval_metric unknown", "--eval_metric rogue", "eval_metric: 'rogue'", "exact_match", "nearest: 'rouge'")
add("no positions for answers", "--eval_metric rouge", "max_new_tokens: 256", "128 positions", "--max_seq_length")
add("eval_metric of another task", "--task sst2 --eval_metric rouge", "eval_metric: rouge", "--task completion", "sst2")
add("no task", NO_EVAL, "task", "--task", "completion", alone=True)
add("no data_dir", f"{NO_EVAL} --task rte --data_dir nowhere", "--data_dir nowhere", "no such folder", alone=True)
add("no split", f"{NO_EVAL} --task rte --data_dir .", ". holds eval.jsonl, ", "train.jsonl", alone=True)
add(
    "not on the Hub", f"{NO_EVAL} --task completion", "completion is not on the Hugging Face Hub", "--train_file",
    alone=True,
)  # fmt: skip
add("Hub offline", f"{NO_EVAL} --task rte", "nyu-mll/glue/rte", "--data_dir", alone=True)
add("not embedded", f"{NO_EVAL} --task cola --data_dir embedded", "'cola' is not embedded", "sst2", alone=True)
add("rows beside embedded ones", "--data_dir embedded --eval_file rows.jsonl", "rows.jsonl", "No such file")
add("no labels for a head", "--model_name_or_path {bert}", "completion has no labels", "--head lm")


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=list(MISTAKES))
def test_one_line_and_nothing_written(mistake: Mistake, desk: Path, request: pytest.FixtureRequest) -> None:
    assert_refused(mistake, desk, request)
