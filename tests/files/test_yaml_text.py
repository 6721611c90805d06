"""What a strict reader of YAML takes and what it refuses, each in one line and at once."""

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from taso_ds.errors import UserError
from taso_ds.files.yaml_text import parse_yaml

values = st.none() | st.text() | st.lists(st.text(), max_size=3)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(), values, max_size=4))
def test_what_yaml_writes_is_read(values: dict[str, Any]) -> None:
    assert parse_yaml(yaml.safe_dump(values), "x") == values


@pytest.mark.parametrize("text", ["007", "1.10", "1:30", "0x10", "1e-3", "off", "yes", "True", "2024-01-01"])
def test_a_value_is_what_is_written(text: str) -> None:
    assert parse_yaml(f"a: {text}\nb: [{text}]", "x") == {"a": text, "b": [text]}


def test_nothing_is_null() -> None:
    assert parse_yaml("a:\nb: null\nc: ~\nd: 'null'", "x") == {"a": None, "b": None, "c": None, "d": "null"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "^x has the key 'a' twice$"),
        ("a: &b 1\nc: *b", r"^x holds the alias \*b: write the value itself$"),
        ("a: " + "[" * 100_000, "^x nests values 8 deep"),
        ("a: [", "^x: not readable YAML: "),
        ("a: !!timestamp today", "^x: not readable YAML: "),
        ("a:\t1", r"^x: not readable YAML: line 1, column 3: found character '\\t' that cannot start any token$"),
        ("a: !include b", "^x: not readable YAML: line 1, column 4: could not determine a constructor"),
        ("- a", "^x is not a mapping"),
        ("rank = 2", "^x is not a mapping of names to values: write one `name: value` a line$"),
        ("", "^x is empty: write one `name: value` a line"),
        ("# rank: 2", "^x is empty"),
    ],
)
def test_every_fault_is_one_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_yaml(text, "x")
    assert "\n" not in str(caught.value)
