"""Calibration rows come from the training split, drawn by the seed alone."""

from pathlib import Path

import pytest
import tiny_models
from configs import config_of
from sample_rows import write_rows

from taso_ds.config import RunConfig
from taso_ds.data.encode import EncodedRow, encode_completions
from taso_ds.data.task_data import load_task_data
from taso_ds.scoring.regions import calibration_rows


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """Flags of 40 training and 10 evaluation rows that no two share a text with."""
    train, evaluation = write_rows(tmp_path / "train.jsonl", 40), write_rows(tmp_path / "eval.jsonl", 10)
    return ["--train_file", str(train), "--eval_file", str(evaluation)]


def encoded(config: RunConfig) -> list[EncodedRow]:
    data = load_task_data(config.data, seed=config.run.seed)
    return encode_completions(
        tiny_models.byte_tokenizer(), data.train, max_seq_length=64, append_eos=True, source=data.train_source
    )


def drawn(config: RunConfig, rows: list[EncodedRow]) -> list[EncodedRow]:
    return calibration_rows(rows, number=config.calibration.calibration_samples, seed=config.run.seed)


def test_calibration_rows_are_training_rows(data: list[str]) -> None:
    config = config_of(*data, "--calibration_samples", "12")
    tokenizer, rows = tiny_models.byte_tokenizer(), encoded(config)
    chosen = drawn(config, rows)
    texts = [tokenizer.decode(row.input_ids, skip_special_tokens=True) for row in chosen]
    assert len(set(texts)) == len(chosen) == 12
    assert all(text.startswith("train ") for text in texts)
    positions = [rows.index(row) for row in chosen]
    assert positions == sorted(positions)  # in split order
    assert positions != list(range(12))  # but drawn from all of it


def test_calibration_rows_follow_the_seed_alone(data: list[str]) -> None:
    def chosen(*flags: str) -> list[int]:
        config = config_of(*data, "--calibration_samples", "12", *flags)
        rows = encoded(config)
        return [rows.index(row) for row in drawn(config, rows)]

    assert chosen() == chosen()
    assert chosen() == chosen("--learning_rate", "1")
    assert chosen() != chosen("--seed", "1")


def test_too_few_rows_are_all_taken(data: list[str]) -> None:
    config = config_of(*data, "--calibration_samples", "500")
    rows = encoded(config)
    assert drawn(config, rows) == rows
    assert len(rows) == 40
