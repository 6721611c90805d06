"""Scores by hand, the reading of GSM8K answers, and that nothing is fetched or left behind."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from taso_ds.errors import UserError
from taso_ds.objectives.metric_classes import METRICS
from taso_ds.objectives.metrics import compute_metrics, final_number

PREDICTIONS, REFERENCES = [0, 1, 1, 0, 1], [0, 1, 0, 0, 0]  # of label 1: 1 right, 2 wrong, 0 missed; 2 zeros right


def test_labels_by_hand() -> None:
    scores = compute_metrics(["accuracy", "f1", "matthews_correlation"], PREDICTIONS, REFERENCES)
    assert list(scores) == ["accuracy", "f1", "matthews_correlation"]
    assert scores["accuracy"] == pytest.approx(3 / 5)
    assert scores["f1"] == pytest.approx(2 * 1 / (2 * 1 + 2 + 0))  # 2 tp / (2 tp + fp + fn)
    # (tp tn - fp fn) / sqrt((tp+fp)(tp+fn)(tn+fp)(tn+fn)) = (1*2 - 2*0) / sqrt(3 * 1 * 4 * 2)
    assert scores["matthews_correlation"] == pytest.approx(2 / math.sqrt(24))


def test_correlations_by_hand() -> None:
    scores = compute_metrics(["pearson", "spearman"], [1.0, 2.0, 6.0], [0.0, 1.0, 2.0])
    # Deviations (-2, -1, 3) and (-1, 0, 1): 5 / sqrt(14 * 2); the ranks are the same.
    assert scores == {"pearson": pytest.approx(5 / math.sqrt(28)), "spearman": pytest.approx(1.0)}


def test_a_constant_guess_correlates_with_nothing() -> None:
    names = ["pearson", "spearman", "matthews_correlation", "f1"]
    assert compute_metrics(names, [0, 0, 0], [0, 1, 0]) == dict.fromkeys(names, 0.0)
    assert compute_metrics(names[:3], [0, 1, 0], [1, 1, 1]) == dict.fromkeys(names[:3], 0.0)


def test_a_diverged_model_is_not_hidden() -> None:
    assert math.isnan(compute_metrics(["pearson"], [1.0, math.nan, 2.0], [1.0, 2.0, 3.0])["pearson"])


def test_exact_match_of_texts() -> None:
    # Right: the same text, with blanks around. Wrong: another case, and what could not be read, whatever the gold.
    predictions = [" yes\n", "Yes", None, None, "no"]
    assert compute_metrics(["exact_match"], predictions, ["yes", "yes", "yes", "", "no"]) == {"exact_match": 2 / 5}


def test_rouge_is_the_mean_over_texts() -> None:
    assert compute_metrics(["rouge"], ["The cat", "a b", None, ""], ["the cat.", "b", "a", ""]) == {
        "rouge": pytest.approx((1 + 2 / 3) / 4)
    }


def test_arrays_and_tensors() -> None:
    predictions, references = cast("list[int]", np.array([1, 0])), cast("list[int]", torch.tensor([1, 1]))
    assert compute_metrics(["accuracy"], predictions, references) == {"accuracy": 0.5}


def test_what_cannot_be_scored() -> None:
    with pytest.raises(UserError, match=r"unknown metric 'acuracy' \(nearest: 'accuracy'\)"):
        compute_metrics(["acuracy"], [1], [1])
    with pytest.raises(UserError, match="the evaluation data has no rows"):
        compute_metrics(["accuracy"], [], [])
    with pytest.raises(ValueError, match="2 predictions for 1 references"):
        compute_metrics(["accuracy"], [1, 0], [1])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("9 * 2 = 18\n#### 18", "18"),
        ("#### 18\n\nQuestion: 5 + 5?\n#### 10", "18"),  # the model rambles on: its first answer counts
        ("#### $1,800.00", "1800"),
        ("She pays $1,800 in all.", "1800"),
        ("between 3 and 4.50.", "4.5"),
        ("18.0", "18"),
        ("007", "7"),
        ("109,200,000 miles", "109200000"),
        ("either 1,2", "2"),  # not a thousands separator
        ("-5", "-5"),
        ("it is -$5", "-5"),
        ("it is −5", "-5"),
        ("16-3", "3"),
        ("16 - 3", "3"),
        ("-0.0", "0"),
        ("a share of .5", "0.5"),
        ("0.05", "0.05"),
        ("100", "100"),
        ("50%", "50"),
        ("no answer", None),
        ("5 apples, so ####", None),
        ("", None),
    ],
)
def test_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == number


OFFLINE = """
import sys

def forbid(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise RuntimeError(f"the network was asked: {event} {arguments}")

sys.addaudithook(forbid)
from taso_ds.objectives.metric_classes import METRICS
from taso_ds.objectives.metrics import compute_metrics
texts = compute_metrics(["exact_match", "rouge"], ["a"], ["a"])
print(texts | compute_metrics([name for name in METRICS if name not in texts], [0, 1, 1], [0, 1, 1]))
"""


def test_no_network_no_files_no_collision(tmp_path: Path) -> None:
    """Two processes score at once, with the home and temporary folder to themselves, and leave both empty."""
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    home.mkdir()
    temporary.mkdir()
    unset = ("HF_HOME", "HF_HUB_OFFLINE", "XDG_CACHE_HOME", "HF_METRICS_CACHE", "HF_EVALUATE_CACHE")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"HOME": str(home), "TMPDIR": str(temporary)}
    processes = [
        subprocess.Popen([sys.executable, "-c", OFFLINE], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert output.strip() == str(dict.fromkeys(("exact_match", "rouge", *METRICS), 1.0))
    left = [path for folder in (home, temporary) for path in folder.rglob("*") if path.is_file()]
    assert left == []
    assert not list(home.rglob("metrics"))
