"""Records to examples: prompts, gold, options and what a wrong record is told."""

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from taso_ds.data.records import Records, build_examples, load_records
from taso_ds.data.tasks import TASKS, Example, get_task
from taso_ds.errors import UserError
from taso_ds.objectives.metric_classes import METRICS
from taso_ds.objectives.metrics import compute_metrics, final_number


def build(name: str, **record: Any) -> Example:
    return get_task(name).build(record)


def test_the_table_is_consistent() -> None:
    glue = ["rte", "mrpc", "sst2", "cola", "stsb", "qnli"]
    assert list(TASKS) == ["gsm8k", "boolq", "wic", "arc_challenge", "arc_easy", "sciq", *glue, "completion"]
    for name, task in TASKS.items():
        assert task.name == name
        assert task.kind in ("choice", "generation", "completion")
        assert set(task.metrics) <= set(METRICS)
        assert task.folders
        assert task.hub[0] or name == "completion"


def test_an_unknown_task_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown task 'gsm8' \(nearest: 'gsm8k'\)"):
        get_task("gsm8")


def test_gsm8k() -> None:
    example = build("gsm8k", question="How many?", answer="9 * 2 = 18\n#### 18")
    assert example == Example("Question: How many?\nAnswer:", " 9 * 2 = 18\n#### 18", (), "9 * 2 = 18\n#### 18")


@pytest.mark.parametrize(
    ("record", "prompt", "target"),
    [
        ({"question": "is it", "passage": "It is.", "answer": True}, "It is.\nQuestion: is it?\nAnswer:", 1),
        ({"question": "is it", "passage": "It is.", "label": 0}, "It is.\nQuestion: is it?\nAnswer:", 0),
        ({"question": "is it?", "label": 1}, "Question: is it?\nAnswer:", 1),
    ],
)
def test_boolq_in_hub_and_local_columns(record: dict[str, Any], prompt: str, target: int) -> None:
    example = get_task("boolq").build(record)
    assert (example.prompt, example.target) == (prompt, target)
    assert example.options == (" no", " yes")
    assert example.completion == example.options[target]


def test_arc_in_hub_and_local_columns() -> None:
    texts = ["ice", "fire", "mud"]
    local = build("arc_challenge", question="Hot?", choices=texts, label=1)
    lettered = {"text": texts, "label": ["A", "B", "C"]}
    numbered = {"text": texts, "label": ["1", "2", "3"]}
    assert local == build("arc_challenge", question="Hot?", choices=lettered, answerKey="B")
    assert local == build("arc_easy", question="Hot?", choices=numbered, answerKey="2")
    assert local.prompt == "Question: Hot?\nA. ice\nB. fire\nC. mud\nAnswer:"
    assert (local.completion, local.options, local.target) == (" B", (" A", " B", " C"), 1)


def test_sciq_gives_every_record_its_own_stable_order() -> None:
    def record(number: int) -> dict[str, str]:
        names = {"correct_answer": "gold", "distractor1": "x", "distractor2": "y", "distractor3": "z"}
        return {"question": f"Question {number}", "support": "", **names}

    examples = [build("sciq", **record(number)) for number in range(200)]
    assert examples == [build("sciq", **record(number)) for number in range(200)]
    for example in examples:
        assert f"{'ABCD'[int(example.target)]}. gold" in example.prompt
    # Each letter is gold in 200/4 = 50 records, standard deviation sqrt(200 * 1/4 * 3/4) = 6.1: 25 is four away.
    assert all(sum(example.target == index for example in examples) > 25 for index in range(4))


def test_sciq_support_is_read_first() -> None:
    texts = {"correct_answer": "a", "distractor1": "b", "distractor2": "c", "distractor3": "d"}
    assert build("sciq", question="Q?", support="S.", **texts).prompt.startswith("S.\nQuestion: Q?\nA. ")
    assert build("sciq", question="Q?", support="", **texts).prompt.startswith("Question: Q?\nA. ")


@pytest.mark.parametrize(
    ("name", "texts", "words"),
    [
        ("rte", ("sentence1", "sentence2"), (" True", " False")),
        ("mrpc", ("sentence1", "sentence2"), (" no", " yes")),
        ("sst2", ("sentence",), (" negative", " positive")),
        ("cola", ("sentence",), (" no", " yes")),
        ("qnli", ("question", "sentence"), (" yes", " no")),
    ],
)
def test_glue_words_follow_the_labels_of_the_hub(name: str, texts: tuple[str, ...], words: tuple[str, str]) -> None:
    record = {field: f"<{field}>" for field in texts}
    for label, word in enumerate(words):
        example = build(name, **record, label=label)
        assert (example.target, example.completion, example.options) == (label, word, words)
        assert example.texts == tuple(record.values())
        assert all(text in example.prompt for text in record.values())
        assert example.prompt.endswith("\nAnswer:")
    assert len(get_task(name).labels) == 2


def test_braces_in_a_text_are_text() -> None:
    assert build("sst2", sentence="{label} {0}", label=1).prompt.startswith("{label} {0}\n")


def test_wic_asks_for_the_word() -> None:
    example = build("wic", word="board", sentence1="Room and board .", sentence2="Nailed boards .", label=0)
    assert "'board'" in example.prompt
    assert (example.completion, example.options, example.texts) == (" no", (" no", " yes"), ())


