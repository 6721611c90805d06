"""What scoring takes beyond a plain backward: fp32 sums of parameters / ranks, and no more than two matrices beside."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from configs import zero_config
from forked import ForkServer
from peak_memory import peak_bytes
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from taso_ds.adapters.selection import ELEMENT_FRACTION_LADDER
from taso_ds.adapters.targets import find_targets
from taso_ds.distributed import comm, engine
from taso_ds.distributed.zero import full_numel, is_partitioned
from taso_ds.models.load_sharded import partition_whole
from taso_ds.objectives.loss import lm_loss_sum
from taso_ds.scoring.gradient_sum import GradientSum
from taso_ds.scoring.score import score_regions, scoring_mode
from taso_ds.scoring.scoring_pass import ScoringSettings

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(600)]

RANKS = (2, pytest.param(4, marks=pytest.mark.slow))
HIDDEN_SIZES = (128, 256, 512)
LAYERS = 4


def language_model_loss(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    return lm_loss_sum(model, batch)


def bytes_of_sums(action: Callable[[], object]) -> int:
    """Return the most that this rank's accumulators took at any moment."""
    highest, add = 0, GradientSum.add

    def watched(self: GradientSum, name: str, inputs: Tensor, grad_output: Tensor) -> None:
        nonlocal highest
        add(self, name, inputs, grad_output)
        highest = max(highest, sum(total.numel() * total.element_size() for total in self._sums.values()))

    with patch.object(GradientSum, "add", watched):
        action()
    return highest


def plain_backward(model: Any, weights: Sequence[Any], batches: Sequence[dict[str, Tensor]]) -> None:
    """Forward and backward with the gradient of every weight, each dropped as soon as it is whole."""

    def drop(weight: Any) -> None:
        weight.grad = None

    handles = [weight.requires_grad_(True).register_post_accumulate_grad_hook(drop) for weight in weights]
    with scoring_mode(model):
        for batch in batches:
            language_model_loss(model, batch)[0].backward()
    for weight, handle in zip(weights, handles, strict=True):
        weight.requires_grad_(False)
        handle.remove()


def gathered_in_a_step(live: Any, batches: Sequence[dict[str, Tensor]]) -> int:
    """Return how many weights a forward and backward gathers, once forwards alone have gone before."""
    gathered = 0

    def counting(gather: Callable[..., Any]) -> Callable[..., Any]:
        def counted(parameters: Sequence[Any], **options: Any) -> Any:
            nonlocal gathered
            gathered += sum(parameter.ds_numel for parameter in parameters)
            return gather(parameters, **options)

        return counted

    for parameter in live.parameters():
        parameter.all_gather_coalesced = counting(parameter.all_gather_coalesced)
    live.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    with torch.no_grad():
        for batch in batches:
            language_model_loss(live, batch)
    for _ in range(4):  # the first of another order than the forwards, the second recorded, the third as recorded
        gathered = 0
        language_model_loss(live, batches[0])[0].backward()
    return gathered


def measure(hidden_size: int) -> dict[str, float]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=hidden_size, intermediate_size=3 * hidden_size, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    zero = zero_config("zero3.json", bf16=True)
    model: nn.Module = LlamaForCausalLM(config).bfloat16().requires_grad_(False)
    partition_whole(model, zero)
    targets = find_targets(model)
    generator = torch.Generator().manual_seed(comm.rank())
    rows = [torch.randint(0, 256, (1, 16), generator=generator) for _ in range(2)]
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in rows]
    found: dict[str, float] = {
        "elements": targets.numel,
        "largest": max(shape.numel for shape in targets.shapes.values()),
    }
    with engine.scoring_engine(model, zero) as live:

        def score(batches: Sequence[dict[str, Tensor]], passes: int = 1) -> None:
            settings = ScoringSettings("importance", "signed_mean", ELEMENT_FRACTION_LADDER, 0, passes=passes)
            score_regions(live, targets, batches, loss_sum=language_model_loss, settings=settings)

        weights = [target.parameter for target in targets.values()]
        jobs: dict[str, Callable[[], object]] = {
            "plain": lambda: plain_backward(live, weights, batches),
            "scoring": lambda: score(batches),
            "four passes": lambda: score(batches, passes=4),
        }
        jobs["plain"]()  # records DeepSpeed's trace
        for name, job in jobs.items():
            found[name] = max(comm.gather_objects(peak_bytes(job)))
        for name, some in (("sums", batches), ("sums of a single batch", batches[:1])):
            found[name] = max(comm.gather_objects(bytes_of_sums(partial(score, some))))
    with engine.scoring_engine(model, zero) as live:
        found["gathered in a step"] = gathered_in_a_step(live, batches)
    assert all(is_partitioned(weight) for weight in weights)
    return found | {"parameters": sum(full_numel(value) for value in model.parameters())}


def measure_all() -> list[dict[str, float]]:
    return [measure(hidden_size) for hidden_size in HIDDEN_SIZES]


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest, fork_server: ForkServer) -> list[dict[str, float]]:
    """What this many ranks found for each model."""
    found = fork_server.run_on_ranks(measure_all, request.param, timeout=400.0)
    return [model | {"ranks": request.param} for model in found]


@pytest.mark.parametrize("measured", RANKS, indirect=True)
def test_extra_memory_is_the_formulas(measured: list[dict[str, float]]) -> None:
    for model in measured:
        sums, matrix = 4 * model["elements"] / model["ranks"], 4 * model["largest"]
        extra = model["scoring"] - model["plain"]
        assert 0.9 * sums <= extra <= sums + 2 * matrix, model


@pytest.mark.parametrize("measured", RANKS, indirect=True)
def test_passes_divide_the_sums(measured: list[dict[str, float]]) -> None:
    for model in measured:
        sums, matrix = 4 * model["elements"] / model["ranks"], 4 * model["largest"]
        assert model["four passes"] - model["plain"] <= sums / 4 + 2 * matrix, model


@pytest.mark.parametrize("measured", RANKS, indirect=True)
def test_a_single_batch_needs_no_sums(measured: list[dict[str, float]]) -> None:
    for model in measured:
        assert model["sums"] == pytest.approx(4 * model["elements"] / model["ranks"], rel=0.1), model
        assert model["sums of a single batch"] == 4 * model["largest"], model


@pytest.mark.parametrize("measured", RANKS, indirect=True)
def test_extra_memory_grows_as_parameters(measured: list[dict[str, float]]) -> None:
    """And as one over the ranks, which is in the formula above."""
    _, middle, large = ((model["scoring"] - model["plain"], model["elements"]) for model in measured)
    assert large[0] / middle[0] == pytest.approx(large[1] / middle[1], rel=0.25)


@pytest.mark.parametrize("measured", RANKS, indirect=True)
def test_forwards_alone_do_not_make_later_steps_gather_twice(measured: list[dict[str, float]]) -> None:
    """All of these models may stay gathered from forward to backward."""
    for model in measured:
        assert model["gathered in a step"] == model["parameters"]
