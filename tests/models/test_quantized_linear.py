"""Quantized linears: ranges against the whole, products against bitsandbytes' own layers, bytes left alone."""

import itertools
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import QuantState
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from taso_ds.distributed.zero_config import ZeroConfig
from taso_ds.models.arguments import ModelArguments
from taso_ds.models.load import load_base_model
from taso_ds.models.quantization import adopt_linears, quantization_of
from taso_ds.models.quantized_linear import (
    NF4,
    Format,
    Int8,
    QuantizedLinear,
    quantize_range,
    share_statistics,
    weight_of,
)
from taso_ds.models.spec import read_spec

pytestmark = pytest.mark.usefixtures("on_cpu")

STAGE_0 = ZeroConfig({"zero_optimization": {"stage": 0}, "bf16": {"enabled": False}})
FORMATS: list[Format] = [NF4(), Int8(6.0)]
both = pytest.mark.parametrize("format", FORMATS, ids=["4 bits", "8 bits"])


def linear(format: Format, rows: int, cols: int, *, bias: bool = False) -> QuantizedLinear:
    values = nn.Parameter(torch.randn(rows)) if bias else None
    return QuantizedLinear(cols, rows, bias=values, format=format, storage=torch.float32)


def fill(module: QuantizedLinear, weight: Tensor, borders: list[int]) -> Tensor:
    """Quantize ``weight`` in ranges of bytes; complete the module and return the bytes."""
    flat, size = weight.flatten(), module.num_bytes
    packed, parts = torch.empty(size, dtype=torch.uint8), []

    def read(out: Tensor, first: int) -> None:
        out.copy_(flat[first : first + out.numel()])

    edges = sorted({0, size, *(min(border, size) for border in borders)})
    for first, end in itertools.pairwise(edges):
        parts.append(quantize_range(packed[first:end], first, module=module, dtype=torch.float32, read=read))
    share_statistics(module, parts, torch.float32)
    module.weight = nn.Parameter(packed.view(torch.float32)[:, None], requires_grad=False)
    return packed


def by_bitsandbytes(format: Format, weight: Tensor, bias: Tensor | None = None) -> Any:
    rows, cols = weight.shape
    quantized: Any = bnb.nn  # whose tensors' `to` mypy cannot read
    if isinstance(format, NF4):
        module: Any = bnb.nn.Linear4bit(cols, rows, bias is not None, torch.float32, quant_type="nf4")
        module.weight = quantized.Params4bit(weight.clone(), quant_type="nf4", module=module).to("cpu")
        module.support_avx512bf16_for_cpu = False
    else:
        assert isinstance(format, Int8)
        module = bnb.nn.Linear8bitLt(cols, rows, bias is not None, has_fp16_weights=False, threshold=format.threshold)
        module.weight = quantized.Int8Params(weight.clone(), requires_grad=False).to("cpu")
    if bias is not None:
        module.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return module


@both
@settings(deadline=None, max_examples=40)
@given(st.integers(1, 21), st.sampled_from([8, 24, 64, 72]), st.lists(st.integers(0, 800), max_size=4))
def test_ranges_cut_anywhere_are_the_whole(format: Format, rows: int, cols: int, borders: list[int]) -> None:
    """Borders inside a block of 64, inside a row, inside a byte's neighbour; a last block that is not full."""
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows * cols))
    module, theirs = linear(format, rows, cols), by_bitsandbytes(format, weight)
    packed = fill(module, weight, borders)
    assert torch.equal(packed, theirs.weight.data.flatten().view(torch.uint8))
    if isinstance(format, NF4):
        found, state = module.statistics, theirs.weight.quant_state
        assert isinstance(found, QuantState)
        assert torch.equal(found.absmax, state.absmax)
        assert torch.equal(found.state2.absmax, state.state2.absmax)
        assert torch.equal(found.offset, state.offset)
        assert found == state
    else:
        assert isinstance(module.statistics, Tensor)
        assert torch.equal(module.statistics, theirs.weight.SCB)


@both
@pytest.mark.parametrize("training", [True, False])
def test_output_and_input_gradient_are_those_of_bitsandbytes(format: Format, training: bool) -> None:
    weight, bias = torch.randn(16, 64), torch.randn(16)
    ours, theirs = linear(format, 16, 64), by_bitsandbytes(format, weight, bias)
    ours.bias = nn.Parameter(bias, requires_grad=False)
    fill(ours, weight, [])
    inputs = torch.randn(2, 5, 64)
    inputs[0, 0, 3] = 8.0  # an outlier to LLM.int8()
    found = []
    for module in (ours, theirs):
        module.train(training)
        given = inputs.clone().requires_grad_(True)
        output = module(given)
        output.square().sum().backward()
        found.append((output.detach(), given.grad))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-5)
    plain = inputs @ weight_of(ours, ours.weight).t() + bias
    torch.testing.assert_close(found[0][0], plain, rtol=0, atol=0 if isinstance(format, NF4) or training else 0.3)


