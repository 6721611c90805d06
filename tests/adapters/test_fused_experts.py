"""Experts in fused parameters: found, scored and adapted slice by slice, against autograd and against merged slices."""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from trained_adapters import losses_of_steps, trained_adapter

from taso_ds.adapters.adapter import TasoAdapter, merge_into
from taso_ds.adapters.fused_experts import ExpertMatrix, HookedExperts, fused_parameters, fused_sizes
from taso_ds.adapters.importance import tap_expert_gradients, weight_gradient
from taso_ds.adapters.peft_format import PEFT_CONFIG_FILE, PEFT_FILE, load_adapter, peft_config, save_adapter
from taso_ds.adapters.targets import MatrixShape, find_targets, get_target, matrix_shape
from taso_ds.errors import UserError

BATCH = tiny_models.token_batch()
MAKES = [tiny_models.mixtral, tiny_models.qwen2_moe, tiny_models.qwen3_moe, tiny_models.gpt_oss]
every_model = pytest.mark.parametrize("make", MAKES)
Make = Callable[..., Any]


def matrices(model: nn.Module) -> dict[str, ExpertMatrix]:
    return find_targets(model, experts=True).experts


def checkpointed(model: Any) -> Any:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.training = True
    return model


# Finding --------------------------------------------------------------------------------------------------------------


