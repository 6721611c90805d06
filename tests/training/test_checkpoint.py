"""A checkpoint counts only when it is whole, and the one before stays until then."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from taso_ds.errors import UserError
from taso_ds.training.checkpoint import (
    LATEST,
    MANIFEST,
    MARKER,
    PROGRESS,
    STATE,
    Checkpoints,
    checkpoint_name,
    find_problem,
    resolve_checkpoint,
)


def write(checkpoints: Checkpoints, step: int, *, limit: int = 9) -> Path:
    files: dict[str, Callable[[Path], object]] = {
        STATE: lambda path: path.write_bytes(bytes([step]) * 100),
        PROGRESS: lambda path: path.write_text(json.dumps({"step": step})),
    }
    return checkpoints.write(step, files, limit=limit)  # type: ignore[arg-type]


@pytest.fixture
def three(tmp_path: Path) -> Checkpoints:
    """Checkpoints of steps 2, 4 and 6."""
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    for step in (2, 4, 6):
        write(checkpoints, step)
    return checkpoints


def path_of(checkpoints: Checkpoints, step: int) -> Path:
    return checkpoints.folder / checkpoint_name(step)


def test_the_newest_is_found_and_nothing_else_is_left(three: Checkpoints) -> None:
    assert three.newest().path == path_of(three, 6)
    assert three.newest().skipped == []
    names = {path.name for path in three.folder.iterdir()}
    assert names == {LATEST, *(checkpoint_name(step) for step in (2, 4, 6))}


def test_only_so_many_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3, 4):
        write(checkpoints, step, limit=2)
    assert {path.name for path in tmp_path.iterdir()} == {LATEST, checkpoint_name(3), checkpoint_name(4)}


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyboardInterrupt])
def test_nothing_half_written_stays_whatever_goes_wrong(error: type[BaseException], three: Checkpoints) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise error

    before = set(three.folder.rglob("*"))
    with pytest.raises(error):
        three.write(8, {STATE: fail}, limit=9)
    assert set(three.folder.rglob("*")) == before
    assert three.newest().path == path_of(three, 6)


def empty(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda path: os.truncate(path / STATE, 50), "50 bytes long, not 100"),
    "bit flipped": (lambda path: (path / STATE).write_bytes(b"\x07" + b"\x06" * 99), "is damaged"),
    "state missing": (lambda path: (path / STATE).unlink(), f"{STATE} is missing"),
    "marker missing": (lambda path: (path / MARKER).unlink(), "is not complete"),
    "marker empty": (lambda path: (path / MARKER).write_text(""), f"{MANIFEST} is damaged"),
    "manifest truncated": (lambda path: os.truncate(path / MANIFEST, 10), f"{MANIFEST} is damaged"),
    "manifest missing": (lambda path: (path / MANIFEST).unlink(), "is not readable"),
    "progress altered": (lambda path: (path / PROGRESS).write_text('{"step": 7}'), "is damaged"),
    "empty folder": (empty, "is not complete"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_skipped_with_the_reason_and_kept(three: Checkpoints, damage: str) -> None:
    spoil, reason = DAMAGES[damage]
    spoil(path_of(three, 6))
    found = three.newest()
    assert found.path == path_of(three, 4)
    (line,) = found.skipped
    assert line.startswith(str(path_of(three, 6)))
    assert reason in line
    assert path_of(three, 6).is_dir()
    with pytest.raises(UserError, match="choose another checkpoint"):
        resolve_checkpoint(path_of(three, 6))
    assert resolve_checkpoint(three.folder.parent) == resolve_checkpoint(three.folder) == path_of(three, 4)


def test_a_consistent_manifest_of_other_files_is_no_checkpoint(three: Checkpoints) -> None:
    path = path_of(three, 6)
    shutil.rmtree(path)
    three_files: dict[str, Callable[[Path], object]] = {"other": lambda path: path.write_text("x")}
    three.write(6, three_files, limit=9)  # type: ignore[arg-type]
    assert find_problem(path) in (f"{STATE} is missing", f"{PROGRESS} is missing")


@pytest.mark.parametrize("pointer", ["step-00000099", "../../etc", "", "\x00\xff", "step-00000004/.."])
def test_a_pointer_to_nowhere_is_said_and_the_newest_taken(three: Checkpoints, pointer: str) -> None:
    (three.folder / LATEST).write_text(pointer)
    found = three.newest()
    assert found.path == path_of(three, 6)
    (line,) = found.skipped
    assert "points to" in line


def test_the_pointer_is_followed(three: Checkpoints) -> None:
    (three.folder / LATEST).write_text(checkpoint_name(4))
    assert three.newest().path == path_of(three, 4)


def test_none_is_complete(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none").newest().path is None
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        resolve_checkpoint(tmp_path)


def test_what_stands_in_the_way_is_kept_aside(three: Checkpoints) -> None:
    (path_of(three, 6) / MARKER).unlink()
    write(three, 6)
    assert find_problem(path_of(three, 6)) is None
    assert (three.folder / "step-00000006.replaced-1" / STATE).is_file()


@pytest.mark.parametrize("call", range(1, 20))
def test_cut_short_anywhere_the_one_before_counts(tmp_path: Path, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call into the system that makes something visible is the last one once."""
    checkpoints, done = Checkpoints(tmp_path / "checkpoints"), 0
    write(checkpoints, 2, limit=1)

    class PowerCut(BaseException):
        pass

    def cut(original: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: object, **kwargs: object) -> object:
            nonlocal done
            done += 1
            if done == call:
                raise PowerCut
            return original(*args, **kwargs)

        return wrapped

    for owner, name in ((os, "rename"), (os, "replace"), (os, "fsync"), (Path, "mkdir"), (Path, "write_text")):
        monkeypatch.setattr(owner, name, cut(getattr(owner, name)))
    monkeypatch.setattr(shutil, "rmtree", cut(shutil.rmtree))
    try:
        write(checkpoints, 4, limit=1)
    except PowerCut:
        expected = {2, 4}
    else:
        expected = {4}
        assert done < call, "all calls were cut once"
    monkeypatch.undo()
    found = checkpoints.newest()
    assert found.path is not None
    assert int(found.path.name[-8:]) in expected
    write(checkpoints, 6, limit=1)
    assert checkpoints.newest().path == path_of(checkpoints, 6)


def test_no_space_left_is_one_line_and_the_one_before_stays(
    three: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(
        UserError, match=r"No space left on device; free some space .* previous checkpoint is untouched"
    ):
        three.write(8, {STATE: full, PROGRESS: full}, limit=2)
    assert three.newest().path == path_of(three, 6)
