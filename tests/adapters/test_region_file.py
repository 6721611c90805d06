"""core_regions.safetensors: what is written is read, other cuts need no second scoring, and strangers are refused."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from trained_adapters import select_core_region

from taso_ds.adapters.region_file import KIND, RegionFile, check_region_file, load_region_file, save_region_file
from taso_ds.adapters.selection import ELEMENT_FRACTION_LADDER, CoreRegion, score_rows_and_cols
from taso_ds.adapters.targets import MatrixShape
from taso_ds.errors import UserError
from taso_ds.files.tensors import read_tensors, write_tensors

SHAPES = {"layers.0.q": MatrixShape(20, 30), "layers.0.down": MatrixShape(16, 40), "layers.1.q": MatrixShape(20, 30)}
SETTINGS = {"task": "rte", "element_fraction": 0.05, "seed": 3, "gguf_file": None}


def importances() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(shape.out_features, shape.in_features, generator=generator) for name, shape in SHAPES.items()
    }


def region_file() -> RegionFile:
    scores = {name: score_rows_and_cols(value, ELEMENT_FRACTION_LADDER) for name, value in importances().items()}
    return RegionFile(scores, SETTINGS, fingerprint="abc")


def write(path: Path) -> RegionFile:
    file = region_file()
    save_region_file(path, file, file.cut(element_fraction=0.05, core_fraction=0.1, source="here"))
    return file


def lists(region: CoreRegion) -> tuple[list[int], list[int], int, int]:
    return region.rows.tolist(), region.cols.tolist(), region.out_features, region.in_features


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "core_regions.safetensors"


def test_round_trip(path: Path) -> None:
    written, read = write(path), load_region_file(path)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]  # nothing temporary is left
    assert list(read.scores) == list(SHAPES)  # in order: it is the adapter's storage order
    assert read.settings == SETTINGS
    assert read.fingerprint == "abc"
    for name, scores in read.scores.items():
        assert scores.ladder == ELEMENT_FRACTION_LADDER
        for field in ("row_counts", "col_counts", "row_importance", "col_importance"):
            found, expected = getattr(scores, field), getattr(written.scores[name], field)
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.dictionaries(names, st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    ladder=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=3, unique=True).map(sorted),
    p=st.floats(0.001, 1.0),
    settings_in_file=st.dictionaries(names, st.one_of(st.none(), st.integers(), names, st.booleans()), max_size=3),
)
def test_round_trip_of_any_shapes_names_and_settings(
    path: Path,
    shapes: dict[str, tuple[int, int]],
    ladder: list[float],
    p: float,
    settings_in_file: dict[str, object],
) -> None:
    scores = {name: score_rows_and_cols(torch.rand(shape), ladder) for name, shape in shapes.items()}
    written = RegionFile(scores, settings_in_file, fingerprint="abc")
    cut = written.cut(element_fraction=ladder[0], core_fraction=p, source="here")
    save_region_file(path, written, cut)
    read = load_region_file(path)
    assert (list(read.scores), read.settings, read.fingerprint) == (list(shapes), settings_in_file, "abc")
    again = read.cut(element_fraction=ladder[0], core_fraction=p, source="there")
    assert {name: lists(region) for name, region in again.items()} == {name: lists(cut[name]) for name in shapes}


def test_the_regions_in_use_can_be_read_without_this_package(path: Path) -> None:
    from safetensors.torch import load_file

    write(path)
    tensors = load_file(path)
    for name, importance in importances().items():
        region = select_core_region(importance, element_fraction=0.05, core_fraction=0.1)
        assert torch.equal(tensors[f"{name}.rows"], region.rows)
        assert torch.equal(tensors[f"{name}.cols"], region.cols)


@pytest.mark.parametrize("k", ELEMENT_FRACTION_LADDER)
@pytest.mark.parametrize("p", [0.05, 0.1, 0.37, 1.0])
def test_another_cut_equals_selecting_from_the_importance(path: Path, k: float, p: float) -> None:
    write(path)
    cut = load_region_file(path).cut(element_fraction=k, core_fraction=p, source=str(path))
    assert list(cut) == list(SHAPES)
    for name, importance in importances().items():
        expected = select_core_region(importance, element_fraction=k, core_fraction=p)
        assert lists(cut[name]) == lists(expected)


def test_an_element_fraction_off_the_ladder_says_what_there_is(path: Path) -> None:
    write(path)
    with pytest.raises(UserError, match=r"element_fraction: .*holds 0.01, 0.02, 0.05, 0.1, 0.2, not 0.03; score again"):
        load_region_file(path).cut(element_fraction=0.03, core_fraction=0.1, source=str(path))


def test_its_own_model_is_accepted() -> None:
    check_region_file(region_file(), SHAPES, fingerprint="abc", source="r")


def test_another_model_is_refused_with_the_first_difference() -> None:
    file = region_file()
    more = {**SHAPES, "layers.2.q": MatrixShape(20, 30)}
    with pytest.raises(UserError, match=r"core_regions: r has no region for layers\.2\.q"):
        check_region_file(file, more, fingerprint="abc", source="r")
    fewer = {name: shape for name, shape in SHAPES.items() if name != "layers.0.down"}
    with pytest.raises(UserError, match=r"r has a region for layers\.0\.down, which is not a target"):
        check_region_file(file, fewer, fingerprint="abc", source="r")
    turned = {**SHAPES, "layers.0.down": MatrixShape(40, 16)}
    with pytest.raises(UserError, match=r"layers\.0\.down as \(16, 40\), the model has \(40, 16\)"):
        check_region_file(file, turned, fingerprint="abc", source="r")
    with pytest.raises(UserError, match="scored on other weights than this base"):
        check_region_file(file, SHAPES, fingerprint="abd", source="r")


def test_a_missing_file(path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_region_file(path)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file(path: Path, share: float) -> None:
    write(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match="not a readable safetensors file") as caught:
        load_region_file(path)
    assert path.name in str(caught.value)


def test_another_kind_of_file(path: Path) -> None:
    write_tensors(path, {"x": torch.zeros(1)}, {"kind": "taso_adapter"})
    with pytest.raises(UserError, match=r"not a taso_core_regions file \(its kind is 'taso_adapter'\)"):
        load_region_file(path)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, path)  # anybody's file, without metadata
    with pytest.raises(UserError, match="not a taso_core_regions file"):
        load_region_file(path)


def test_an_incomplete_or_inconsistent_file(path: Path) -> None:
    write(path)
    tensors, metadata = read_tensors(path, kind=KIND)
    missing = {name: value for name, value in tensors.items() if name != "layers.1.q.row_counts"}
    write_tensors(path, missing, metadata)
    with pytest.raises(UserError, match=r"incomplete, 'layers\.1\.q\.row_counts' is missing"):
        load_region_file(path)
    write_tensors(path, {**tensors, "layers.0.q.row_importance": torch.zeros(19)}, metadata)
    with pytest.raises(UserError, match=r"layers\.0\.q: counts \(5, 20\) do not fit importance \(19,\)"):
        load_region_file(path)
    one = {name: value[:1] if name.endswith("row_counts") else value for name, value in tensors.items()}
    write_tensors(path, one, metadata)
    with pytest.raises(UserError, match="do not fit"):
        load_region_file(path)
    write_tensors(path, tensors, {key: value for key, value in metadata.items() if key != "fingerprint"})
    with pytest.raises(UserError, match="'fingerprint' is missing"):
        load_region_file(path)


def test_a_flipped_bit_is_noticed_wherever_it_lies(path: Path) -> None:
    write(path)
    content = path.read_bytes()
    for place in range(8, len(content), len(content) // 60):
        if content[place : place + 1] == b" ":  # the header's padding
            continue
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(UserError, match=r"damaged|not a readable|not a taso|not valid JSON"):
            load_region_file(path)


def test_scores_that_no_scoring_gives_are_refused(path: Path) -> None:
    write(path)
    tensors, metadata = read_tensors(path, kind=KIND)
    counts, sums = tensors["layers.0.q.row_counts"], tensors["layers.0.q.row_importance"]
    for name, wrong in (
        ("row_counts", counts.float()),
        ("row_counts", counts * 0),
        ("row_counts", -counts),
        ("row_importance", sums * float("nan")),
        ("row_importance", sums.double()),
    ):
        write_tensors(path, {**tensors, f"layers.0.q.{name}": wrong}, metadata)
        with pytest.raises(UserError, match=r"layers\.0\.q: .* made by no scoring"):
            load_region_file(path)
    for wrong_metadata in ({"modules": 3}, {"element_fraction_ladder": ["many"]}, {"settings": 3}):
        write_tensors(path, tensors, metadata | wrong_metadata)
        with pytest.raises(UserError, match="its metadata is not that of a region file"):
            load_region_file(path)


def test_no_module_at_all(path: Path) -> None:
    metadata = {"kind": "taso_core_regions", "modules": [], "element_fraction_ladder": [0.05]}
    write_tensors(path, {"x": torch.zeros(1)}, metadata | {"settings": {}, "fingerprint": "abc"})
    with pytest.raises(UserError, match="holds no region"):
        load_region_file(path)