def test_every_slice_is_a_target_in_model_order() -> None:
    found = list(find_targets(tiny_models.mixtral(), experts=True))
    attention = [f"model.layers.0.self_attn.{letter}_proj" for letter in "qkvo"]
    experts = [f"model.layers.0.mlp.experts.{name}.{n}" for name in ("gate_up_proj", "down_proj") for n in range(4)]
    assert found[: len(found) // 2] == attention + experts
    assert list(find_targets(tiny_models.mixtral())) == [name for name in found if "experts" not in name]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_shapes(device: str) -> None:
    with torch.device(device):
        plain, transposed = tiny_models.qwen2_moe(), tiny_models.gpt_oss()
    name = "model.layers.1.mlp.experts.{}_proj.3"
    assert matrix_shape(get_target(plain, name.format("gate_up"))) == MatrixShape(2 * 24, 32)
    assert matrix_shape(get_target(plain, name.format("down"))) == MatrixShape(32, 24)
    assert matrix_shape(get_target(transposed, name.format("gate_up"))) == MatrixShape(96, 32, transposed=True)
    assert matrix_shape(get_target(transposed, name.format("down"))) == MatrixShape(32, 48, transposed=True)


def test_a_parameters_name_selects_its_experts_and_a_pattern_some_of_them() -> None:
    model = tiny_models.mixtral()
    assert len(find_targets(model, ["down_proj"], experts=True)) == 2 * 4
    some = find_targets(model, ["q_proj", r".*\.0\..*gate_up_proj\.[12]"], experts=True)
    assert [name for name in some if "experts" in name] == [
        f"model.layers.0.mlp.experts.gate_up_proj.{index}" for index in (1, 2)
    ]
    with pytest.raises(UserError, match="target_modules names no experts"):
        find_targets(model, ["q_proj"], experts=True)
    with pytest.raises(UserError, match="LlamaForCausalLM has no experts in fused parameters"):
        find_targets(tiny_models.llama(), experts=True)
    with pytest.raises(UserError, match=r"'down_prj' matches no linear .*nearest: 'down_proj'"):
        find_targets(model, ["down_prj"], experts=True)


# The forward that shows each matrix -----------------------------------------------------------------------------------


@every_model
def test_the_shown_forward_computes_the_same(make: Make) -> None:
    model = make().requires_grad_(False)
    before = model(**BATCH).logits
    seen: list[tuple[str, int, int]] = []

    def hook(attribute: str, counts: list[int], inputs: Tensor, output: Tensor) -> Tensor:
        assert sum(counts) == len(inputs) == len(output) == 2 * BATCH["input_ids"].numel()  # two experts a token
        seen.append((attribute, inputs.shape[1], output.shape[1]))
        return output

    experts = [module for module in model.modules() if fused_parameters(module)]
    hooked = [
        HookedExperts(module, {name: partial(hook, name) for name in fused_parameters(module)}) for module in experts
    ]
    torch.testing.assert_close(model(**BATCH).logits, before, rtol=1e-4, atol=1e-5)
    first, second = (
        matrix_shape(get_target(model, f"model.layers.0.mlp.experts.{a}_proj.0")) for a in ("gate_up", "down")
    )
    assert first is not None
    assert second is not None
    assert seen == 2 * [
        ("gate_up_proj", first.in_features, first.out_features),
        ("down_proj", second.in_features, second.out_features),
    ]
    for one in hooked:
        one.remove()
    assert torch.equal(model(**BATCH).logits, before)
    assert len(seen) == 4


def expert_gradients(model: Any) -> dict[str, Tensor]:
    """∂L/∂W of every expert by autograd, as (out, in)."""
    model.requires_grad_(True)
    model(**BATCH).loss.backward()
    found = {}
    for name, one in matrices(model).items():
        gradient = one.parameter.grad
        assert gradient is not None
        found[name] = gradient[one.index].t() if one.transposed else gradient[one.index]
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
@every_model
def test_the_tapped_gradient_is_autograds(make: Make, checkpointing: bool) -> None:
    """The whole base is frozen: the graph begins at the first expert that is listened to."""
    expected = expert_gradients(make())
    model = make().requires_grad_(False)
    found: dict[str, Tensor] = {}

    def deliver(name: str, inputs: Tensor, grad_output: Tensor) -> None:
        assert name not in found
        found[name] = weight_gradient(inputs, grad_output)

    handles = tap_expert_gradients(matrices(model), deliver)
    (checkpointed(model) if checkpointing else model)(**BATCH).loss.backward()
    for handle in handles:
        handle.remove()
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max() + 1))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_experts_without_tokens_are_delivered_in_their_turn() -> None:
    """Two tokens with two experts each reach 4 of 16 at most; what backward delivers is the same list as ever."""
    orders = []
    for seed in (0, 1):
        model = tiny_models.mixtral(experts=16).requires_grad_(False)
        rows: dict[str, int] = {}

        def deliver(name: str, inputs: Tensor, grad_output: Tensor, rows: dict[str, int] = rows) -> None:
            assert len(inputs) == len(grad_output)
            rows[name] = len(inputs)
            assert weight_gradient(inputs, grad_output).any() == (len(inputs) > 0)

        tap_expert_gradients(matrices(model), deliver)
        ids = tiny_models.token_batch(rows=1, length=2, seed=seed)["input_ids"].clamp(min=5)
        model(ids).logits[..., :7].sum().backward()
        assert sum(rows.values()) == 2 * 2 * 4  # layers, parameters, (token, expert) pairs
        assert list(rows.values()).count(0) >= 4 * 12
        orders.append(list(rows))
    assert orders[0] == orders[1]
    assert len(orders[0]) == 4 * 16


def test_only_what_is_listened_to_is_delivered() -> None:
    model = tiny_models.mixtral().requires_grad_(False)
    wanted = {name: one for name, one in matrices(model).items() if name.endswith("1.mlp.experts.down_proj.2")}
    found: list[str] = []
    tap_expert_gradients(wanted, lambda name, _x, _g: found.append(name))
    model(**BATCH).loss.backward()
    assert found == list(wanted)
    hooked = [module for module in model.modules() if fused_parameters(module) and "forward" in vars(module)]
    assert len(hooked) == 1  # the other layer computes as ever


# The adapter ----------------------------------------------------------------------------------------------------------


