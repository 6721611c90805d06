"""ROUGE-L: the F1 of the longest common subsequence of two texts' words, in lower case.

With c common words, precision is c / |ours| and recall c / |gold|, so that F1 = 2c / (|ours| + |gold|). The package
``rouge_score`` takes words of ASCII letters only: Russian or Chinese would always score 0. Hence these few lines.
"""

import re
from collections.abc import Sequence

_CHARACTERS = r"\u3040-\u30ff\u3400-\u9fff"  # kana and Han: scripts without blanks between words
_WORD = re.compile(rf"[{_CHARACTERS}]|[^\W_{_CHARACTERS}]+")


def rouge_l(ours: str, gold: str) -> float:
    """Return ROUGE-L of two texts, in [0, 1]; a word is a run of letters and digits, or one character of Chinese."""
    first, second = _WORD.findall(ours.lower()), _WORD.findall(gold.lower())
    common = longest_common(first, second)
    return 2 * common / (len(first) + len(second)) if common else 0.0


def longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, a row of the table at a time as the bits of a number.

    A zero bit marks a column where the length grows (Hyyrö 2004): a sum of numbers in place of a loop over columns.
    """
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    full = (1 << len(first)) - 1
    row = full
    for word in second:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(first) - row.bit_count()
