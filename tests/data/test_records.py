"""Files, folders, saved data sets and the Hub: what is read, in which order, and what a reader is told."""

import gzip
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taso_ds.data.records import Records, build_examples, load_records, read_jsonl
from taso_ds.data.tasks import TASKS, get_task
from taso_ds.errors import UserError

SST2 = get_task("sst2")


def write(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_a_file_is_read_row_by_row(tmp_path: Path, name: str) -> None:
    rows = [{"text": "Kälte\u2028und Eis"}, {"text": "b", "label": 1}]
    assert read_jsonl(write(tmp_path / name, *rows)) == rows


texts = st.text(st.characters(exclude_categories=["Cs"]))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.dictionaries(texts, values, max_size=4), min_size=1, max_size=5),
    name=st.sampled_from(("rows.jsonl", "rows.jsonl.gz")),
    escaped=st.booleans(),
)
def test_any_rows_come_back(tmp_path: Path, rows: list[dict[str, Any]], name: str, escaped: bool) -> None:
    content = "".join(json.dumps(row, ensure_ascii=escaped) + "\n" for row in rows).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert read_jsonl(tmp_path / name) == rows


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_record_is_more_than_a_task_can_refuse(data: st.DataObject) -> None:
    """Every field a task may look at, with any value: an example comes of it, or a UserError."""
    fields = {name: data.draw(st.one_of(st.just("text"), values), label=name) for name in FIELDS}
    shown = {name: value for name, value in fields.items() if data.draw(st.booleans(), label=name)}
    for task in TASKS.values():
        try:
            task.build(shown)
        except UserError:
            continue


FIELDS = (
    *("prompt", "completion", "sentence", "sentence1", "sentence2", "word", "question", "passage", "answer", "label"),
    *("choices", "answerKey", "support", "correct_answer", "distractor1", "distractor2", "distractor3"),
)


def test_a_record_that_cannot_be_used_is_shown_in_part() -> None:
    for record in ({"prompt": ["many words"] * 999, "completion": "b"}, {f"field {n}": n for n in range(999)}):
        with pytest.raises(UserError) as info:
            get_task("completion").build(record)
        assert len(str(info.value)) < 300


def test_choices_without_as_many_labels_are_refused() -> None:
    record = {"question": "q", "answerKey": "B"}
    for choices in ({"text": ["x"], "label": ["A", "B"]}, {"text": 3, "label": ["B"]}, {"text": "ab", "label": "AB"}):
        with pytest.raises(UserError, match="as many labels as texts"):
            get_task("arc_easy").build(record | {"choices": choices})


def test_byte_order_mark_windows_line_ends_and_blank_end(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n\r\n')
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]