# Half up, so that the words are as far apart as the scores: 2.5 -> 3 and 1.5 -> 2 (round() gives 2 and 2).
@pytest.mark.parametrize(("score", "word"), [(0.0, " 0"), (1.5, " 2"), (2.5, " 3"), (4.4, " 4"), (5, " 5")])
def test_stsb_rounds_for_the_decoder_and_keeps_the_score(score: float, word: str) -> None:
    example = build("stsb", sentence1="a", sentence2="b", label=score)
    assert (example.completion, example.target) == (word, float(score))
    assert example.options == (" 0", " 1", " 2", " 3", " 4", " 5")
    assert get_task("stsb").is_regression


def test_completion_takes_texts_as_written() -> None:
    example = build("completion", prompt="  def f():\n", completion="    return 1\n")
    assert (example.prompt, example.completion, example.target) == ("  def f():\n", "    return 1\n", "return 1")


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("rte", {"sentence1": "a", "text": "b"}, r"missing field\(s\) 'sentence2', 'label'; .* 'sentence1', 'text'"),
        ("gsm8k", {}, r"missing field\(s\) 'question', 'answer'; the record has no field"),
        ("arc_easy", {"question": "q", "choices": {"text": ["a"]}, "answerKey": "A"}, r"missing field\(s\) 'label'"),
        ("arc_easy", {"question": "q", "choices": ["a", "b"], "label": 2}, "from 0 to 1, found 2"),
        ("arc_easy", {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": ""},
         "found ''"),
        ("arc_easy", {"question": "q", "choices": ["a"], "label": 0}, "must hold 2 to 26 texts, found 1"),
        ("arc_easy", {"question": "q", "choices": "ab", "label": 0}, "must be a list"),
        ("sst2", {"sentence": "a", "label": -1}, "hidden test labels"),
        ("stsb", {"sentence1": "a", "sentence2": "b", "label": -1.0}, "hidden test labels"),
        ("stsb", {"sentence1": "a", "sentence2": "b", "label": float("nan")}, "from 0 to 5, found nan"),
        ("sst2", {"sentence": "a", "label": "positive"}, "integer from 0 to 1, found 'positive'"),
        ("sst2", {"sentence": 3, "label": 1}, "field 'sentence' must be text, found 3"),
        ("boolq", {"question": "q", "passage": None, "label": 1}, "field 'passage' must be text, found None"),
        ("completion", {"prompt": "a", "completion": 7}, "field 'completion' must be text"),
    ],
)  # fmt: skip
def test_a_record_that_does_not_fit(name: str, record: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        get_task(name).build(record)


def test_the_row_at_fault_is_named() -> None:
    rows: list[Mapping[str, Any]] = [{"sentence": "a", "label": 1}, {"sentence": "b"}]
    with pytest.raises(UserError, match=r"^mine\.jsonl, row 2: task sst2: missing field\(s\) 'label'; the record has"):
        build_examples(get_task("sst2"), Records(rows, "mine.jsonl"))


# Real data -----------------------------------------------------------------------------------------------

# Row counts as published by each data set's authors (ARC's validation: a copy of 294 of 299 rows).
COUNTS = {
    ("gsm8k", "train"): 7473, ("gsm8k", "test"): 1319, ("rte", "validation"): 277, ("mrpc", "train"): 3668,
    ("mrpc", "validation"): 408, ("sst2", "validation"): 872, ("cola", "validation"): 1043,
    ("stsb", "validation"): 1500, ("wic", "validation"): 638, ("boolq", "validation"): 3270,
    ("arc_challenge", "train"): 1119, ("arc_challenge", "validation"): 294, ("arc_challenge", "test"): 1172,
}  # fmt: skip


@pytest.mark.parametrize(("name", "split"), list(COUNTS))
def test_real_records_build(real_data: Path, name: str, split: str) -> None:
    task = get_task(name)
    records = load_records(task, split, data_dir=str(real_data), file=None)
    examples = build_examples(task, records)
    assert len(examples) == COUNTS[name, split]
    assert split in records.source
    for example in examples:
        assert example.prompt.endswith("Answer:")
        assert example.completion.startswith(" ")
        if task.kind == "choice":
            assert example.completion in example.options


def test_real_gold_scores_full_marks(real_data: Path) -> None:
    task = get_task("gsm8k")
    examples = build_examples(task, load_records(task, "test", data_dir=str(real_data), file=None))
    numbers = [final_number(str(example.target)) for example in examples]
    assert None not in numbers
    # Every number written the way a model might: the canonical form is the same.
    styled = [final_number(f"So the total is ${float(str(number)):,.2f}.") for number in numbers]
    assert compute_metrics(["exact_match"], styled, numbers) == {"exact_match": 1.0}


def test_real_boolq_without_passages(real_data: Path) -> None:
    path = real_data / "boolq" / "train_noctx.jsonl.gz"
    task = get_task("boolq")
    records = load_records(task, "train", data_dir=None, file=str(path))
    examples = build_examples(task, records)
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        labels = [json.loads(line)["label"] for line in stream]
    assert len(examples) == 9427
    assert [example.target for example in examples] == labels
    assert all(example.prompt.startswith("Question: ") and len(example.texts) == 1 for example in examples)
