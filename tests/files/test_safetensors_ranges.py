"""Byte ranges of a checkpoint, against what the safetensors library reads; indexes and headers that lie."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from taso_ds.errors import UserError
from taso_ds.files import safetensors_ranges as safetensors_files
from taso_ds.files.safetensors_ranges import INDEX, SINGLE, open_checkpoint, weight_files

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(lambda n: n != "__metadata__")
shapes = st.lists(st.integers(0, 5), max_size=3)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    found = {}
    for name, shape in draw(st.dictionaries(names, shapes, min_size=1, max_size=5)).items():
        dtype = draw(st.sampled_from(DTYPES))
        found[name] = torch.randint(0, 2 if dtype == torch.bool else 100, shape).to(dtype)
    return found


def write(folder: Path, content: dict[str, Tensor], *, files: int) -> None:
    """Write a checkpoint of one file, or of several with an index."""
    for old in folder.iterdir():
        old.unlink()
    if files == 1:
        save_file(content, folder / SINGLE)
        return
    places = {name: f"{number % files}.safetensors" for number, name in enumerate(content)}
    for file in set(places.values()):
        save_file({name: content[name] for name in content if places[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=tensors(), files=st.integers(1, 3), staging=st.sampled_from((8, 24, 1 << 12)), data=st.data())
def test_any_range_of_any_tensor_is_what_safetensors_reads(
    tmp_path: Path, content: dict[str, Tensor], files: int, staging: int, data: st.DataObject
) -> None:
    write(tmp_path, content, files=files)
    whole = {name: value for file in tmp_path.glob("*.safetensors") for name, value in load_file(file).items()}
    with pytest.MonkeyPatch.context() as patch, open_checkpoint(tmp_path) as checkpoint:
        patch.setattr(safetensors_files, "_STAGING_BYTES", staging)  # so that what is converted comes in several parts
        assert set(checkpoint.tensors) == set(content)
        for name, expected in whole.items():
            read = checkpoint.read(name)
            assert (read.dtype, read.shape) == (expected.dtype, expected.shape)
            assert torch.equal(read, expected)
            first = data.draw(st.integers(0, expected.numel()))
            count = data.draw(st.integers(0, expected.numel() - first))
            out = torch.empty(count, dtype=data.draw(st.sampled_from((expected.dtype, torch.float64))))
            checkpoint.read_into(out, name, first=first)
            assert torch.equal(out, expected.flatten()[first : first + count].to(out.dtype))
            raw = expected.flatten().view(torch.uint8)
            out = torch.empty(raw.numel(), dtype=torch.uint8)
            checkpoint.read_into(out, name, as_bytes=True)
            assert torch.equal(out, raw)


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/x.safetensors", "a/b.safetensors", "..", ".", "", "a\0b", "x" * 300]
)
def test_an_index_leads_nowhere_else(tmp_path: Path, file: str) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    for read in (weight_files, lambda folder: open_checkpoint(folder).__enter__()):
        with pytest.raises(UserError, match="which is not a file of its folder"):
            read(tmp_path)


def test_an_index_of_pickles_counts_only_where_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.bin"}}))
    with pytest.raises(UserError, match=r"names model-1\.bin, which is missing: download it"):
        weight_files(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / SINGLE)
    assert weight_files(tmp_path) == [tmp_path / SINGLE]


def test_only_what_transformers_would_read_is_read(tmp_path: Path) -> None:
    """An indexed file and not what lies beside it; a single file before any index."""
    save_file({"a": torch.ones(1)}, tmp_path / "1.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "1.safetensors"}}))
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    assert weight_files(tmp_path) == [tmp_path / "1.safetensors"]
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == {"a"}
        assert checkpoint.read("a").item() == 1.0
    save_file({"a": torch.full((1,), 2.0)}, tmp_path / SINGLE)
    assert weight_files(tmp_path) == [tmp_path / SINGLE]
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.read("a").item() == 2.0


def test_a_file_that_was_cut_after_it_was_opened(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1000)}, tmp_path / SINGLE)
    with open_checkpoint(tmp_path) as checkpoint:
        (tmp_path / SINGLE).write_bytes((tmp_path / SINGLE).read_bytes()[:2000])
        with pytest.raises(UserError, match=r"model\.safetensors ends early, copy it again"):
            checkpoint.read("a")
