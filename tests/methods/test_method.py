"""What the methods count, the groups they train, and that a new one is one class and one entry of the table."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from configs import config_of
from torch import nn

from taso_ds.adapters.adapter import TasoAdapter
from taso_ds.adapters.selection import CoreRegion, cut_region, score_rows_and_cols, share
from taso_ds.adapters.targets import MatrixShape, Target, Targets, find_targets
from taso_ds.config import RunConfig
from taso_ds.distributed import comm
from taso_ds.errors import UserError
from taso_ds.methods.method import Count
from taso_ds.models.arguments import ModelArguments
from taso_ds.models.load import BaseModel
from taso_ds.models.spec import BaseSpec


def spec_of(model: Any, *, head: bool = False) -> BaseSpec:
    return BaseSpec(ModelArguments(model_name_or_path="base"), "base", model.config, head)


def base_of(model: Any, *, head: bool = False) -> BaseModel:
    return BaseModel(spec_of(model, head=head), model)


def targets_of(config: RunConfig, model: Any) -> Targets:
    return find_targets(model, config.adapter.target_modules, experts=config.adapter.adapt_experts)


# Counts ---------------------------------------------------------------------------------------------------------------

SHAPES = {"a": MatrixShape(40, 30), "b": MatrixShape(25, 64, transposed=True)}
TARGETS = Targets({name: Target(nn.Identity(), shape) for name, shape in SHAPES.items()})


def count(*flags: str) -> Count:
    return config_of(*flags).method.count(spec_of(tiny_models.llama(layers=1)), TARGETS)


@pytest.mark.parametrize(
    ("flags", "trainable", "dense"),
    [
        # a: 70 + ⌊4⌋ + ⌊3⌋ = 77; b: 89 + ⌊2.5⌋ + ⌊6.4⌋ = 97; dense branches: 2 · (70 + 89)
        ([], 77 + 97, 318),
        (["--rank", "3"], 3 * 174, 3 * 318),
        (["--structure", "intersection"], 7 + 8, 159),
        (["--core_fraction", "1.0"], 318, 318),
        (["--method", "lora", "--rank", "4"], 4 * 159, 0),  # whole factors: nothing is expanded
    ],
)
def test_counts_by_hand(flags: list[str], trainable: int, dense: int) -> None:
    found = count(*flags)
    assert (found.trainable, found.dense) == (trainable, dense)


@pytest.mark.parametrize(
    ("flags", "rho"),
    [
        ([], 0.9), (["--core_fraction", "0.25"], 0.75), (["--rho", "parameters"], 1 - 174 / 318),
        (["--rho", "0.5"], 0.5), (["--rho", "off"], 0.0), (["--method", "lora"], 0.0),
    ],
)  # fmt: skip
def test_rho_of_a_run(flags: list[str], rho: float) -> None:
    (group,) = count(*flags).groups
    assert group.rho == pytest.approx(rho)


@pytest.mark.parametrize("method", ["taso", "lora"])
def test_more_than_a_tensor_can_have_is_refused(method: str) -> None:
    with pytest.raises(UserError, match=r"rank: .* more than a tensor can have"):
        count("--method", method, "--rank", str(2**57))
    assert count("--method", method, "--rank", str(2**55)).trainable > 2**61  # no memory is asked for


@pytest.mark.parametrize("make", [tiny_models.llama, tiny_models.gpt2, tiny_models.bert])
@pytest.mark.parametrize("structure", ["union", "intersection"])
def test_the_count_is_the_adapters_own(make: Any, structure: str) -> None:
    config = config_of("--structure", structure, "--rank", "2", "--core_fraction", "0.3")
    model = make()
    targets = targets_of(config, model)
    regions = {
        name: cut_region(
            score_rows_and_cols(torch.rand(shape.out_features, shape.in_features), [0.05]),
            element_fraction=0.05,
            core_fraction=0.3,
        )
        for name, shape in targets.shapes.items()
    }
    adapter = TasoAdapter(regions, structure=structure, rank=2, scaling=1.0, seed=0, dtype=torch.float32)
    found = config.method.count(spec_of(model), targets)
    assert (found.trainable, found.dense) == (adapter.flat.numel(), adapter.num_dense)


def test_experts_count_once_they_are_adapted() -> None:
    """Mixtral: 2 layers of 4 experts with a (96, 32) and a (32, 48) beside q, o (32, 32) and k, v (16, 32)."""
    attention = 2 * (2 * (32 + 32) + 2 * (16 + 32))
    experts = 2 * 4 * ((96 + 32) + (32 + 48))
    model = tiny_models.mixtral()
    for flags, number in (([], attention), (["--adapt_experts"], attention + experts)):
        config = config_of("--core_fraction", "1.0", *flags)
        # union at p = 1: two full branches
        assert config.method.count(spec_of(model), targets_of(config, model)).trainable == 2 * number


# Groups ---------------------------------------------------------------------------------------------------------------


def corners(shapes: Mapping[str, MatrixShape]) -> dict[str, CoreRegion]:
    return {
        name: CoreRegion(
            torch.arange(share(0.1, shape.out_features)),
            torch.arange(share(0.1, shape.in_features)),
            shape.out_features,
            shape.in_features,
        )
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("method", ["taso", "lora", "full"])
@pytest.mark.parametrize("head", [False, True], ids=["language model", "classifier"])
def test_what_trains_is_what_was_counted(method: str, head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm, "device", lambda: torch.device("cpu"))
    model: Any = tiny_models.bert() if head else tiny_models.llama()
    base = base_of(model.requires_grad_(False), head=head)
    for parameter in base.head_parameters.values():
        parameter.requires_grad_(True)
    config = config_of("--method", method, "--core_fraction", "0.1")
    targets = targets_of(config, model)
    counted = config.method.count(base.spec, targets)
    groups = config.method.attach(base, targets, corners(targets.shapes) if config.method.needs_regions else {})
    sizes = [
        [(group.name, group.rho, group.peak, sum(value.numel() for value in group.parameters)) for group in made]
        for made in (counted.groups, groups)
    ]
    assert sizes[0] == sizes[1]
    names = {"full": ["weights", "norms_and_biases"]}.get(method, ["adapter"])
    wanted = [*names, *(["head"] if head else [])]
    assert sorted(group.name for group in groups) == sorted(wanted)  # an empty group is left out
    trained = {id(value) for value in model.parameters() if value.requires_grad}
    assert {id(value) for group in groups for value in group.parameters} == trained


def test_full_training_decays_matrices_only() -> None:
    model: Any = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    config = config_of("--method", "full", "--weight_decay", "0.1", "--learning_rate", "2e-4")
    spec: Any = SimpleNamespace(head=False)
    groups = config.method.attach(BaseModel(spec, model), Targets({}), {})
    assert [(group.name, group.rho, group.factor, group.peak, group.weight_decay) for group in groups] == [
        ("weights", 0.0, 1.0, 2e-4, 0.1),
        ("norms_and_biases", 0.0, 1.0, 2e-4, 0.0),
    ]
    decays = {id(value): group.weight_decay for group in groups for value in group.parameters}
    assert [decays[id(value)] == 0.0 for value in model.parameters()] == [v.ndim == 1 for v in model.parameters()]
