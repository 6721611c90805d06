"""What a strict reader of YAML takes and what it refuses, each in one line and at once."""

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from taso_ds.errors import UserError
from taso_ds.yaml_text import parse_yaml

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(), scalars | st.lists(scalars.map(str), max_size=3), max_size=4))
def test_what_yaml_writes_is_read(values: dict[str, Any]) -> None:
    assert parse_yaml(yaml.safe_dump(values), "x") == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "^x has the key 'a' twice$"),
        ("a: &b 1\nc: *b", r"^x holds the alias \*b: write the value itself$"),
        ("a: " + "[" * 100_000, "^x nests values 8 deep"),
        ("a: [", "^x: not readable YAML: "),
        ("a: !!timestamp today", "^x: not readable YAML: "),
        ("a: 2024-13-01", "^x: not readable YAML: month must be in 1..12"),
        ("- a", "^x is not a mapping"),
        ("", "^x is empty: write one `name: value` a line"),
        ("# rank: 2", "^x is empty"),
    ],
)
def test_every_fault_is_one_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_yaml(text, "x")
    assert "\n" not in str(caught.value)
