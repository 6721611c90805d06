"""Mixtures of experts: scored as plain autograd scores them, and trained alike whatever ranks and stages.

The ranks read different rows, whose tokens go to different experts.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import moe_worker
import parity_case as case
import pytest
import tiny_models
import torch
from test_parity import (
    PEAK,
    ROOT_OF_TEN,
    assert_regions,
    assert_same_run,
    core_regions,
    gradients,
    load,
    plain_training,
    taso,
    weights,
)

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(600)]

BLOCKS = {"mixtral": "MixtralSparseMoeBlock", "qwen3_moe": "Qwen3MoeSparseMoeBlock"}
# Of an odd number of experts the middle one lies on two ranks.
MAKES = {"mixtral": lambda: tiny_models.mixtral(experts=11), "qwen3_moe": tiny_models.qwen3_moe}
NUM_EXPERTS = {"mixtral": 11, "qwen3_moe": 4}
CASES = [(name, stage) for name in BLOCKS for stage in (2, 3)]
EXPERT_RUNS = ["0 experts", "3 experts", "3 experts checkpointed"]  # the stage, and how
EXPERT_CASES = [
    pytest.param(ranks, name, how, marks=[pytest.mark.slow] if ranks == 1 else [])
    for ranks in (1, 2)
    for name in BLOCKS
    for how in EXPERT_RUNS
]
experts = pytest.mark.parametrize(("ranks", "name", "how"), EXPERT_CASES)

Report = Callable[[int], dict[str, Any]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("experts")
    return {name: tiny_models.save(MAKES[name](), root / name) for name in BLOCKS}


@pytest.fixture(scope="module")
def report(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, run_ranks: Any) -> Report:
    """Return ``report(ranks)``; each number of ranks is launched once, when it is first asked for."""

    @cache
    def launch(ranks: int) -> dict[str, Any]:
        out = tmp_path_factory.mktemp("moe") / f"{ranks}.json"
        arguments = [out, *(f"{name}={folder}" for name, folder in folders.items())]
        run_ranks(Path(moe_worker.__file__), ranks, arguments, timeout=500.0)
        results: dict[str, Any] = json.loads(out.read_text())
        return results

    return launch


@pytest.fixture(scope="module")
def signed(folders: dict[str, Path]) -> dict[str, dict[str, torch.Tensor]]:
    """|W ⊙ ḡ| of attention and experts, the signed gradient averaged over all tokens of the calibration set."""
    found = {}
    for name, folder in folders.items():
        model = load(folder)
        gradient = gradients(model, case.CALIBRATION, experts=True)
        assert len(gradient) == 2 * (4 + 2 * NUM_EXPERTS[name])
        found[name] = {
            target: (weight * gradient[target]).abs() for target, weight in weights(model, experts=True).items()
        }
    return found


# The experts left alone -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_linears_beside_the_experts_are_scored(report: Report, folders: dict[str, Path], name: str, stage: int) -> None:
    model = load(folders[name])
    gradient = gradients(model, case.CALIBRATION)
    assert len(gradient) == 2 * 4  # the attention of both layers
    expected = {target: (weight * gradient[target]).abs() for target, weight in weights(model).items()}
    assert_regions(report(2)[f"{name} {stage}"]["scores"], expected)


@pytest.mark.parametrize("name", BLOCKS)
def test_stages_train_the_same(report: Report, name: str) -> None:
    two, three = (report(2)[f"{name} {stage}"]["train"] for stage in (2, 3))
    assert len(two["loss"]) == case.STEPS
    for key in ("loss", "grad_norm"):
        assert three[key] == pytest.approx(two[key], rel=1e-5)
    torch.testing.assert_close(torch.tensor(three["values"]), torch.tensor(two["values"]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_gathered_as_a_whole(report: Report, name: str) -> None:
    assert report(2)[f"{name} 3"]["leaves"] == [BLOCKS[name]] * 2
    assert report(2)[f"{name} 3"]["left_behind"] == [[], []]


# The experts adapted --------------------------------------------------------------------------------------------------


@experts
def test_experts_are_scored_like_autograd(
    report: Report,
    signed: dict[str, dict[str, torch.Tensor]],
    folders: dict[str, Path],
    ranks: int,
    name: str,
    how: str,
) -> None:
    found = report(ranks)[f"{name} {how}"]
    for label in ("batches of 1", "batches of 5 in passes", "one batch"):
        assert_regions(found[label], signed[name])
    magnitude = {target: weight.abs() for target, weight in weights(load(folders[name]), experts=True).items()}
    assert_regions(found["magnitude"], magnitude)
    assert found["left_behind"] == [[]] * ranks
    assert sum(found["held"]["batches of 1"]) == found["target_elements"]
    assert max(found["held"]["one batch"]) <= found["largest_target"]


@experts
def test_experts_learn_what_a_plain_loop_learns(
    report: Report,
    signed: dict[str, dict[str, torch.Tensor]],
    folders: dict[str, Path],
    ranks: int,
    name: str,
    how: str,
) -> None:
    model = load(folders[name])
    adapter = taso(model, core_regions(signed[name]))
    plain = plain_training(model, [([adapter.flat], PEAK * ROOT_OF_TEN)], case.TRAIN)
    assert_same_run(report(ranks)[f"{name} {how}"]["train"], plain)
