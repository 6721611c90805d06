"""The hostfile as the launcher reads it, its refusals as one line."""

from pathlib import Path

import pytest

from taso_ds.distributed.hostfile import read_hostfile
from taso_ds.errors import UserError


def test_slots_by_host(tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("# two nodes\nworker-0 slots=8\n\nworker-1 slots=4\n")
    assert read_hostfile(str(tmp_path / "hostfile")) == {"worker-0": 8, "worker-1": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("worker-0 8\n", "bad entry: worker-0 8"),
        ("worker-0 slots=8\nworker-0 slots=8\n", "multiple entries for worker-0"),
        ("# nobody\n", "empty"),
        (None, "no such file"),
    ],
)
def test_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "hostfile").write_text(text)
    with pytest.raises(UserError, match=message):
        read_hostfile(str(tmp_path / "hostfile"))
