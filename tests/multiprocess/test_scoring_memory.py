"""What scoring takes beyond a plain backward: fp32 sums of parameters / ranks, and no more than two matrices beside."""

import json
from pathlib import Path

import pytest
from launching import run_ranks

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(600)]
WORKER = Path(__file__).with_name("scoring_memory_worker.py")
RANKS = (2, pytest.param(4, marks=pytest.mark.slow))


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """What the worker found for each model on this many ranks."""
    out = tmp_path_factory.mktemp("memory") / "found.json"
    run_ranks(WORKER, request.param, [out], timeout=400.0)
    found: list[dict[str, float]] = json.loads(out.read_text())
    return [model | {"ranks": request.param} for model in found]


@pytest.mark.parametrize("measured", RANKS, indirect=True)
def test_extra_memory_is_the_formulas(measured: list[dict[str, float]]) -> None:
    for model in measured:
        sums, matrix = 4 * model["elements"] / model["ranks"], 4 * model["largest"]
        extra = model["scoring"] - model["plain"]
        assert 0.9 * sums <= extra <= sums + 2 * matrix, model


@pytest.mark.parametrize("measured", RANKS, indirect=True)
def test_passes_divide_the_sums(measured: list[dict[str, float]]) -> None:
    for model in measured:
        sums, matrix = 4 * model["elements"] / model["ranks"], 4 * model["largest"]
        assert model["four passes"] - model["plain"] <= sums / 4 + 2 * matrix, model


@pytest.mark.parametrize("measured", RANKS, indirect=True)
def test_a_single_batch_needs_no_sums(measured: list[dict[str, float]]) -> None:
    for model in measured:
        assert model["sums"] == pytest.approx(4 * model["elements"] / model["ranks"], rel=0.1), model
        assert model["sums of a single batch"] == 4 * model["largest"], model


@pytest.mark.parametrize("measured", RANKS, indirect=True)
def test_extra_memory_grows_as_parameters(measured: list[dict[str, float]]) -> None:
    """And as one over the ranks, which is in the formula above."""
    _, middle, large = ((model["scoring"] - model["plain"], model["elements"]) for model in measured)
    assert large[0] / middle[0] == pytest.approx(large[1] / middle[1], rel=0.25)


@pytest.mark.parametrize("measured", RANKS, indirect=True)
def test_forwards_alone_do_not_make_later_steps_gather_twice(measured: list[dict[str, float]]) -> None:
    """All of these models may stay gathered from forward to backward."""
    for model in measured:
        assert model["gathered in a step"] == model["parameters"]
