"""Quantized bases on two ranks: bit for bit what one process quantizes, scored and trained alike at every stage."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import parity_case as case
import pytest
import quantized_ranks
import tiny_models
import torch
import torch.nn.functional as F
from forked import ForkServer
from load_ranks import digest
from test_parity import assert_regions, gradients, weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from taso_ds.adapters.targets import find_targets
from taso_ds.data.collate import collate
from taso_ds.models.fingerprint import fingerprint

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(600)]

STAGES = quantized_ranks.STAGES
BITS = list(STAGES)
WHOLE = "whole on every rank"
bits_and_stages = pytest.mark.parametrize(("bits", "stage"), [(bits, stage) for bits in BITS for stage in STAGES[bits]])


def uneven_llama() -> Any:
    """A Llama in which blocks of 64 weights lie across the border of two ranks: q_proj is 24 × 24 = 9 blocks."""
    return tiny_models.llama(
        seed=5, hidden_size=24, intermediate_size=28, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=32,
    )  # fmt: skip


def deep_llama() -> Any:
    """A Llama of 24 layers of 163,840 weights each, nearly all that it has."""
    return tiny_models.llama(
        layers=24, vocab_size=32, hidden_size=128, intermediate_size=256, num_attention_heads=2,
        max_position_embeddings=16,
    ).bfloat16()  # fmt: skip


def merged_mixtral() -> Any:
    """A Mixtral, whose experts are merged as they are loaded and stay in 16 bits: its attention is quantized."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(4)
    config = MixtralConfig(
        vocab_size=tiny_models.VOCABULARY, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1,
        max_position_embeddings=16,
    )  # fmt: skip
    return MixtralForCausalLM(config)


# Weights stored transposed; a new head and a linear outside the blocks; experts, merged on the way; a checkpoint that
# transformers splits, which it therefore has to load.
OTHERS = {
    "gpt2": tiny_models.gpt2, "bert": lambda: tiny_models.bert().bert, "mixtral": merged_mixtral,
    "hrm": tiny_models.hrm,
}  # fmt: skip


def settings(bits: str) -> BitsAndBytesConfig:
    if bits == "8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def by_bitsandbytes(folder: Path, bits: str, *, dtype: torch.dtype = torch.float32) -> Any:
    """The model as transformers and bitsandbytes quantize it in one process."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=settings(bits))
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All models: to be quantized, and quantized by bitsandbytes already."""
    root: Path = tmp_path_factory.mktemp("quantized")
    models = {"base": uneven_llama, "deep": deep_llama} | {f"others/{name}": make for name, make in OTHERS.items()}
    for name, make in models.items():
        tiny_models.save(make(), root / name)
    for bits in BITS:
        by_bitsandbytes(root / "base", bits).save_pretrained(root / f"stored_{bits}")
    by_bitsandbytes(root / "others" / "mixtral", "4").save_pretrained(root / "stored_mixtral")
    return root


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    return folder / "base"


@pytest.fixture(scope="module")
def found(fork_server: ForkServer, folder: Path) -> Any:
    return fork_server.run_on_ranks(quantized_ranks.run_all, 2, str(folder))


# The weights ----------------------------------------------------------------------------------------------------------


def whole_digests(folder: Path, bits: str, dtype: torch.dtype) -> dict[str, list[str]]:
    found = {}
    for name, module in by_bitsandbytes(folder, bits, dtype=dtype).named_modules():
        if type(module).__name__ not in ("Linear4bit", "Linear8bitLt"):
            continue
        packed, weight = module.weight.data.flatten().view(torch.uint8), module.weight
        if bits == "8":
            found[name] = [digest(packed), digest(weight.SCB)]
        else:
            state = weight.quant_state
            found[name] = [digest(packed), digest(state.absmax), digest(state.offset), digest(state.state2.absmax)]
    return found


@bits_and_stages
def test_every_bit_is_that_of_the_whole_model_quantized(found: Any, base: Path, bits: str, stage: int) -> None:
    expected = whole_digests(base, bits, torch.float32)
    assert len(expected) == 2 * len(tiny_models.LLAMA_LINEARS)
    assert found[bits]["train"][stage]["digests"] == expected
    if stage in quantized_ranks.STORED_STAGES:
        assert found[bits]["stored"][stage]["digests"] == expected


