"""A folder is written whole or not at all."""

from pathlib import Path

import pytest

from taso_ds.files.atomic import replacing_folder


def test_a_folder_exists_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"

    def write(name: str, *, whole: bool = True) -> None:
        with replacing_folder(folder) as path:
            (path / name).write_text(name)
            if not whole:
                raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError):
        write("one", whole=False)
    assert not folder.exists()
    write("two")
    assert [file.name for file in folder.iterdir()] == ["two"]  # nothing of the first attempt
    with pytest.raises(RuntimeError):
        write("one", whole=False)
    assert [file.name for file in folder.iterdir()] == ["two"]
    write("three")
    assert [file.name for file in folder.iterdir()] == ["three"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]