def test_files_put_one_behind_the_other_and_a_name_in_capitals(tmp_path: Path) -> None:
    path = tmp_path / "ROWS.JSONL"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n' * 2)
    assert read_jsonl(path) == [{"a": 1}, {"a": 1}]
    path = path.rename(tmp_path / "ROWS.JSONL.GZ")
    path.write_bytes(gzip.compress(b'{"a": 1}\n') * 2)
    assert read_jsonl(path) == [{"a": 1}, {"a": 1}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[\n  {"a": 1},\n', r"rows\.jsonl: is one JSON document over many lines; write one object a line"),
        (b'{\n  "a": 1\n}\n', r"rows\.jsonl: is one JSON document over many lines; write one object a line"),
        (gzip.compress(b'{"a": 1}\n', mtime=0), r"rows\.jsonl: is compressed: give it the name rows\.jsonl\.gz"),
        (b'{"a": 1}\n{"a": \n', r"rows\.jsonl:2: not valid JSON"),
        (b'{"a": 1}\n\n{"a": 2}\n', r"rows\.jsonl:2: the line is empty; delete it"),
        (b'{"a": 1}\n[1, 2]\n', r"rows\.jsonl:2: expected a JSON object with named fields, found \[1, 2\]"),
        (b"", "the file is empty"),
        (b" \n\n", "the file is empty"),
        (b'{"a": "\xe4"}\n', r"not UTF-8 text \(byte 7\)"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_jsonl(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_jsonl(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match=r"only \.jsonl and \.jsonl\.gz"):
        read_jsonl(tmp_path / "rows.csv")
    for name, content in {"plain": b'{"a": 1}\n', "short": gzip.compress(b'{"a": 1}\n' * 99)[:-12]}.items():
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            read_jsonl(path)


def test_the_file_goes_before_the_folder(tmp_path: Path) -> None:
    write(tmp_path / "sst2" / "train.jsonl", {"from": "folder"})
    file = write(tmp_path / "mine.jsonl", {"from": "file"})
    assert load_records(SST2, "train", data_dir=str(tmp_path), file=str(file)) == Records([{"from": "file"}], str(file))


def test_the_folder_of_the_task_goes_before_the_folder_itself(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", {"from": "top"})
    top = load_records(SST2, "train", data_dir=str(tmp_path), file=None)
    assert top == Records([{"from": "top"}], str(tmp_path / "train.jsonl"))
    path = write(tmp_path / "sst2" / "train.jsonl.gz", {"from": "task"})
    assert load_records(SST2, "train", data_dir=str(tmp_path), file=None).source == str(path)


def test_validation_falls_back_to_dev_then_test_and_says_so(tmp_path: Path) -> None:
    for name in ("test", "dev", "validation"):  # from the last choice to the first
        path = write(tmp_path / "arc_c" / f"{name}.jsonl", {"from": name})
        records = load_records(get_task("arc_challenge"), "validation", data_dir=str(tmp_path), file=None)
        assert records == Records([{"from": name}], str(path))


def test_train_never_falls_back(tmp_path: Path) -> None:
    write(tmp_path / "sst2" / "test.jsonl", {"a": 1})
    with pytest.raises(UserError, match=r"no train\.jsonl \(or \.gz\) for task sst2, .* holds test\.jsonl"):
        load_records(SST2, "train", data_dir=str(tmp_path), file=None)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_records(SST2, "train", data_dir=str(tmp_path / "absent"), file=None)


def test_saved_data_sets(tmp_path: Path) -> None:
    rows = {"train": [{"sentence": "a", "label": 1}], "validation": [{"sentence": "b", "label": 0}]}
    splits = {name: datasets.Dataset.from_list(part, split=name) for name, part in rows.items()}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "dict" / "sst2"))
    splits["train"].save_to_disk(str(tmp_path / "single"))
    for name, part in rows.items():
        assert load_records(SST2, name, data_dir=str(tmp_path / "dict"), file=None).rows == part
    single = load_records(SST2, "train", data_dir=str(tmp_path / "single"), file=None)
    assert (single.rows, single.source) == (rows["train"], f"{tmp_path / 'single'} (saved train split)")
    with pytest.raises(UserError, match=r"no validation\.jsonl"):  # not the training rows under another name
        load_records(SST2, "validation", data_dir=str(tmp_path / "single"), file=None)


def test_the_hub_is_asked_by_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(path: str, config: str | None, **options: Any) -> datasets.DatasetDict:
        asked.append((path, config, options))
        return datasets.DatasetDict({"test": datasets.Dataset.from_list([{"a": 1}])})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    records = load_records(get_task("gsm8k"), "validation", data_dir=None, file=None)
    assert asked == [("openai/gsm8k", "main", {})]
    assert records == Records([{"a": 1}], "Hugging Face Hub openai/gsm8k/main, test split")
    with pytest.raises(UserError, match="has no split train; it has test"):
        load_records(get_task("gsm8k"), "train", data_dir=None, file=None)


@pytest.mark.parametrize("error", [ConnectionError("no route\nmore"), RuntimeError("no route"), ValueError("no route")])
def test_a_hub_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"^cannot load nyu-mll/glue/sst2 .*no route.*--data_dir.*--train_file") as info:
        load_records(SST2, "train", data_dir=None, file=None)
    assert "\n" not in str(info.value)


def test_a_users_own_records_are_not_on_the_hub() -> None:
    with pytest.raises(UserError, match=r"task completion is not on the Hugging Face Hub: .*--train_file"):
        load_records(get_task("completion"), "train", data_dir=None, file=None)


def test_the_first_rows_say_so() -> None:
    records = Records([{"a": 1}, {"a": 2}, {"a": 3}], "x.jsonl")
    assert records.first(2) == Records([{"a": 1}, {"a": 2}], "x.jsonl (rows 0-1 of 3)", (1, 2))
    assert records.first(3) is records


def numbered(count: int) -> Records:
    return Records([{"a": number} for number in range(1, count + 1)], "x.jsonl")


@settings(max_examples=50, deadline=None)
@given(count=st.integers(2, 40), share=st.floats(0.01, 0.99), seed=st.integers(0, 2**32 - 1))
def test_held_out_rows_are_apart_and_follow_the_seed(count: int, share: float, seed: int) -> None:
    records, number = numbered(count), round(share * count)
    if number in (0, count):
        with pytest.raises(UserError, match=rf"^eval_fraction: .* of the {count} rows of x\.jsonl is {number} rows"):
            records.hold_out(share, seed=seed)
        return
    parts = records.hold_out(share, seed=seed)
    assert [len(part.rows) for part in parts] == [count - number, number]
    assert sorted([row["a"] for part in parts for row in part.rows]) == list(range(1, count + 1))
    for part in parts:
        assert part.places is not None
        assert part.places == tuple(row["a"] for row in part.rows) == tuple(sorted(part.places))
    assert parts == records.hold_out(share, seed=seed)


def test_held_out_rows_are_drawn_from_everywhere_and_said() -> None:
    train, held_out = numbered(240).hold_out(0.05, seed=0)
    assert held_out.source == "5 % of x.jsonl, 12 rows, seed 0"
    assert train.source == "x.jsonl without 12 rows that seed 0 holds out"
    assert held_out.places not in (tuple(range(1, 13)), tuple(range(229, 241)))
    assert held_out.places != numbered(240).hold_out(0.05, seed=1)[1].places


def test_a_row_keeps_its_place_whatever_part_it_is_in() -> None:
    _, held_out = numbered(20).hold_out(0.5, seed=0)
    places = held_out.first(3).places
    assert places is not None
    rows: list[Mapping[str, Any]] = [*[{"prompt": "a", "completion": "b"}] * 2, {"prompt": "a"}]
    with pytest.raises(UserError, match=rf"x\.jsonl.*\(rows 0-2 of 10\), row {places[2]}: task completion: missing"):
        build_examples(get_task("completion"), replace(held_out.first(3), rows=rows))
