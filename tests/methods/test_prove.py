"""What the proof says when the fresh process fails."""

import dataclasses

import pytest

from taso_ds.methods.fresh_process import Comparison
from taso_ds.methods.prove import what_was_raised

TRACEBACK = """loading: 100%
Traceback (most recent call last):
  File "prove.py", line 1, in <module>
    open(x)
"""


@pytest.mark.parametrize(
    ("stderr", "said"),
    [
        (TRACEBACK + "KeyError: 'a'", "KeyError: 'a'"),
        (TRACEBACK + "ValueError: Block(\n  (0): Linear()\n) is no linear\n",
         "ValueError: Block(   (0): Linear() ) is no linear"),
        ("killed\n", "killed"),
        ("", "no output"),
    ],
    ids=["one line", "several", "no exception", "nothing"],
)  # fmt: skip
def test_the_last_exception_is_told_whole(stderr: str, said: str) -> None:
    assert what_was_raised(stderr) == said


@pytest.mark.parametrize(("dtype", "least"), [("float32", 1e-4), ("bfloat16", 2**-7)])
def test_one_element_rounded_otherwise_is_rounding(dtype: str, least: float) -> None:
    """An adapter of some steps can be so small that bf16 and fp32 compute it alike, and the live model not quite."""
    alike = Comparison(error=0.0, effect=0.0, rounding=0.0, stored_rounding=0.0, different=[], merges=False)
    assert alike.tolerance(dtype) == least
    assert dataclasses.replace(alike, rounding=0.1).tolerance(dtype) == pytest.approx(0.3)
