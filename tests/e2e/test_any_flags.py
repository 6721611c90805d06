"""A few hundred of the calls that ``make fuzz`` makes: a script does what it says, or refuses in one line."""

from pathlib import Path

import pytest
from any_flags import attempt, faults, make_desk

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
CALLS = 250


def test_any_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_desk(tmp_path)
    calls = [attempt(0, number) for number in range(CALLS)]
    assert not [f"{call}: {found}" for call in calls if (found := faults(tmp_path, call))]
