"""Whatever bytes a file holds, its reader reads it or refuses it with a ``UserError``: no other exception gets out."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from readers import READERS, read_bytes, valid_files

bounded = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the one file is written anew for every example
)


@st.composite
def damaged(draw: st.DrawFn, valid: bytes) -> bytes:
    """A valid file with a few of its bytes replaced, removed or added: most of it still makes sense."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        stop = min(len(content), start + draw(st.sampled_from((0, 1, 1, 2, 8, 60))))
        content[start:stop] = draw(
            st.one_of(
                st.binary(max_size=6),
                st.sampled_from((b'"', b"[", b"{}", b"null", b"-1", b"0", b"99999999999", b"1e999", b"\\ud800", b"*a")),
            )
        )
    return bytes(content)


@pytest.mark.parametrize("name", READERS)
def test_a_valid_file_is_read(name: str, tmp_path: Path) -> None:
    for content in valid_files(READERS[name], tmp_path):
        assert read_bytes(READERS[name], tmp_path, content)


@pytest.mark.parametrize("name", READERS)
def test_a_file_that_is_none_is_refused(name: str, tmp_path: Path) -> None:
    """Or the reader looks elsewhere, and whatever is thrown at it hits nothing."""
    valid_files(READERS[name], tmp_path)
    assert not read_bytes(READERS[name], tmp_path, b"{")


@pytest.mark.parametrize("name", READERS)
@bounded
@given(content=st.binary(max_size=200))
def test_any_bytes(name: str, tmp_path: Path, content: bytes) -> None:
    valid_files(READERS[name], tmp_path)  # beside which it lies
    read_bytes(READERS[name], tmp_path, content)


@pytest.mark.parametrize("name", READERS)
@bounded
@given(data=st.data())
def test_damaged_files(name: str, tmp_path: Path, data: st.DataObject) -> None:
    valid = data.draw(st.sampled_from(valid_files(READERS[name], tmp_path)))
    read_bytes(READERS[name], tmp_path, data.draw(damaged(valid)))
