"""ROUGE-L by hand, and the longest common subsequence against the table that defines it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taso_ds.objectives.rouge import longest_common, rouge_l

sequences = st.lists(st.sampled_from("abc"), max_size=70)  # more words than a machine word has bits


@settings(max_examples=100, deadline=None)
@given(first=sequences, second=sequences)
def test_the_longest_common_subsequence_is_that_of_the_table(first: list[str], second: list[str]) -> None:
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, one in enumerate(first):
        for j, other in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if one == other else max(table[i][j + 1], table[i + 1][j])
    assert longest_common(first, second) == table[-1][-1]


@pytest.mark.parametrize(
    ("ours", "gold", "score"),
    [
        # In common, in order: "the cat the mat" of 6 and 5 words. Case and punctuation do not count.
        ("The cat sat on the mat.", "the cat is the mat", 2 * 4 / (6 + 5)),
        ("это кот", "Это кот", 1.0),
        ("我是猫", "我是狗", 2 * 2 / (3 + 3)),
        ("42 yes", "yes 42", 2 * 1 / (2 + 2)),
        ("... !", "!", 0.0),
        ("", "", 0.0),
    ],
)
def test_scores_by_hand(ours: str, gold: str, score: float) -> None:
    assert rouge_l(ours, gold) == pytest.approx(score)
    assert rouge_l(gold, ours) == pytest.approx(score)
