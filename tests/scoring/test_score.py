"""Scoring in one process, against autograd written out; tests/multiprocess does the same over ranks and ZeRO stages."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from taso_ds.adapters.fused_experts import ExpertMatrix
from taso_ds.adapters.region_file import RegionFile
from taso_ds.adapters.selection import concentration, ladder_with, score_rows_and_cols
from taso_ds.adapters.targets import MatrixShape, find_targets
from taso_ds.config import parse_run_config
from taso_ds.distributed import comm
from taso_ds.errors import UserError
from taso_ds.models.fingerprint import fingerprint
from taso_ds.objectives.loss import head_loss_sum, lm_loss_sum
from taso_ds.scoring.gradient_sum import GradientSum
from taso_ds.scoring.regions import Regions, describe_regions
from taso_ds.scoring.score import score_regions, scoring_mode
from taso_ds.scoring.scoring_pass import ScoringSettings, assign_owners

pytestmark = pytest.mark.usefixtures("on_cpu")

LADDER = ladder_with(0.05)


def scores_of(
    model: Any,
    batches: list[dict[str, Tensor]],
    *,
    score: str = "importance",
    head: bool = False,
    experts: bool = False,
    passes: int = 1,
    offload: bool = False,
    reduction: str = "signed_mean",
) -> Any:
    targets = find_targets(model, experts=experts)
    settings = ScoringSettings(score=score, reduction=reduction, ladder=LADDER, seed=0, passes=passes, offload=offload)
    loss = head_loss_sum if head else lm_loss_sum
    return score_regions(model, targets, batches, loss_sum=loss, settings=settings)


def reference(model: Any, batches: list[dict[str, Tensor]], *, head: bool = False, experts: bool = False) -> Any:
    """|W ⊙ ∂L/∂W|, L the mean over all supervised units, by plain autograd on weights that want a gradient."""
    model.eval().requires_grad_(True)
    total, units = torch.zeros(()), 0
    for batch in batches:
        loss, number = (head_loss_sum if head else lm_loss_sum)(model, batch)
        total, units = total + loss, units + number
    (total / units).backward()
    found = {}
    for name, target in find_targets(model, experts=experts).items():
        module, shape = target.matrix, target.shape
        weight: Any = module.weight
        grad: Any = target.parameter.grad
        if isinstance(module, ExpertMatrix):
            grad = grad[module.index]
        value = (weight.detach() * grad).abs()
        found[name] = score_rows_and_cols(value.t() if shape.transposed else value, LADDER)
    return found


def assert_same(found: Any, expected: Any, *, atol: float = 0.0) -> None:
    assert list(found) == list(expected)
    for name, scores in found.items():
        assert torch.equal(scores.row_counts, expected[name].row_counts), name
        assert torch.equal(scores.col_counts, expected[name].col_counts), name
        torch.testing.assert_close(scores.row_importance, expected[name].row_importance, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("make", [tiny_models.llama, tiny_models.gpt2])
def test_scores_are_autograds(make: Any) -> None:
    batches = [tiny_models.token_batch(seed=seed, length=length) for seed, length in ((0, 12), (1, 9), (2, 15))]
    expected = reference(make(), batches)
    assert_same(scores_of(make().requires_grad_(False), batches), expected)


@pytest.mark.parametrize("number", [1, 3], ids=["at once", "summed"])
@pytest.mark.parametrize("make", [tiny_models.mixtral, tiny_models.qwen2_moe, tiny_models.gpt_oss])
def test_experts_are_scored_like_autograd(make: Any, number: int) -> None:
    batches = [tiny_models.token_batch(seed=seed, length=9 + seed) for seed in range(number)]
    expected = reference(make(), batches, experts=True)
    assert_same(scores_of(make().requires_grad_(False), batches, experts=True), expected)
    assert_same(scores_of(make().requires_grad_(False), batches, experts=True, passes=5), expected)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("number", [1, 3], ids=["at once", "summed"])
@pytest.mark.parametrize("make", [tiny_models.opt, tiny_models.falcon, tiny_models.hrm])
def test_families_are_scored_like_autograd(make: Any, number: int, checkpointing: bool) -> None:
    """A body that is not called, results changed in place, blocks called several times."""
    batches = [tiny_models.token_batch(seed=seed, length=9 + seed, vocabulary=33) for seed in range(number)]
    expected = reference(make(), batches)
    model = make().requires_grad_(False)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(scores_of(model, batches), expected)


def test_the_absolute_value_is_taken_of_the_sum_over_calls() -> None:
    """``per_batch_abs`` of a single batch is what the signed mean of it is, for a block that is called three times."""
    batch = tiny_models.token_batch()
    signed, absolute = (
        scores_of(tiny_models.albert().requires_grad_(False), [batch], reduction=reduction)
        for reduction in ("signed_mean", "per_batch_abs")
    )
    assert_same(absolute, signed)
    assert_same(signed, reference(tiny_models.albert(), [batch]))


def test_an_expert_no_token_reaches_has_zero_importance() -> None:
    """One row of 9 tokens, 2 of 32 experts each: 18 at most are reached."""

    def make() -> Any:
        return tiny_models.mixtral(experts=32)

    batches = [tiny_models.token_batch(rows=1, length=9, prompt=1)]
    expected = reference(make(), batches, experts=True)
    found = scores_of(make().requires_grad_(False), batches, experts=True)
    assert_same(found, expected, atol=1e-7)  # of an expert that a single token reaches
    unreached = [name for name, scores in found.items() if not scores.row_importance.any()]
    assert len(unreached) >= 2 * 2 * (32 - 18)
    file = RegionFile(found, {}, "")
    regions = Regions(file, file.cut(element_fraction=0.05, core_fraction=0.25, source=""), rows=[])
    assert regions.out_of_reach == unreached
    first = regions.cut[unreached[0]]
    assert (first.rows.tolist(), first.cols.tolist()) == (list(range(24)), list(range(8)))
    shares = [concentration(found[name], regions.cut[name], 0.05)[0] for name in found if name not in unreached]
    assert regions.mean_concentration(0.05)["rows"] == pytest.approx(sum(shares) / len(shares))
    said = describe_regions(regions, parse_run_config(["--core_fraction", "0.25"]).calibration)
    assert f"no gradient reached {len(unreached)} of them (the first is {unreached[0]})" in said


def test_nothing_but_sums_lives_into_the_next_micro_batch() -> None:
    """Memory peaks in a forward; a loss that is still there keeps its graph, the buffers two matrices."""
    model = tiny_models.llama().requires_grad_(False)
    targets = find_targets(model)
    batches = [tiny_models.token_batch(seed=seed, length=9) for seed in range(3)]
    earlier: list[weakref.ref[Tensor]] = []

    def losses(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        assert all(loss() is None for loss in earlier)
        loss, units = lm_loss_sum(model, batch)
        earlier.append(weakref.ref(loss))
        return loss, units

    settings = ScoringSettings(score="importance", reduction="signed_mean", ladder=LADDER, seed=0)
    score_regions(model, targets, batches, loss_sum=losses, settings=settings)
    assert len(earlier) == len(batches)


def test_a_real_model_is_scored_like_autograd(stories260k: Path) -> None:
    from transformers import AutoModelForCausalLM

    batches = [tiny_models.token_batch(seed=seed, length=24, vocabulary=512) for seed in range(3)]
    expected = reference(AutoModelForCausalLM.from_pretrained(stories260k), batches)
    found = scores_of(AutoModelForCausalLM.from_pretrained(stories260k).requires_grad_(False), batches)
    for name, scores in found.items():
        torch.testing.assert_close(scores.row_importance, expected[name].row_importance, rtol=1e-3, atol=1e-9)
        # A tie at the edge of the mask may fall either way by rounding: a handful of 64 · 64 · 5 % elements.
        assert (scores.row_counts - expected[name].row_counts).abs().sum() <= 4


def test_a_head_is_scored_through_and_trains_again_afterwards() -> None:
    batches = [
        {key: tiny_models.token_batch(seed=seed)[key] for key in ("input_ids", "attention_mask")}
        | {"labels": torch.tensor([1, 0, 1])}
        for seed in range(2)
    ]
    expected = reference(tiny_models.bert(), batches, head=True)
    model = tiny_models.bert().requires_grad_(False)
    model.classifier.requires_grad_(True)
    assert_same(scores_of(model, batches, head=True), expected)
    assert [name for name, value in model.named_parameters() if value.requires_grad] == [
        "classifier.weight",
        "classifier.bias",
    ]
    assert all(value.grad is None for value in model.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_off_and_everything_is_put_back(checkpointing: bool) -> None:
    """GPT-2 with three kinds of dropout at 0.1, in training mode: the scores are those of eval mode."""
    batches = [tiny_models.token_batch()]
    expected = reference(tiny_models.gpt2(), batches)
    model = tiny_models.gpt2().requires_grad_(False).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def state() -> list[Any]:
        return [(module.training, getattr(module, "p", None), len(module._forward_hooks)) for module in model.modules()]

    before = state()
    assert_same(scores_of(model, batches), expected)
    assert state() == before


def test_everything_is_put_back_after_an_error() -> None:
    model = tiny_models.bert().train()

    def stop() -> None:
        with scoring_mode(model):
            assert not model.bert.encoder.layer[0].training
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop()
    assert all(module.training for module in model.modules())
    assert all(not module._forward_hooks for module in model.modules())


def test_blocks_that_apply_dropout_themselves_are_silenced() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gradient_checkpointing, self.attention_dropout = True, 0.3
            self.embedding = nn.Embedding(2, 2)

        def get_input_embeddings(self) -> nn.Module:
            return self.embedding

    block = Block()
    with scoring_mode(block):
        assert block.training
        assert block.attention_dropout == 0.0
    assert block.attention_dropout == 0.3


def test_importance_that_is_not_finite_names_its_matrix() -> None:
    model = tiny_models.llama().requires_grad_(False)
    model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"scoring: the importance of model\.layers.* is not finite"):
        scores_of(model, [tiny_models.token_batch()])


# Where sums are kept --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("offload", "place"), [(True, "cpu"), (False, "meta")])
def test_sums_are_kept_where_they_are_told(monkeypatch: pytest.MonkeyPatch, offload: bool, place: str) -> None:
    """The meta device stands for an accelerator; nothing can be added up there, but everything is allocated."""
    added_to: list[Tensor] = []

    def note(total: Tensor, part: Tensor, _owner: int, *, buffer: Tensor) -> None:
        added_to.append(total)
        assert part.device.type == buffer.device.type == "meta"

    monkeypatch.setattr(comm, "device", lambda: torch.device("meta"))
    monkeypatch.setattr(comm, "add_on_owner", note)
    sums = GradientSum({"a": MatrixShape(4, 3)}, {"a": 0}, absolute=False, offload=offload)
    for _ in range(2):
        sums.add("a", torch.empty(5, 3, device="meta"), torch.empty(5, 4, device="meta"))
    assert added_to[0] is added_to[1]
    assert (added_to[0].device.type, added_to[0].dtype, added_to[0].shape) == (place, torch.float32, (4, 3))
    taken = sums.take("a")
    assert taken is not None
    assert taken.device.type == "meta"  # where it is selected from


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_sums_in_host_memory_are_the_same_and_take_none_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four layers of seven matrices of 16 MB; one of them at a time comes back to be selected from."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(comm, "device", lambda: device)
    llama = tiny_models.llama(layers=4, hidden_size=2048, intermediate_size=2048, num_key_value_heads=4)
    model = llama.train().to(device).requires_grad_(False)
    batches = [
        {key: value.to(device) for key, value in tiny_models.token_batch(seed=seed).items()} for seed in range(2)
    ]
    scores, peaks = [], []
    for offload in (False, True):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        scores.append(scores_of(model, batches, offload=offload))
        peaks.append(torch.cuda.max_memory_allocated(device) - before)
    for name, found in scores[1].items():
        torch.testing.assert_close(found.row_importance, scores[0][name].row_importance, rtol=1e-4, atol=0.0)
    matrix = 4 * 2048**2  # bytes in fp32
    assert peaks[0] - peaks[1] >= (4 * 7 - 2) * matrix


# Owners ---------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=30), st.integers(1, 8))
def test_owners_share_the_elements(sizes: list[tuple[int, int]], world_size: int) -> None:
    shapes = {str(number): MatrixShape(*size) for number, size in enumerate(sizes)}
    owners = assign_owners(shapes, world_size)
    assert list(owners) == list(shapes)
    owned = [sum(shapes[name].numel for name in shapes if owners[name] == rank) for rank in range(world_size)]
    # Greedy: whoever owns most took its last matrix when it owned least, so no more than the mean before it.
    total, largest = sum(owned), max(shape.numel for shape in shapes.values())
    assert max(owned) <= total / world_size + largest


def test_owners_of_a_llama_are_balanced() -> None:
    owners = assign_owners(shapes := find_targets(tiny_models.llama(layers=4)).shapes, 4)
    owned = [sum(shapes[name].numel for name in shapes if owners[name] == rank) for rank in range(4)]
    # Per block: q, o 1024 each, k, v 512 each, three of 1536: 7680. Four blocks over four ranks: 7680 each.
    assert owned == [7680] * 4


# The fingerprint ------------------------------------------------------------------------------------------------------


def test_the_fingerprint_knows_weights_and_not_their_dtype() -> None:
    # Rounded to bf16 once, so that both dtypes hold the same numbers.
    model = tiny_models.llama().bfloat16()
    digest = fingerprint(find_targets(model))
    assert fingerprint(find_targets(tiny_models.llama().bfloat16().float())) == digest
    assert fingerprint(find_targets(tiny_models.llama(seed=1).bfloat16())) != digest
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight
        weight[[0, 1]] = weight[[1, 0]]  # the same numbers in another order
    assert fingerprint(find_targets(model)) != digest


def test_the_fingerprint_knows_the_experts_it_adapts() -> None:
    model = tiny_models.mixtral()
    linears, all_targets = fingerprint(find_targets(model)), fingerprint(find_targets(model, experts=True))
    assert linears != all_targets
    with torch.no_grad():
        experts = model.model.layers[1].mlp.experts.down_proj
        experts[[0, 1]] = experts[[1, 0]]  # two experts change places
    assert fingerprint(find_targets(model)) == linears
    assert fingerprint(find_targets(model, experts=True)) != all_targets


def test_a_linear_that_computes_in_fp32_amid_a_model_in_bf16() -> None:
    """As some routers do: the buffer of one gradient does not fit the other's."""
    shapes = {"one": MatrixShape(2, 3), "router": MatrixShape(2, 3)}
    sums = GradientSum(shapes, dict.fromkeys(shapes, 0), absolute=False)
    inputs, grads = torch.ones(4, 3), torch.ones(4, 2)
    sums.add("one", inputs.bfloat16(), grads.bfloat16())
    sums.add("router", inputs, grads)
    for name in shapes:
        taken = sums.take(name)
        assert taken is not None
        assert torch.equal(taken, torch.full((2, 3), 4.0))
