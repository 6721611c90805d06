"""The loss in chunks: against cross entropy written out in fp64, for every way a model finishes its logits."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from taso_ds.data.encode import IGNORED
from taso_ds.objectives import chunked_loss
from taso_ds.objectives.chunked_loss import LanguageModelLoss, chunked_loss_sum
from taso_ds.objectives.loss import lm_loss_sum

BATCH = tiny_models.token_batch()
EMPTY = {**BATCH, "labels": torch.full_like(BATCH["labels"], IGNORED)}
UNITS = 8 + 8 + 5  # 3 rows of 12 tokens, 4 of them prompt, less 3 of padding in the last row


def small(name: str, **changes: Any) -> Any:
    """One of transformers' models by its type, in two tiny blocks."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    kind: Any = CONFIG_MAPPING[name]
    config = kind(
        vocab_size=tiny_models.VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, **changes,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def with_bias() -> Any:
    """Phi's output layer has one."""
    model = small("phi")
    nn.init.normal_(model.lm_head.bias)
    return model


MODELS = {
    "llama": tiny_models.llama,
    "tied": lambda: tiny_models.llama(tied=True),
    "gpt2": tiny_models.gpt2,
    "bias": with_bias,
    "capped": lambda: small("gemma2", head_dim=8, final_logit_softcapping=2.0),
    "divided": lambda: small("granite", logits_scaling=3.0),
    "scaled": lambda: small("cohere", logit_scale=0.25),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]().requires_grad_(False)


@pytest.fixture(autouse=True)
def five_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of five: 21 positions make four whole ones and a rest."""
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 5 * 4 * tiny_models.VOCABULARY)


@contextmanager
def hidden_states(model: Any) -> Iterator[list[Tensor]]:
    """Yield what the output layer is given, as a leaf that collects its gradient."""
    found: list[Tensor] = []

    def cut(_layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        found.append(args[0].detach().requires_grad_(torch.is_grad_enabled()))
        return (found[-1],)

    handle = model.get_output_embeddings().register_forward_pre_hook(cut)
    try:
        yield found
    finally:
        handle.remove()


def longhand(model: Any, batch: dict[str, Tensor]) -> tuple[float, Tensor]:
    """-Σ log softmax(logits at t - 1)[label at t] from the model's own logits, and the hidden states' gradient."""
    with hidden_states(model) as found:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    total = logits.new_zeros(())
    for row in range(batch["labels"].shape[0]):
        for position in range(1, batch["labels"].shape[1]):
            label = int(batch["labels"][row, position])
            if label != -100:
                scores = logits[row, position - 1]
                total = total + scores.exp().sum().log() - scores[label]
    total.backward()
    (hidden,) = found
    assert hidden.grad is not None
    return float(total.detach()), hidden.grad


def in_chunks(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, int, Tensor]:
    """Loss, units and the gradient at the hidden states."""
    compute = LanguageModelLoss()
    compute(model, EMPTY)  # looks at the model
    with hidden_states(model) as found:
        loss, units = compute(model, batch)
    loss.backward()
    (hidden,) = found
    assert hidden.grad is not None
    return loss.detach(), units, hidden.grad


def test_loss_and_gradient_are_those_written_out(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    loss, units, gradient = in_chunks(model, BATCH)
    assert "at once" not in caplog.text
    expected, expected_gradient = longhand(model, BATCH)
    assert units == UNITS
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert float((gradient - expected_gradient).norm() / expected_gradient.norm()) < 1e-6
    supervised = torch.zeros_like(gradient, dtype=torch.bool)
    supervised[:, :-1][BATCH["labels"][:, 1:] != IGNORED] = True
    assert not gradient[~supervised].any()  # prompt, padding and the last position


@pytest.mark.parametrize("name", ["capped", "divided", "scaled"])
def test_the_finish_of_the_logits_matters(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the cases above would pass without it."""
    model = MODELS[name]().requires_grad_(False)
    right = longhand(model, BATCH)[0]
    monkeypatch.setattr(chunked_loss, "finish_logits", lambda raw, _config: raw)
    assert chunked_loss_sum(model, BATCH)[0].item() != pytest.approx(right, rel=0.01)


def test_an_empty_batch_is_zero_with_a_gradient_and_one_call(model: Any) -> None:
    calls: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    compute = LanguageModelLoss()
    compute(model, BATCH)
    calls.clear()
    with hidden_states(model) as found:
        loss, units = compute(model, EMPTY)
    loss.backward()
    assert (loss.item(), units) == (0.0, 0)
    assert calls == [1]  # whatever the data: ranks must issue the same collectives
    assert found[0].grad is not None
    assert not found[0].grad.any()


def test_any_chunks_add_up_and_the_same_chunks_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.llama().requires_grad_(False)
    loss, _, gradient = in_chunks(model, BATCH)
    again, _, same = in_chunks(model, BATCH)
    assert torch.equal(loss, again)
    assert torch.equal(gradient, same)
    for size in (1, 4 * tiny_models.VOCABULARY * 21, 1 << 40):  # less than a row: one at a time
        monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", size)
        other, _, of_other = in_chunks(model, BATCH)
        assert other.item() == pytest.approx(loss.item(), rel=1e-6)
        torch.testing.assert_close(of_other, gradient, rtol=1e-4, atol=1e-6)


def test_bf16_logits_are_summed_in_fp32() -> None:
    """The model's own bf16 logits go in; what backward gets is rounded to bf16 once."""
    model = tiny_models.llama().bfloat16().requires_grad_(False)
    loss, _, gradient = in_chunks(model, BATCH)
    expected, expected_gradient = longhand(model, BATCH)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert gradient.dtype == torch.bfloat16
    assert float((gradient - expected_gradient).float().norm() / expected_gradient.float().norm()) < 2.0**-7


def test_without_gradients_none_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.llama().requires_grad_(False)
    expected = longhand(model, BATCH)[0]

    def refuse(*_args: Any) -> None:
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    with torch.no_grad():
        loss, _ = LanguageModelLoss()(model, BATCH)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert not loss.requires_grad


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_block_learns_the_same(checkpointed: bool) -> None:
    """Gradients of trained parameters below the output layer, with blocks recomputed or not."""
    model = tiny_models.llama().requires_grad_(False).train()
    block = model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    loss, _ = lm_loss_sum(model, BATCH)
    (expected,) = torch.autograd.grad(loss * 0.25, block)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    forwards: list[int] = []
    compute = LanguageModelLoss()
    compute(model, EMPTY)
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: forwards.append(1))
    loss, _ = compute(model, BATCH)
    (gradient,) = torch.autograd.grad(loss * 0.25, block)
    assert len(forwards) == 1 + checkpointed
    assert float((gradient - expected).norm() / expected.norm()) < 1e-6


