"""Mixtures of experts: scored as plain autograd scores them, and trained alike whatever ranks and stages.

The ranks read different rows, whose tokens go to different experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import parity_case as case
import parity_ranks as parity
import pytest
import tiny_models
import torch
from deepspeed.utils import get_z3_leaf_modules
from forked import ForkServer
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

from taso_ds.distributed import comm

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(600)]

BLOCKS = {"mixtral": "MixtralSparseMoeBlock", "qwen3_moe": "Qwen3MoeSparseMoeBlock"}
# Of an odd number of experts the middle one lies on two ranks.
MAKES = {"mixtral": lambda: tiny_models.mixtral(experts=11), "qwen3_moe": tiny_models.qwen3_moe}
NUM_EXPERTS = {"mixtral": 11, "qwen3_moe": 4}
CASES = [(name, stage) for name in BLOCKS for stage in (2, 3)]
EXPERT_RUNS = ["0 experts", "3 experts", "3 experts checkpointed"]  # the stage, and how
EXPERT_CASES = [
    pytest.param((ranks, name, how), id=f"{ranks}-{name}-{how}", marks=[pytest.mark.slow] if ranks == 1 else [])
    for ranks in (1, 2)
    for name in BLOCKS
    for how in EXPERT_RUNS
]

# On the ranks ---------------------------------------------------------------------------------------------------------

SCORINGS = [("scores", "importance", "signed_mean", 5)]
# Micro-batches of one row miss most experts; passes begin and end within a module of experts.
EXPERT_SCORINGS = [
    ("batches of 1", "importance", "signed_mean", 1),
    ("batches of 5 in passes", "importance", "signed_mean", 5),
    ("one batch", "importance", "signed_mean", 13),
    ("magnitude", "magnitude", "signed_mean", 5),
]


def without_experts(folder: str, stage: int, split: case.Split) -> dict[str, Any]:
    scores, base = parity.score(folder, stage, SCORINGS)
    groups = parity.taso_groups(base, parity.regions_of(scores["scores"]))
    trained = parity.train(base, groups, parity.zero_config_of(stage, split), split)
    leaves = [type(module).__name__ for module in get_z3_leaf_modules(base.model)]
    return scores | {"train": trained, "leaves": leaves}


def with_experts(folder: str, stage: int, split: case.Split, *, checkpointing: bool) -> dict[str, Any]:
    scores, base = parity.score(folder, stage, EXPERT_SCORINGS, checkpointing=checkpointing, experts=True)
    groups = parity.taso_groups(base, parity.regions_of(scores["one batch"]))
    trained = parity.train(base, groups, parity.zero_config_of(stage, split), split)
    return scores | {"train": trained}


def run_stages(folders: dict[str, str]) -> dict[str, Any]:
    split, results = case.SPLITS[comm.world_size()][-1], {}
    for name, folder in folders.items():
        for stage in (2, 3) if comm.world_size() > 1 else ():
            results[f"{name} {stage}"] = without_experts(folder, stage, split)
        for stage, checkpointing in ((0, False), (3, False), (3, True)):
            key = f"{name} {stage} experts" + " checkpointed" * checkpointing
            results[key] = with_experts(folder, stage, split, checkpointing=checkpointing)
    return results


# The tests ------------------------------------------------------------------------------------------------------------

Report = Callable[[int], dict[str, Any]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("experts")
    return {name: tiny_models.save(MAKES[name](), root / name) for name in BLOCKS}


@pytest.fixture(scope="module")
def report(fork_server: ForkServer, folders: dict[str, Path]) -> Report:
    """Return ``report(ranks)``; each number of ranks is started once, when it is first asked for."""
    names = {name: str(folder) for name, folder in folders.items()}

    @cache
    def run(ranks: int) -> Any:
        return fork_server.run_on_ranks(run_stages, ranks, names, timeout=500.0)

    return run


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


@dataclass(frozen=True)
class ExpertRun:
    """What a launch found with one model's experts adapted, and what plain autograd does with that model."""

    found: dict[str, Any]
    ranks: int
    folder: Path
    signed: dict[str, torch.Tensor]


@pytest.fixture(params=EXPERT_CASES)
def run(
    request: pytest.FixtureRequest, report: Report, folders: dict[str, Path], signed: dict[str, dict[str, torch.Tensor]]
) -> ExpertRun:
    ranks, name, how = request.param
    return ExpertRun(report(ranks)[f"{name} {how}"], ranks, folders[name], signed[name])


def test_experts_are_scored_like_autograd(run: ExpertRun) -> None:
    for label in ("batches of 1", "batches of 5 in passes", "one batch"):
        assert_regions(run.found[label], run.signed)
    magnitude = {target: weight.abs() for target, weight in weights(load(run.folder), experts=True).items()}
    assert_regions(run.found["magnitude"], magnitude)
    assert run.found["left_behind"] == [[]] * run.ranks
    assert sum(run.found["held"]["batches of 1"]) == run.found["target_elements"]
    assert max(run.found["held"]["one batch"]) <= run.found["largest_target"]


def test_experts_learn_what_a_plain_loop_learns(run: ExpertRun) -> None:
    model = load(run.folder)
    adapter = taso(model, core_regions(run.signed))
    plain = plain_training(model, [([adapter.flat], PEAK * ROOT_OF_TEN)], case.TRAIN)
    assert_same_run(run.found["train"], plain)
