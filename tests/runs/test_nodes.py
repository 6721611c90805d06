"""What makes two model folders different; the nodes themselves are in ``multihost``."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from taso_ds.runs.nodes import file_digests


@pytest.fixture
def folders(tmp_path: Path, llama_folder: Path) -> tuple[Path, Path]:
    one, other = tmp_path / "one", tmp_path / "other"
    shutil.copytree(llama_folder, one)
    save_file({"x": torch.zeros(1 << 20)}, one / "big.safetensors")  # 4 MB: more than is read of a file
    shutil.copytree(one, other)
    return one, other


def test_copies_are_the_same(folders: tuple[Path, Path]) -> None:
    one, other = map(file_digests, folders)
    assert one == other
    assert {"config.json", "model.safetensors", "big.safetensors"} <= one.keys()


def test_what_no_model_is_read_from_does_not_count(folders: tuple[Path, Path]) -> None:
    (folders[1] / "README.md").write_text("mine")
    (folders[1] / "consolidated.safetensors").write_text("of Mistral's own software")
    assert file_digests(folders[0]) == file_digests(folders[1])


@pytest.mark.parametrize("place", [0, (1 << 21) + 100, (1 << 22) + 8])
def test_weights_of_the_same_size_and_shape_differ(folders: tuple[Path, Path], place: int) -> None:
    """In the header, in the middle, at the end."""
    with (folders[1] / "big.safetensors").open("r+b") as file:
        file.seek(place)
        file.write(b"\x01")
    one, other = map(file_digests, folders)
    assert {name for name in one if one[name] != other[name]} == {"big.safetensors"}


def test_a_setting_and_a_tokenizer_file_differ(folders: tuple[Path, Path]) -> None:
    config = json.loads((folders[1] / "config.json").read_text())
    (folders[1] / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    (folders[1] / "special_tokens_map.json").write_text("{}")
    one, other = map(file_digests, folders)
    assert {name for name, _ in one.items() ^ other.items()} == {"config.json", "special_tokens_map.json"}
