"""Experts are found by structure, on the meta device as well, and named in one line."""

import pytest
import tiny_models
import torch
from torch import nn

from taso_ds.adapters.experts import find_experts
from taso_ds.adapters.targets import find_targets
from taso_ds.errors import UserError

SIZE = 2 * 4 * 3 * 48 * 32  # 2 layers of 4 experts with gate, up and down of 48 x 32


@pytest.mark.parametrize("make", [tiny_models.mixtral, tiny_models.qwen3_moe])
def test_fused_experts(make: "type") -> None:
    model = make()
    experts = find_experts(model)
    assert sum(experts.sizes.values()) == SIZE
    assert experts.blocks == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert experts.total == sum(value.numel() for value in model.parameters())
    line = experts.left_in_words(find_targets(model))
    assert line is not None
    assert line.startswith(f"experts: {SIZE:,} of {experts.total:,} parameters ({SIZE / experts.total:.1%})")
    assert "(--adapt_experts takes in those in fused parameters)" in line
    assert line.endswith("model.layers.*.mlp.experts.down_proj, model.layers.*.mlp.experts.gate_up_proj")
    assert not any("mlp" in name for name in find_targets(model))
    assert experts.fused == experts.sizes.keys()


def test_only_experts_without_a_target_are_named() -> None:
    model = tiny_models.mixtral()
    experts = find_experts(model)
    assert experts.left_in_words(find_targets(model, experts=True)) is None
    line = experts.left_in_words(find_targets(model, ["down_proj"], experts=True))
    assert line is not None
    assert line.startswith(f"experts: {SIZE * 2 // 3:,} of ")
    assert line.endswith(": model.layers.*.mlp.experts.gate_up_proj")


def test_a_dense_model_has_none() -> None:
    assert not find_experts(tiny_models.llama()).sizes
    assert find_experts(tiny_models.llama()).left_in_words([]) is None
    assert not find_experts(tiny_models.gpt2()).sizes


class Block(nn.Module):
    """A layer of a model with code of its own: a list of experts, a shared one, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.mlp.shared = nn.Linear(4, 4)
        self.mlp.conv = nn.Conv1d(4, 4, 3)


def test_a_list_of_experts() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"layers": nn.ModuleList([Block()])})
    experts = find_experts(model)
    assert experts.blocks == ["layers.0.mlp"]
    assert sum(experts.sizes.values()) == 3 * (16 + 4)
    assert list(find_targets(model)) == ["layers.0.mlp.shared"]
    line = experts.left_in_words(["layers.0.mlp.shared"])
    assert line is not None
    assert "adapt_experts" not in line  # which would not take them in
    with pytest.raises(UserError, match="adapt_experts: ModuleDict has no experts in fused parameters"):
        find_targets(model, experts=True)


class Layer(nn.Module):
    """A layer that holds its fused experts without a block around them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(4, 4)
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.zeros(3, 4, 4))


def test_a_layer_is_not_a_block() -> None:
    assert find_experts(nn.ModuleDict({"layers": nn.ModuleList([Layer()])})).blocks == ["layers.0.experts"]