@pytest.mark.parametrize("bits", BITS)
def test_every_bit_in_bf16(found: Any, base: Path, bits: str) -> None:
    whole, sharded = found[bits]["bf16"]
    assert whole == sharded == whole_digests(base, bits, torch.bfloat16)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("bits", BITS)
def test_other_models_have_the_same_bits_at_stages_0_and_3(found: Any, bits: str, name: str) -> None:
    whole, sharded = found[bits]["others"][name]
    assert (whole["packed"], whole["plain"]) == (sharded["packed"], sharded["plain"])
    # hrm: five of attention and three of the MLP in each of two layers of both modules.
    assert len(whole["packed"]) == {"gpt2": 8, "bert": 12, "mixtral": 4, "hrm": 8 * 2 * 2}[name]
    if name == "bert":
        assert {"bert.pooler.dense.weight", "classifier.weight"} <= whole["plain"].keys()
    assert any(WHOLE in line and "merges or splits" in line for line in sharded["said"]) == (name == "hrm")


def test_a_quantized_checkpoint_with_experts_is_the_same_base(found: Any) -> None:
    whole, sharded = found["stored_mixtral"]
    expected = found["4"]["others"]["mixtral"][0]["packed"]
    assert whole["packed"] == sharded["packed"] == expected
    assert whole["plain"] == sharded["plain"]
    assert not any(WHOLE in line for line in sharded["said"])
    # q and o 16 x 16, k and v 16 x 16; two experts of three 16 x 8 matrices, a router 2 x 16, embedding and output of
    # 259 tokens, three norms: what stays in 16 bits.
    others = 6 * 16 * 8 + 2 * 16 + 2 * tiny_models.VOCABULARY * 16 + 3 * 16
    assert f"{100 * 4 * 256 / (4 * 256 + others):.0f} % of the weights in 4 bits" in " ".join(sharded["said"])


def test_memory_of_loading_is_the_quantized_share_and_a_layer(found: Any) -> None:
    memory = found["memory"]
    layer = 2 * 163_840  # bytes in bf16
    assert memory["shard"] >= memory["whole"] / 2
    assert memory["peak"] <= memory["shard"] + memory["statistics"] + layer, memory
    assert memory["shard"] + memory["statistics"] + layer < 0.8 * memory["whole"], memory


@pytest.mark.parametrize("bits", [*BITS, "16"])
def test_gathered_weights_are_not_kept_for_backward(found: Any, bits: str) -> None:
    """As bitsandbytes' own layers and plain ``F.linear`` do: every rank then holds the whole model between passes."""
    assert found[bits]["kept"] == [2 * len(tiny_models.LLAMA_LINEARS), 0]


# Scoring --------------------------------------------------------------------------------------------------------------


