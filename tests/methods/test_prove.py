"""What the proof says when the fresh process fails."""

import pytest

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
        (
            TRACEBACK + "ValueError: Block(\n  (0): Linear()\n) is no linear\n",
            "ValueError: Block(   (0): Linear() ) is no linear",
        ),
        ("killed\n", "killed"),
        ("", "no output"),
    ],
    ids=["one line", "several", "no exception", "nothing"],
)
def test_the_last_exception_is_told_whole(stderr: str, said: str) -> None:
    assert what_was_raised(stderr) == said
