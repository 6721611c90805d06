"""Scores, as `evaluate` metrics that need no network.

`evaluate.load("accuracy")` downloads the metric's source from the Hub, which a compute node may not reach; the
same few numbers from scikit-learn and scipy are defined here as metrics of our own.
"""

import re
import tempfile
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import datasets
import evaluate
from scipy import stats
from sklearn import metrics as sk

from taso_ds.errors import UserError, nearest
from taso_ds.training.rouge import rouge_l


def compute_metrics(names: Sequence[str], predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
    """Return the named scores of predictions against references, in the order of `names`.

    Args:
        names: Keys of `METRICS`.
        predictions: Class indices, scores, or texts (exact_match; None for an answer that could not be read).
        references: The gold values, as many.

    Raises:
        UserError: A name is unknown or there is nothing to score.
    """
    for name in names:
        if name not in METRICS:
            raise UserError(f"unknown metric {name!r}{nearest(name, list(METRICS))}; known: {', '.join(METRICS)}")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    if not len(references):
        raise UserError("there is nothing to score: the evaluation data has no rows")
    scores: dict[str, float] = {}
    # Values stay in memory; even so `evaluate` makes an (empty) folder per metric in its cache. A private one, removed
    # afterwards, keeps the home folder clean and processes on one file system out of each other's way.
    with tempfile.TemporaryDirectory(prefix="taso_metrics_") as cache:
        for name in names:
            metric = METRICS[name](keep_in_memory=True, cache_dir=cache)
            values = {"predictions": metric.values(predictions), "references": metric.values(references)}
            scores |= metric.compute(**values)
    return scores


def final_number(text: str) -> str | None:
    """Return the answer of a GSM8K solution in canonical form, or None.

    It is the first number after "####", the mark of the data set (a model that rambles on may write a second
    mark); without a mark, the last number of the text. "1,800", "$1800" and "1800.00." all become "1800".
    """
    _, mark, answer = text.partition("####")
    numbers = _NUMBER.findall(answer if mark else text)
    return _canonical(numbers[0 if mark else -1]) if numbers else None


# A minus counts as a sign only directly before the number and not behind a digit, letter or bracket: neither
# "16-3" nor "16 - 3" holds -3.
_NUMBER = re.compile(r"(?:(?<![\w.)\]])[-−]\$?)?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")


def _canonical(number: str) -> str:
    sign = "-" if number[0] in "-−" else ""
    whole, _, fraction = re.sub(r"[^0-9.]", "", number).partition(".")
    digits = whole.lstrip("0") or "0"
    if fraction := fraction.rstrip("0"):
        digits += f".{fraction}"
    return digits if digits == "0" else sign + digits


class OfflineMetric(evaluate.Metric):
    """A metric with one score per call: a subclass names its type of value and computes."""

    value_type: ClassVar[str] = "int64"

    def _info(self) -> evaluate.MetricInfo:
        value = datasets.Value(self.value_type)
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description="predictions and references, one value each per row",
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def values(self, column: Sequence[Any]) -> list[Any]:
        """Return plain Python numbers: columns arrive as lists, arrays or tensors."""
        cast = float if self.value_type == "float64" else int
        return [cast(value) for value in column]


class Accuracy(OfflineMetric):
    """Share of equal labels."""

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(sk.accuracy_score(references, predictions))}


class F1(OfflineMetric):
    """Harmonic mean of precision and recall of label 1; 0.0 when label 1 is never right."""

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"f1": float(sk.f1_score(references, predictions, zero_division=0.0))}


class MatthewsCorrelation(OfflineMetric):
    """Correlation of two labellings; 0.0 when either is constant, as a constant guess knows nothing."""

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        if _is_constant(predictions) or _is_constant(references):
            return {"matthews_correlation": 0.0}
        return {"matthews_correlation": float(sk.matthews_corrcoef(references, predictions))}


class Pearson(OfflineMetric):
    """Linear correlation of scores; 0.0 when either side is constant."""

    value_type = "float64"

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        return {"pearson": _correlation(stats.pearsonr, predictions, references)}


class Spearman(OfflineMetric):
    """Correlation of ranks; 0.0 when either side is constant."""

    value_type = "float64"

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        return {"spearman": _correlation(stats.spearmanr, predictions, references)}


class ExactMatch(OfflineMetric):
    """Share of equal texts, blanks around them aside. An empty text, as of an unreadable answer, is never right."""

    value_type = "string"

    def values(self, column: Sequence[Any]) -> list[str]:
        return ["" if value is None else str(value).strip() for value in column]

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        pairs = list(zip(predictions, references, strict=True))
        return {"exact_match": sum(ours == gold != "" for ours, gold in pairs) / len(pairs)}


class RougeL(OfflineMetric):
    """Mean ROUGE-L of texts; 0.0 for one without words, as of an empty answer."""

    value_type = "string"

    def values(self, column: Sequence[Any]) -> list[str]:
        return ["" if value is None else str(value) for value in column]

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        scores = [rouge_l(ours, gold) for ours, gold in zip(predictions, references, strict=True)]
        return {"rouge": sum(scores) / len(scores)}


def _correlation(function: Any, predictions: list[float], references: list[float]) -> float:
    # A model that has not learnt yet may answer the same everywhere; the correlation is then 0/0, and a nan would
    # break the choice of the best checkpoint. Other nans (a diverged model's predictions) are let through.
    if _is_constant(predictions) or _is_constant(references):
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        return float(function(predictions, references).statistic)


def _is_constant(values: Sequence[float]) -> bool:
    return len(set(values)) <= 1


METRICS: dict[str, type[OfflineMetric]] = {
    "accuracy": Accuracy,
    "f1": F1,
    "matthews_correlation": MatthewsCorrelation,
    "pearson": Pearson,
    "spearman": Spearman,
    "exact_match": ExactMatch,
    "rouge": RougeL,
}
