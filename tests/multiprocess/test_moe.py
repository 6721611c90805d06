"""Mixtures of experts on two ranks: scored as plain autograd scores them, and trained alike by stages 2 and 3.

The two ranks read different rows, whose tokens go to different experts.
"""

import json
from pathlib import Path
from typing import Any

import moe_worker
import parity_case as case
import pytest
import tiny_models
import torch
from test_parity import assert_regions, gradients, load, weights

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(600)]

BLOCKS = {"mixtral": "MixtralSparseMoeBlock", "qwen3_moe": "Qwen3MoeSparseMoeBlock"}
CASES = [(name, stage) for name in BLOCKS for stage in (2, 3)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("experts")
    return {name: tiny_models.save(getattr(tiny_models, name)(), root / name) for name in BLOCKS}


@pytest.fixture(scope="module")
def found(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, run_ranks: Any) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("moe") / "out.json"
    run_ranks(Path(moe_worker.__file__), 2, [out, *(f"{name}={folder}" for name, folder in folders.items())])
    results: dict[str, Any] = json.loads(out.read_text())
    return results


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_linears_beside_the_experts_are_scored(
    found: dict[str, Any], folders: dict[str, Path], name: str, stage: int
) -> None:
    model = load(folders[name])
    gradient = gradients(model, case.CALIBRATION)
    assert len(gradient) == 2 * 4  # the attention of both layers
    expected = {target: (weight * gradient[target]).abs() for target, weight in weights(model).items()}
    assert_regions(found[f"{name} {stage}"]["scores"], expected)


@pytest.mark.parametrize("name", BLOCKS)
def test_stages_train_the_same(found: dict[str, Any], name: str) -> None:
    two, three = (found[f"{name} {stage}"]["train"] for stage in (2, 3))
    assert len(two["loss"]) == case.STEPS
    for key in ("loss", "grad_norm"):
        assert three[key] == pytest.approx(two[key], rel=1e-5)
    torch.testing.assert_close(torch.tensor(three["values"]), torch.tensor(two["values"]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_gathered_as_a_whole(found: dict[str, Any], name: str) -> None:
    assert found[f"{name} 3"]["leaves"] == [BLOCKS[name]] * 2
    assert found[f"{name} 3"]["left_behind"] == [[], []]
