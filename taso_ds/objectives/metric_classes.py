"""The metrics by name. Each is a class of the ``evaluate`` library that needs no network.

``evaluate.load("accuracy")`` downloads the metric's source from the Hub, which a compute node may not reach. So the
same few numbers, from scikit-learn and scipy, are defined here as metrics of our own. Importing the libraries takes two
seconds: this module is loaded only when the first score is computed.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

import datasets
import evaluate
from scipy import stats
from sklearn import metrics as sk

from taso_ds.objectives.metrics import Answer
from taso_ds.objectives.rouge import rouge_l


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

    def values(self, column: Sequence[Answer]) -> Sequence[int | float | str]:
        """Return plain Python numbers, of numpy or torch too."""
        return [self._number(value) for value in column]

    def _number(self, value: Answer) -> int | float:
        assert value is not None, "only a text can be unreadable"
        return float(value) if self.value_type == "float64" else int(value)


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

    def values(self, column: Sequence[Answer]) -> list[str]:
        return ["" if value is None else str(value).strip() for value in column]

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        pairs = list(zip(predictions, references, strict=True))
        return {"exact_match": sum(ours == gold != "" for ours, gold in pairs) / len(pairs)}


class RougeL(OfflineMetric):
    """Mean ROUGE-L of texts; 0.0 for one without words, as of an empty answer."""

    value_type = "string"

    def values(self, column: Sequence[Answer]) -> list[str]:
        return ["" if value is None else str(value) for value in column]

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        scores = [rouge_l(ours, gold) for ours, gold in zip(predictions, references, strict=True)]
        return {"rouge": sum(scores) / len(scores)}


class _Correlation(Protocol):
    """What scipy returns."""

    statistic: float


def _correlation(
    function: Callable[[Sequence[float], Sequence[float]], _Correlation],
    predictions: list[float],
    references: list[float],
) -> float:
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