@both
def test_the_dequantized_weight_is_near_the_original(format: Format) -> None:
    weight = torch.randn(48, 64)
    module = linear(format, 48, 64)
    fill(module, weight, [100])
    error = float((weight_of(module, module.weight) - weight).norm() / weight.norm())
    assert error < (0.12 if isinstance(format, NF4) else 0.01)
    assert weight_of(module, module.weight).shape == weight.shape


def test_8_bits_train_without_the_products_of_llm_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """These take inputs to float16, where 70,000 is infinite, and quantize them: on a GPU only, if training asks."""

    def matmul(*_: Any, **__: Any) -> None:
        raise AssertionError("LLM.int8()")

    monkeypatch.setattr(bnb, "matmul", matmul)
    weight, bias = torch.randn(16, 64), torch.randn(16)
    module = linear(Int8(6.0), 16, 64)
    module.bias = nn.Parameter(bias, requires_grad=False)
    fill(module, weight, [])
    given = torch.randn(2, 5, 64)
    given[0, 0, 3] = 70_000.0
    inputs, plain = given.clone().requires_grad_(True), given.clone().requires_grad_(True)
    expected = nn.functional.linear(plain, weight_of(module, module.weight), bias)
    found = module.train()(inputs)
    assert torch.equal(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    assert inputs.grad is not None
    assert plain.grad is not None
    torch.testing.assert_close(inputs.grad, plain.grad)
    with pytest.raises(AssertionError, match="LLM"):  # an evaluation is what a user's own code would compute
        module.eval()(given)


# The trap -------------------------------------------------------------------------------------------------------------


def test_a_forward_in_eval_mode_changes_no_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes repacks NF4 weights in place in the first forward in eval mode, on CPUs with AVX512-BF16.

    What it wrote would be read as weights in another order once ZeRO-3 gathers the old bytes again, and no gradient
    passes it. The switch is thrown here on every machine; the layers of a loaded base have no such switch.
    """

    def repack(*_: Any) -> None:
        raise AssertionError("repacked")

    monkeypatch.setattr(bnb.nn.modules, "_convert_weight_packed_for_cpu", repack)
    weight = torch.randn(64, 64)
    theirs, ours = by_bitsandbytes(NF4(), weight), linear(NF4(), 64, 64)
    theirs.support_avx512bf16_for_cpu = True
    packed = fill(ours, weight, []).clone()
    inputs = torch.randn(3, 64)
    with pytest.raises(AssertionError, match="repacked"):  # the trap is still there
        theirs.eval()(inputs)
    with torch.no_grad():
        before = ours.eval()(inputs)
    assert torch.equal(ours.weight.data.flatten().view(torch.uint8), packed)
    given = inputs.clone().requires_grad_(True)
    after = ours(given)
    assert torch.equal(before, after.detach())
    after.sum().backward()
    assert given.grad is not None
    torch.testing.assert_close(given.grad, weight_of(ours, ours.weight).sum(0).expand_as(inputs))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_has_no_layer_of_bitsandbytes(llama_folder: Path, bits: int) -> None:
    flags: dict[str, Any] = {f"load_in_{bits}bit": True}
    arguments = ModelArguments(model_name_or_path=str(llama_folder), bf16=False, **flags)
    base = load_base_model(read_spec(arguments, str(llama_folder)), seed=0, zero=STAGE_0)
    kinds = {type(module).__name__ for module in base.model.modules()}
    assert "QuantizedLinear" in kinds
    assert not kinds & {"Linear4bit", "Linear8bitLt"}
    assert type(base.model.lm_head) is nn.Linear
    assert not any(hasattr(module, "support_avx512bf16_for_cpu") for module in base.model.modules())


def test_bytes_of_a_checkpoint_survive_another_storage_type(llama_folder: Path) -> None:
    """Stored as uint8 or as bf16, in the engine as fp32: read as bytes, never cast."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    packed = []
    for storage in (torch.uint8, torch.bfloat16):
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=storage)
        model: Any = AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=settings)
        quantization = quantization_of(ModelArguments(bf16=False), model.config)
        assert quantization is not None
        adopt_linears(model, quantization)
        weight = model.model.layers[1].mlp.up_proj.weight
        assert weight.dtype == torch.float32
        packed.append(weight.data.flatten().view(torch.uint8))
    assert torch.equal(*packed)