def with_merged_weights(model: Any, adapter: TasoAdapter) -> dict[str, Tensor]:
    """Every adapted parameter plus s · B A, experts slice by slice, differentiable in the flat parameter."""
    weights: dict[str, Tensor] = {}
    for name, pair in adapter.factors(adapter()).items():
        target, delta = get_target(model, name), adapter.scaling * (pair.B @ pair.A)
        if isinstance(target, ExpertMatrix):
            parameter = name.rpartition(".")[0]
            slices = list(weights.get(parameter, target.parameter).unbind())
            slices[target.index] = slices[target.index] + (delta.t() if target.transposed else delta)
            weights[parameter] = torch.stack(slices)
        else:
            weights[f"{name}.weight"] = model.get_parameter(f"{name}.weight") + delta
    return weights


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("structure", ["union", "intersection"])
@every_model
def test_output_and_gradient_are_those_of_merged_slices(make: Make, structure: str, checkpointing: bool) -> None:
    """In fp64, but for the routers, some of which compute in fp32: rounding there is 1e-7."""
    model = make().double().requires_grad_(False)
    model.set_experts_implementation("eager")  # the only one of transformers' own that computes in fp64
    adapter = trained_adapter(model, structure=structure, rank=2, scaling=1.7, dtype=torch.float64, experts=True)
    expected = functional_call(model, with_merged_weights(model, adapter), kwargs=BATCH)
    (wanted,) = torch.autograd.grad(expected.loss, adapter.flat)
    base = model(**BATCH).logits
    adapter.attach(model)
    found = (checkpointed(model) if checkpointing else model)(**BATCH)
    found.loss.backward()
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-6, atol=1e-6)
    assert (found.logits - base).abs().max() > 0.1
    assert adapter.flat.grad is not None
    torch.testing.assert_close(adapter.flat.grad, wanted, rtol=1e-5, atol=1e-7)
    gradients = adapter.compact(adapter.flat.grad)
    assert all(gradients[name].any() for name in adapter.regions if name.endswith("gate_up_proj.0"))


@every_model
def test_starts_as_the_base_and_detaches_to_it(make: Make) -> None:
    model = make().requires_grad_(False)
    before = model(**BATCH).logits
    regions = trained_adapter(model, experts=True).regions
    adapter = TasoAdapter(regions, structure="union", rank=1, scaling=1.0, seed=0, dtype=torch.float32)
    adapter.attach(model)
    torch.testing.assert_close(model(**BATCH).logits, before, rtol=1e-4, atol=1e-5)
    adapter.detach(model)
    assert torch.equal(model(**BATCH).logits, before)
    assert not any("forward" in vars(module) for module in model.modules())


def test_learns() -> None:
    model = tiny_models.mixtral().requires_grad_(False)
    adapter = trained_adapter(model, ["gate_up_proj", "down_proj"], experts=True)  # experts alone
    with torch.no_grad():
        adapter.flat.mul_(0.1)
    adapter.attach(model)
    losses = losses_of_steps(model, adapter, BATCH)
    assert losses[-1] < 0.7 * losses[0]


@every_model
def test_generates_with_and_without_cache(make: Make) -> None:
    model = make().requires_grad_(False)
    trained_adapter(model, experts=True).attach(model)
    prompt = BATCH["input_ids"][:1, :5]
    with torch.no_grad():
        cached, plain = (
            model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=use_cache)
            for use_cache in (True, False)
        )
    assert torch.equal(cached, plain)


# PEFT's files ---------------------------------------------------------------------------------------------------------


def opened_by_peft(model: Any, adapter: TasoAdapter, folder: Path) -> Any:
    from peft import PeftModel

    experts = fused_sizes(model, adapter.regions)
    config = peft_config(
        adapter, base_model_name_or_path="base", task_type="CAUSAL_LM",
        module_names=[name for name, _ in model.named_modules()], fan_in_fan_out=False, modules_to_save=[],
        experts=list(experts), fuses_experts=True,
    )  # fmt: skip
    save_adapter(folder, adapter, adapter.flat.detach(), config=config, head={}, experts=experts)
    return PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


