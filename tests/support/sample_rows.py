"""Rows to learn from, made here and now."""

import json
from pathlib import Path

WORDS = ("sun", "moon", "rain", "snow")


def write_rows(path: Path, number: int) -> Path:
    """Write prompt/completion rows with a rule in them: the word that comes next. No two splits share a prompt."""
    rows = [
        {"prompt": f"{path.stem} {n} {WORDS[n % 4]}:", "completion": f" {WORDS[(n + 1) % 4]}"} for n in range(number)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_splits(folder: Path, train: int, evaluation: int) -> list[str]:
    """Write ``train.jsonl`` and ``eval.jsonl``; returns the flags that name them."""
    files = [write_rows(folder / f"{name}.jsonl", rows) for name, rows in (("train", train), ("eval", evaluation))]
    return ["--train_file", str(files[0]), "--eval_file", str(files[1])]


def write_sentences(path: Path, number: int) -> Path:
    """Write SST-2 rows: a sentence of one of two words is positive or negative."""
    rows = [{"sentence": f"{path.stem} {n} {('bad', 'good')[n % 2]}", "label": n % 2} for n in range(number)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
