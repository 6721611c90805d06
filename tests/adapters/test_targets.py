"""Which matrices are adapted: the default, names, paths, patterns, and the error when nothing matches."""

from typing import Any

import pytest
import tiny_models
import torch
from families import FAMILIES, build
from torch import nn

from taso_ds.adapters.targets import MatrixShape, find_targets, is_linear_map, matrix_shape
from taso_ds.errors import UserError

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def test_default_is_the_seven_linears_of_every_llama_block() -> None:
    for tied in (False, True):
        found = find_targets(tiny_models.llama(tied=tied, layers=3))
        # In model order; not: embed_tokens, lm_head, norms.
        assert list(found) == [f"model.layers.{layer}.{name}" for layer in range(3) for name in (*ATTENTION, *MLP)]


def test_default_of_gpt2_and_bert() -> None:
    blocks = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # query, key and value are one matrix
    assert list(find_targets(tiny_models.gpt2())) == [
        f"transformer.h.{layer}.{name}" for layer in (0, 1) for name in blocks
    ]
    parts = ("query", "key", "value")
    names = [f"attention.self.{part}" for part in parts] + [
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ]
    # The pooler and the classifier stand outside the blocks: they belong to the head.
    assert list(find_targets(tiny_models.bert())) == [
        f"bert.encoder.layer.{layer}.{name}" for layer in (0, 1) for name in names
    ]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("q_proj", ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        ("mlp.down_proj", ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]),
        ("model.layers.1.mlp.up_proj", ["model.layers.1.mlp.up_proj"]),
        (r"model\.layers\.0\..*\.[kv]_proj", [f"model.layers.0.{name}" for name in ATTENTION[1:3]]),
        (r".*1\.mlp.*", [f"model.layers.1.{name}" for name in MLP]),
        ("lm_head", ["lm_head"]),  # whoever names it gets it
    ],
    ids=["suffix", "two parts", "path", "pattern", "wildcards", "outside the blocks"],
)  # fmt: skip
def test_names_paths_and_patterns(pattern: str, names: list[str]) -> None:
    assert list(find_targets(tiny_models.llama(), [pattern])) == names


def test_several_names_are_one_selection_in_model_order() -> None:
    found = find_targets(tiny_models.llama(layers=1), ["down_proj", "q_proj", "self_attn.q_proj"])
    assert list(found) == ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]


def test_a_name_matches_whole_path_components_only() -> None:
    with pytest.raises(UserError, match=r"'proj' matches no linear"):
        find_targets(tiny_models.llama(), ["proj"])
    with pytest.raises(UserError, match=r"'attn\.q_proj' matches no linear"):
        find_targets(tiny_models.llama(), ["attn.q_proj"])
    with pytest.raises(UserError, match="matches no linear"):  # a pattern describes the whole path
        find_targets(tiny_models.llama(), [r"q_pro."])


def test_nothing_found_names_the_nearest_and_all() -> None:
    with pytest.raises(UserError, match=r"target_modules: 'q_porj' matches no linear of LlamaForCausalLM") as caught:
        find_targets(tiny_models.llama(), ["v_proj", "q_porj"])
    assert "(nearest: 'q_proj')" in str(caught.value)
    assert "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj" in str(caught.value)
    with pytest.raises(UserError, match="is not a regular expression"):
        find_targets(tiny_models.llama(), ["q_proj("])


def test_a_norm_or_an_embedding_is_no_target() -> None:
    for name in ("input_layernorm", "embed_tokens"):
        with pytest.raises(UserError, match="matches no linear"):
            find_targets(tiny_models.llama(), [name])


def test_a_model_without_blocks_asks_for_names() -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    with pytest.raises(UserError, match="no linear inside a block list: name --target_modules"):
        find_targets(model)
    assert list(find_targets(model, ["0"])) == ["0"]


def test_shapes_are_out_by_in_whatever_the_storage() -> None:
    q, k = (find_targets(tiny_models.llama(layers=1), [name]) for name in ("q_proj", "k_proj"))
    # 4 heads of 8 and 2 key/value heads of 8, from 32.
    assert q["model.layers.0.self_attn.q_proj"].shape == MatrixShape(32, 32)
    assert k["model.layers.0.self_attn.k_proj"].shape == MatrixShape(16, 32)
    fused = tiny_models.gpt2().transformer.h[0].attn.c_attn
    assert tuple(fused.weight.shape) == (32, 96)
    assert matrix_shape(fused) == MatrixShape(96, 32, transposed=True)
    assert matrix_shape(fused).numel == 3072  # type: ignore[union-attr]
    assert matrix_shape(nn.LayerNorm(4)) is None

    class Special(nn.Linear):  # quantized linears are subclasses
        pass

    assert matrix_shape(Special(3, 5)) == MatrixShape(5, 3)


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("falcon_mamba", {"x_proj", "dt_proj", "out_proj"}), ("jamba", {"dt_proj"}), ("bamba", {"out_proj"}),
        ("gemma3n_text", {"correction_coefs"}), ("longcat_flash", {"classifier"}),
        ("deepseek_v32", {"wq_b", "wk", "weights_proj"}),
    ],
)  # fmt: skip
def test_what_a_family_computes_past_an_adapter_is_no_target(name: str, left: set[str]) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    model = build(family, device="meta")
    inside = {module.rpartition(".")[2] for module, found in model.named_modules() if matrix_shape(found) is not None}
    targets = {target.rpartition(".")[2] for target in find_targets(model)}
    assert left <= inside
    assert not left & targets


def test_what_kernels_take_past_its_module_is_no_target() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8))
    assert {name.rpartition(".")[2] for name in find_targets(model)} == {"in_proj"}
    with pytest.raises(UserError, match="'out_proj' matches no linear of MambaForCausalLM"):
        find_targets(model, ["out_proj"])


def on_meta(model_type: str, **sizes: int) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))


@pytest.mark.parametrize(
    ("model_type", "forbidden"),
    [("llama4_text", "router"), ("phimoe", "router"), ("deepseek_v4", "o_a_proj"), ("falcon", None)],
)
def test_a_linear_that_computes_more_or_less_is_no_target(model_type: str, forbidden: str | None) -> None:
    model = on_meta(model_type)
    found = {name.rpartition(".")[2] for name in find_targets(model)}
    subclasses = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    }
    assert subclasses, "nothing is tested"
    assert subclasses - found == ({forbidden} if forbidden else set())
    if forbidden:
        with pytest.raises(UserError, match=f"'{forbidden}' matches no linear"):
            find_targets(model, [forbidden])


class _Scaled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class _Chosen(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).softmax(-1)


class _Longhand(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input @ self.weight.T + (0 if self.bias is None else self.bias)


class _Remote(nn.Linear):
    table: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.table[input.long()]


@pytest.mark.parametrize("bias", [True, False])
def test_a_forward_of_its_own_is_tried(bias: bool) -> None:
    linears = [kind(6, 7, bias=bias) for kind in (nn.Linear, _Longhand, _Scaled, _Chosen, _Remote)]
    before = torch.get_rng_state()
    assert [is_linear_map(linear) for linear in linears] == [True, True, False, False, False]
    assert torch.equal(torch.get_rng_state(), before)
    assert [tuple(linear.weight.shape) for linear in linears] == [(7, 6)] * 5
    assert all(linear.training for linear in linears)
    assert is_linear_map(_Longhand(6, 7, bias=bias, device="meta"))