@pytest.mark.parametrize(
    "targets",
    [None, ["q_proj", "down_proj"], ["gate_up_proj"], [r".*\.1\..*(gate_up|down)_proj\.[13]", "k_proj"]],
    ids=["all", "one parameter", "experts alone", "some experts of one layer"],
)
@pytest.mark.parametrize(("structure", "rank"), [("union", 2), ("intersection", 1)])
@every_model
def test_peft_computes_what_the_live_adapter_does(
    tmp_path: Path, make: Make, structure: str, rank: int, targets: list[str] | None
) -> None:
    model = make().requires_grad_(False)
    base = model(**BATCH).logits
    adapter = trained_adapter(model, targets, structure=structure, rank=rank, scaling=1.5, experts=True)
    opened = opened_by_peft(model, adapter, tmp_path)
    adapter.attach(model)
    live = model(**BATCH).logits
    assert (live - base).abs().max() > 0.05
    torch.testing.assert_close(opened(**BATCH).logits, live, rtol=1e-4, atol=1e-4)
    again, _ = load_adapter(tmp_path)
    assert torch.equal(again.flat, adapter.flat)
    assert list(again.regions) == list(adapter.regions)


@pytest.mark.parametrize("experts", [True, False], ids=["adapted", "left alone"])
@pytest.mark.parametrize(
    "make", [partial(tiny_models.qwen3_moe, dense_layers=(0,)), tiny_models.qwen2_moe], ids=["dense layer", "shared"]
)
def test_dense_layers_are_not_taken_for_experts(tmp_path: Path, make: Make, experts: bool) -> None:
    """Their linears have the names that experts had before they were fused."""
    model = make().requires_grad_(False)
    adapter = trained_adapter(model, experts=experts)
    assert any(name.endswith("gate_proj") for name in adapter.regions)
    opened = opened_by_peft(model, adapter, tmp_path)
    held = {name.replace(".default", "") for name, _ in opened.named_parameters() if ".lora_" in name}
    assert held == set(load_file(tmp_path / PEFT_FILE))
    adapter.attach(model)
    torch.testing.assert_close(opened(**BATCH).logits, model(**BATCH).logits, rtol=1e-4, atol=1e-4)


def test_pefts_tensors_by_name_and_shape(tmp_path: Path) -> None:
    """The later parameter's wrapper lies around the earlier one's; R = 2, E = 4."""
    model = tiny_models.mixtral().requires_grad_(False)
    opened_by_peft(model, trained_adapter(model, experts=True), tmp_path)
    config = json.loads((tmp_path / PEFT_CONFIG_FILE).read_text())
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert config["target_parameters"] == [
        f"model.layers.{layer}.mlp.experts.{name}" for layer in (0, 1) for name in ("gate_up_proj", "down_proj")
    ]
    tensors = load_file(tmp_path / PEFT_FILE)
    experts = "base_model.model.model.layers.1.mlp.experts"
    shapes = {
        name.removeprefix(f"{experts}."): tuple(value.shape)
        for name, value in tensors.items()
        if name.startswith(experts)
    }
    assert shapes == {
        "base_layer.lora_A.weight": (2 * 4, 32),
        "base_layer.lora_B.weight": (96, 2 * 4),
        "lora_A.weight": (2 * 4, 48),
        "lora_B.weight": (32, 2 * 4),
    }


@every_model
def test_slices_merge_like_any_weight(make: Make) -> None:
    model = make().requires_grad_(False)
    adapter = trained_adapter(model, rank=2, scaling=1.5, experts=True)
    merged = copy.deepcopy(model)
    for name in adapter.regions:
        target: Any = get_target(merged, name)
        transposed = target.transposed if isinstance(target, ExpertMatrix) else False
        target.weight.data.copy_(merge_into(target.weight.data, adapter.delta_weight(name), transposed=transposed))
    adapter.attach(model)
    torch.testing.assert_close(merged(**BATCH).logits, model(**BATCH).logits, rtol=1e-4, atol=1e-4)
