"""Scores of predictions by the names of metrics. The metrics themselves are in ``metric_classes``."""

import re
import tempfile
from collections.abc import Sequence

from taso_ds.errors import UserError, nearest

Answer = int | float | str | None  # a class, a score or a text; None where none could be read


def compute_metrics(
    names: Sequence[str], predictions: Sequence[Answer], references: Sequence[Answer]
) -> dict[str, float]:
    """Return the scores of predictions against references, in the order of ``names``.

    Args:
        names: keys of ``METRICS``.
        predictions: class indices, scores or texts; None for a text that could not be read.
        references: the gold values, as many.

    Raises:
        UserError: a name is unknown, or there is nothing to score.
    """
    from taso_ds.objectives.metric_classes import METRICS

    for name in names:
        if name not in METRICS:
            raise UserError(f"unknown metric {name!r}{nearest(name, list(METRICS))}; known: {', '.join(METRICS)}")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    if not len(references):
        raise UserError("there is nothing to score: the evaluation data has no rows")
    scores: dict[str, float] = {}
    # Values stay in memory. Even so ``evaluate`` makes an (empty) folder per metric in its cache. A private cache keeps
    # the home folder clean, and processes on one file system out of each other's way.
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