# Memory ---------------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                self.bytes = max(self.bytes, value.untyped_storage().nbytes())
        return result


def test_no_tensor_is_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """512 positions of 150k fp32 logits would be 307 MB."""
    monkeypatch.undo()
    assert chunked_loss.CHUNK_BYTES == 64 << 20
    vocabulary, positions = 150_000, 512
    model = small_llama_with(vocabulary).requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda _m, _a, output: output.requires_grad_(True))
    batch = tiny_models.token_batch(rows=1, length=positions + 1 + 3, prompt=1, vocabulary=vocabulary)
    compute = LanguageModelLoss()
    with LargestTensor() as seen:
        loss, units = compute(model, batch)
        loss.backward()
    assert units == positions
    assert 0.9 * chunked_loss.CHUNK_BYTES < seen.bytes <= chunked_loss.CHUNK_BYTES
    with LargestTensor() as seen, torch.no_grad():
        lm_loss_sum(model, batch)
    assert seen.bytes >= 4 * vocabulary * positions  # so the bound can be missed


def small_llama_with(vocabulary: int) -> Any:
    """A Llama whose embedding and output matrices, 4.8 MB each, are smaller than a chunk."""
    return tiny_models.llama(
        layers=1, vocab_size=vocabulary, hidden_size=8, intermediate_size=8, num_attention_heads=1,
        num_key_value_heads=1,
    ).train()  # fmt: skip


# Models that do not allow it ------------------------------------------------------------------------------------------


class Shifted(nn.Module):
    """Adds something to the logits that no configuration tells of."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_models.llama()
        self.config = self.model.config

    def get_output_embeddings(self) -> Any:
        return self.model.lm_head

    def forward(self, **inputs: Any) -> Any:
        output = self.model(**inputs)
        output.logits = output.logits + torch.arange(output.logits.shape[-1])
        return output


class WithoutOutputLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_models.llama()

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


def trained() -> Any:
    model = tiny_models.llama(tied=True)
    model.get_input_embeddings().requires_grad_(True)  # the same matrix
    return model


@pytest.mark.parametrize(
    ("make", "adapted", "reason"),
    [
        (Shifted, (), "does more to its logits"),
        (lambda: small("recurrent_gemma", logits_soft_cap=2.0), (), "does more to its logits"),
        (WithoutOutputLayer, (), "names no linear output layer"),
        (trained, (), "is trained"),
        (tiny_models.llama, ("model.layers.0.mlp.up_proj", "lm_head"), "is a target"),
    ],
    ids=["unknown finish", "unknown cap", "no output layer", "trained", "target"],
)
def test_where_chunks_would_be_wrong_all_logits_are_computed_and_one_line_says_so(
    make: Any, adapted: tuple[str, ...], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger=chunked_loss.__name__)
    model = make()
    if reason != "is trained":
        model.requires_grad_(False)
    compute = LanguageModelLoss(adapted)
    for _ in range(2):
        loss, units = compute(model, BATCH)
        expected, same = lm_loss_sum(model, BATCH)
        assert torch.equal(loss, expected)
        assert units == same
    (line,) = caplog.messages
    assert reason in line


def test_hooks_are_gone_afterwards() -> None:
    model = tiny_models.llama().requires_grad_(False)
    LanguageModelLoss()(model, BATCH)
    with pytest.raises(RuntimeError, match="out of bounds"):
        chunked_loss_sum(model, {**BATCH, "labels": BATCH["labels"] * 0 + tiny_models.VOCABULARY})  # no such token
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
