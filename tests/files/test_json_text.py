"""What a strict reader of JSON takes and what it refuses, each in one line."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taso_ds.errors import UserError
from taso_ds.files.json_text import parse_json

texts = st.text(st.characters(exclude_categories=["Cs"]))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(values, st.booleans())
def test_what_python_writes_is_read(value: Any, escaped: bool) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=escaped), "x") == value


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from('{}[]",:0123456789.eE+-tfnul\\ \n')))
def test_any_text_is_read_as_python_reads_it_or_refused(text: str) -> None:
    try:
        value = parse_json(text, "x")
    except UserError:
        return
    assert value == json.loads(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,}', r"^x: not valid JSON: column \d+: "),
        ('{\n"a": }', "^x: not valid JSON: line 2, column 6: "),
        ('[{"a": 1, "b": 2, "a": 3}]', "^x: has the key 'a' twice in one object$"),
        ("[-Infinity]", "^x: holds -Infinity, which is not JSON$"),
        ('"\\ud800"', "^x: holds half a surrogate pair"),
        ("[" * 100_000, "^x: not readable JSON: maximum recursion"),
        ("1" * 5000, "^x: not readable JSON: .*4300"),
    ],
)
def test_every_fault_is_one_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_json(text, "x")
    assert "\n" not in str(caught.value)


def test_what_python_writes_for_numbers_that_are_none_is_taken_when_asked_for() -> None:
    assert parse_json("[Infinity, -Infinity]", "x", constants=True) == [float("inf"), float("-inf")]


def test_a_whole_surrogate_pair_is_a_character() -> None:
    assert parse_json('"\\ud83d\\ude00"', "x") == "\U0001f600"