@contextmanager
def products(model: Any) -> Iterator[dict[str, Tensor]]:
    """Sum ``gᵀx`` of every target while backward runs: what ``weight.grad`` would be."""
    found: dict[str, Tensor] = {}

    def listen(name: str, module: nn.Module) -> Any:
        def forward(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            def backward(grad: Tensor) -> None:
                found[name] = found.get(name, torch.zeros(())) + grad.flatten(0, 1).t() @ args[0].detach().flatten(0, 1)

            output.register_hook(backward)

        return module.register_forward_hook(forward)

    handles = [listen(name, module) for name, module in find_targets(model).linears.items()]
    handles.append(model.get_input_embeddings().register_forward_hook(lambda *args: args[-1].requires_grad_(True)))
    yield found
    for handle in handles:
        handle.remove()


def reference(folder: Path, bits: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean signed gradients of the quantized model in one process, and its dequantized weights.

    NF4: plain autograd on a model with the dequantized weights. Int8: bitsandbytes' own layers on the same batches, for
    they round inputs too, and which inputs are outliers depends on the batch.
    """
    model = by_bitsandbytes(folder, bits)
    dequantized = {
        name: dequantize_bnb_weight(module.get_parameter("weight"), getattr(module, "state", None)).detach().float()
        for name, module in find_targets(model).linears.items()
    }
    if bits == "4":
        plain: Any = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            for name, weight in dequantized.items():
                plain.get_submodule(name).weight.copy_(weight)
        return gradients(plain, case.CALIBRATION), dequantized
    rows = sorted(case.CALIBRATION, key=lambda row: len(row.input_ids))
    size, tokens = quantized_ranks.ROWS_PER_BATCH, 0
    model.eval()
    with products(model) as found:
        for start in range(0, len(rows), size):
            batch = collate(rows[start : start + size], pad_id=0)
            labels = batch["labels"][:, 1:].flatten()
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            F.cross_entropy(logits[:, :-1].flatten(0, 1), labels, ignore_index=-100, reduction="sum").backward()
            tokens += int((labels != -100).sum())
    return {name: found[name] / tokens for name in dequantized}, dequantized


@pytest.mark.parametrize("bits", BITS)
def test_regions_are_those_of_one_process(found: Any, base: Path, bits: str) -> None:
    """From the dequantized weights and, when asked for, from the original ones under the same gradients."""
    grads, dequantized = reference(base, bits)
    originals = weights(AutoModelForCausalLM.from_pretrained(base))
    for stage in STAGES[bits]:
        scored = found[bits]["score"][stage]
        assert_regions(scored["loaded"], {name: (dequantized[name] * grad).abs() for name, grad in grads.items()})
        assert_regions(scored["original"], {name: (originals[name] * grad).abs() for name, grad in grads.items()})


def overlap(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Share of core rows and columns that two scorings have in common."""
    kept = [(set(one[name][side]), set(other[name][side])) for name in one for side in ("rows", "cols")]
    return sum(len(a & b) for a, b in kept) / sum(len(a) for a, _ in kept)


@pytest.mark.parametrize(("bits", "least"), [("4", 0.8), ("8", 0.97)])
def test_original_and_dequantized_weights_score_much_alike(found: Any, bits: str, least: float) -> None:
    """NF4 moves weights by some percent, int8 by some tenths: most of the region stays."""
    scored = found[bits]["score"][3]
    share = overlap(scored["loaded"], scored["original"])
    print(f"{bits} bits: {share:.1%} of the core rows and columns in common")
    assert least <= share <= 1.0
    assert scored["loaded"] != scored["original"]


@bits_and_stages
def test_the_base_is_recognized_quantized_or_not(found: Any, base: Path, bits: str, stage: int) -> None:
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert found[bits]["score"][stage]["fingerprint"] == fingerprint(find_targets(plain))


# Training -------------------------------------------------------------------------------------------------------------


@bits_and_stages
def test_training_is_the_same_at_every_stage(found: Any, bits: str, stage: int) -> None:
    losses = torch.tensor(found[bits]["train"][stage]["loss"])
    torch.testing.assert_close(losses, torch.tensor(found[bits]["train"][0]["loss"]), rtol=1e-5, atol=0)
    assert losses.unique().numel() == case.STEPS  # something is learned
    if stage == 3:
        torch.testing.assert_close(torch.tensor(found[bits]["checkpointed"]), losses, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_the_baseline_trains_on_quantized_weights(found: Any, bits: str) -> None:
    whole, sharded = found[bits]["lora"]
    torch.testing.assert_close(torch.tensor(sharded), torch.tensor(whole), rtol=1e-5, atol=0)
    assert len(set(whole)) == case.STEPS


@pytest.mark.parametrize("stage", quantized_ranks.STORED_STAGES)
@pytest.mark.parametrize("bits", BITS)
def test_a_quantized_checkpoint_trains_as_one_quantized_here(found: Any, bits: str, stage: int) -> None:
    losses = torch.tensor(found[bits]["stored"][stage]["loss"])
    torch.testing.assert_close(losses, torch.tensor(found[bits]["train"][0]["loss"]), rtol=1e-5, atol=0)
