"""Scoring and training under DeepSpeed on 1, 2 and 4 ranks, at every ZeRO stage, against one process of plain torch.

Every set of ranks runs all stages; the tests compare what they saw with references written out here.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import longhand
import parity_case as case
import parity_ranks
import pytest
import torch
import torch.nn.functional as F
from forked import ForkServer
from torch import Tensor, nn

from taso_ds.adapters.adapter import TasoAdapter
from taso_ds.adapters.fused_experts import ExpertMatrix
from taso_ds.adapters.selection import CoreRegion
from taso_ds.adapters.targets import Target, find_targets
from taso_ds.data.batch_plan import BatchPlan
from taso_ds.data.collate import collate, collate_head
from taso_ds.data.encode import EncodedRow
from taso_ds.methods.lora import attach_lora, lora_parameters
from taso_ds.training.arguments import BatchSizes
from taso_ds.training.optim import make_schedule

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(600)]

WORLDS = [
    pytest.param(ranks, stage, marks=[pytest.mark.slow] if ranks > case.SMALL_WORLD else [])
    for ranks, stages in case.STAGES.items()
    for stage in stages
]
SMALL = [(ranks, stage) for ranks, stages in case.STAGES.items() for stage in stages if ranks <= case.SMALL_WORLD]
worlds = pytest.mark.parametrize(("ranks", "stage"), WORLDS, ids=lambda value: str(value))
small_worlds = pytest.mark.parametrize(("ranks", "stage"), SMALL, ids=lambda value: str(value))

Report = Callable[[int, int], dict[str, Any]]
ROOT_OF_TEN = math.sqrt(10.0)
region = partial(longhand.region, element_fraction=case.ELEMENT_FRACTION, core_fraction=case.CORE_FRACTION)


@pytest.fixture(scope="module")
def report(fork_server: ForkServer, llama_folder: Path, gpt2_folder: Path, bert_folder: Path) -> Report:
    """Return ``report(ranks, stage)``; each number of ranks is started once, when it is first asked for."""
    folders = {"llama": str(llama_folder), "gpt2": str(gpt2_folder), "bert": str(bert_folder)}

    @cache
    def run(ranks: int) -> Any:
        return fork_server.run_on_ranks(parity_ranks.run_stages, ranks, folders)

    return lambda ranks, stage: run(ranks)[stage]


def load(folder: Path, *, dtype: torch.dtype = torch.float32, head: bool = False) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    model_class: Any = AutoModelForSequenceClassification if head else AutoModelForCausalLM
    return model_class.from_pretrained(folder, dtype=dtype)


# Scoring: the reference -----------------------------------------------------------------------------------------------


def gradients(model: Any, rows: Sequence[EncodedRow], *, experts: bool = False) -> dict[str, Tensor]:
    """∂L/∂W of every target as (out, in): L is the mean over all supervised tokens of the rows, in one batch."""
    model.eval().requires_grad_(True)
    model.zero_grad()
    batch = collate(rows, pad_id=0)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"]
    F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100).backward()
    targets = find_targets(model, experts=experts)
    return {name: as_out_in(target, gradient_of(target)).clone() for name, target in targets.items()}


def gradient_of(target: Target) -> Tensor:
    gradient: Any = target.parameter.grad
    found: Tensor = gradient[target.matrix.index] if isinstance(target.matrix, ExpertMatrix) else gradient
    return found


def as_out_in(target: Target, value: Any) -> Tensor:
    found: Tensor = value.detach().t() if target.shape.transposed else value.detach()
    return found


def weights(model: Any, *, experts: bool = False) -> dict[str, Tensor]:
    targets = find_targets(model, experts=experts)
    return {name: as_out_in(target, target.matrix.weight) for name, target in targets.items()}


def assert_regions(found: dict[str, Any], expected: dict[str, Tensor]) -> None:
    """The very same index sets, from importances that agree to rounding."""
    assert list(found) == list(expected)
    for name, importance in expected.items():
        assert (found[name]["rows"], found[name]["cols"]) == region(importance), name
        for side, dim in (("row", 1), ("col", 0)):
            sums = torch.tensor(found[name][f"{side}_importance"])
            torch.testing.assert_close(sums, importance.double().sum(dim).float(), rtol=1e-4, atol=0)


@pytest.fixture(scope="module")
def signed(llama_folder: Path) -> dict[str, Tensor]:
    """|W ⊙ ḡ|, the signed gradient averaged over all tokens of the calibration set."""
    model = load(llama_folder)
    found = gradients(model, case.CALIBRATION)
    return {name: (weight * found[name]).abs() for name, weight in weights(model).items()}


@pytest.fixture(scope="module")
def absolute_in_fives(llama_folder: Path) -> dict[str, Tensor]:
    """The mean of |W ⊙ g_b| over batches of 5 rows of similar length, each with the mean loss of its own tokens."""
    model = load(llama_folder)
    rows = sorted(case.CALIBRATION, key=lambda row: len(row.input_ids))  # a stable sort: equal lengths stay in order
    batches = [rows[start : start + 5] for start in range(0, len(rows), 5)]
    assert [len(batch) for batch in batches] == [5, 5, 3]
    per_batch = [gradients(model, batch) for batch in batches]
    return {
        name: torch.stack([(weight * found[name]).abs() for found in per_batch]).mean(0)
        for name, weight in weights(model).items()
    }


# Scoring: the tests ---------------------------------------------------------------------------------------------------


@worlds
def test_regions_are_those_of_plain_autograd(report: Report, signed: dict[str, Tensor], ranks: int, stage: int) -> None:
    for label in ("batches of 2", "batches of 5", "batches of 5 in passes", "one batch"):  # whatever the micro-batches
        assert_regions(report(ranks, stage)["llama"][label], signed)


@small_worlds
def test_transposed_weights_are_scored_alike(report: Report, gpt2_folder: Path, ranks: int, stage: int) -> None:
    model = load(gpt2_folder)
    found = gradients(model, case.CALIBRATION)
    expected = {name: (weight * found[name]).abs() for name, weight in weights(model).items()}
    assert_regions(report(ranks, stage)["gpt2"]["batches of 5"], expected)


@worlds
def test_per_batch_abs_of_one_batch_is_the_signed_mean(
    report: Report, signed: dict[str, Tensor], ranks: int, stage: int
) -> None:
    """With more than one rank all others run fillers, which must not count as batches."""
    assert_regions(report(ranks, stage)["llama"]["one batch, absolute"], signed)


@worlds
def test_per_batch_abs_of_several_batches(
    report: Report, absolute_in_fives: dict[str, Tensor], signed: dict[str, Tensor], ranks: int, stage: int
) -> None:
    found = report(ranks, stage)["llama"]["batches of 5, absolute"]
    assert_regions(found, absolute_in_fives)
    name = next(iter(signed))  # and it is another number than the signed mean: cancellation is gone
    assert sum(found[name]["row_importance"]) > 1.1 * float(signed[name].sum())


@worlds
def test_ablation_scores(report: Report, llama_folder: Path, ranks: int, stage: int) -> None:
    model = load(llama_folder)
    found = report(ranks, stage)["llama"]
    assert_regions(found["magnitude"], {name: weight.abs() for name, weight in weights(model).items()})
    assert_regions(found["gradient"], {name: value.abs() for name, value in gradients(model, case.CALIBRATION).items()})
    draws = {
        name: torch.rand(weight.shape, generator=torch.Generator().manual_seed(case.SEED + number))
        for number, (name, weight) in enumerate(weights(model).items())
    }
    assert_regions(found["random"], draws)


@worlds
def test_bf16_scores_are_added_up_in_fp32(report: Report, signed: dict[str, Tensor], ranks: int, stage: int) -> None:
    """Each batch's gradient is rounded to bf16 once, wherever it is computed; what ranks add to it is not."""
    found = report(ranks, stage)["bf16"]["batches of 5"]
    alone = report(1, stage)["bf16"]["batches of 5"]
    for name, importance in signed.items():
        sums, same, fp32 = (
            torch.tensor(found[name]["row_importance"]),
            torch.tensor(alone[name]["row_importance"]),
            importance.sum(1),
        )
        torch.testing.assert_close(sums, same, rtol=1e-4, atol=0)
        assert 1e-5 < float((sums - fp32).norm() / fp32.norm()) < 0.03  # a few units of bf16, 2^-8 = 0.004 each


@worlds
def test_scoring_leaves_nothing_behind(report: Report, ranks: int, stage: int) -> None:
    """No gradient, nothing that wants one, no hook; at stage 3 nothing but shards."""
    assert report(ranks, stage)["llama"]["left_behind"] == [[]] * ranks


@worlds
def test_accumulators_are_spread_over_the_ranks(report: Report, ranks: int, stage: int) -> None:
    found = report(ranks, stage)["llama"]
    total, largest = found["target_elements"], found["largest_target"]
    # Two blocks of q, o 32·32, k, v 16·32 and three of 48·32: 7680 each.
    assert total == 15360
    held = found["held"]["batches of 2"]
    assert sum(held) == total
    # Parameters / ranks, up to less than one matrix: here 15360 / 4 = 3840 is met by 4096 and 3584.
    assert max(held) < total / ranks + largest
    assert max(held) <= 1.07 * total / ranks
    # The largest of three groups is 5 or 6 of the 14 matrices: 5632 elements.
    assert max(found["held"]["batches of 5 in passes"]) <= 5632 / ranks + largest
    assert max(found["held"]["one batch"]) <= largest, "a single micro-batch needs no accumulators"
    assert max(found["held"]["magnitude"]) == 0


@worlds
def test_owners_select_at_the_same_time(report: Report, ranks: int, stage: int) -> None:
    found = report(ranks, stage)["llama"]["turns"]
    for label in ("batches of 2", "magnitude", "one batch"):
        assert found[label] == [found[label][0]] * ranks, "all ranks know what waits"
    for label in ("batches of 2", "magnitude"):  # 14 matrices: an owner has as many turns as it has matrices
        turns = found[label][0]
        assert sum(turns) == 14
        assert turns == sorted(turns, reverse=True)
        assert turns[0] == ranks
    assert sum(found["one batch"][0]) == 14
    assert max(found["one batch"][0]) == ranks
    assert len(found["one batch"][0]) <= 14 / ranks + 3, (
        "in the order of backward, owners now and then do not alternate"
    )


# Training: the reference ----------------------------------------------------------------------------------------------


def plain_training(
    model: Any, groups: Sequence[tuple[list[nn.Parameter], float]], rows: Sequence[EncodedRow], *, head: bool = False
) -> dict[str, Any]:
    """Five steps of AdamW on whole batches; ``groups`` are (parameters, peak rate).

    In bf16 the optimizer steps on fp32 masters of the parameters, with the gradient of the whole batch.
    """
    parameters = [value for values, _ in groups for value in values]
    masters = [nn.Parameter(value.detach().float()) for value in parameters]
    sizes = [len(values) for values, _ in groups]
    optimizer = torch.optim.AdamW(
        [
            {"params": part, "lr": 0.0}
            for part in (masters[sum(sizes[:n]) : sum(sizes[: n + 1])] for n in range(len(sizes)))
        ],
        weight_decay=case.TRAINING.weight_decay,
    )
    schedule = make_schedule(case.TRAINING, case.STEPS)
    plan = BatchPlan(len(rows), case.GLOBAL_BATCH, seed=case.SEED)
    found: dict[str, Any] = {"loss": [], "grad_norm": []}
    model.train()
    for step in range(case.STEPS):
        chosen = [rows[index] for index in plan.rows(step)]
        if head:
            batch = collate_head(chosen, pad_id=0, is_regression=False)
            logits, labels = model(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"]
        else:
            batch = collate(chosen, pad_id=0)
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1].flatten(0, 1)
            labels = batch["labels"][:, 1:].flatten()
        loss = F.cross_entropy(logits.float(), labels, ignore_index=-100)
        for value in parameters:
            value.grad = None
        loss.backward()
        for master, value in zip(masters, parameters, strict=True):
            assert value.grad is not None
            master.grad = value.grad.float()
        norm = torch.nn.utils.clip_grad_norm_(masters, case.MAX_GRAD_NORM)
        for live, (_, peak) in zip(optimizer.param_groups, groups, strict=True):
            live["lr"] = peak * schedule(step)
        optimizer.step()
        with torch.no_grad():
            for master, value in zip(masters, parameters, strict=True):
                value.copy_(master)
        found["loss"].append(loss.item())
        found["grad_norm"].append(float(norm))
    found["values"] = [value.detach().flatten() for value in masters]
    return found


def taso(model: Any, regions: dict[str, CoreRegion]) -> TasoAdapter:
    model.requires_grad_(False)
    adapter = TasoAdapter(regions, structure="union", rank=1, scaling=1.0, seed=case.SEED, dtype=model.dtype)
    adapter.attach(model)
    return adapter


def core_regions(signed: dict[str, Tensor]) -> dict[str, CoreRegion]:
    cut = {name: region(importance) for name, importance in signed.items()}
    return {
        name: CoreRegion(torch.tensor(rows), torch.tensor(cols), *signed[name].shape)
        for name, (rows, cols) in cut.items()
    }


PEAK = case.TRAINING.learning_rate


@pytest.fixture(scope="module")
def plain(llama_folder: Path, signed: dict[str, Tensor]) -> dict[str, Any]:
    model = load(llama_folder)
    return plain_training(model, [([taso(model, core_regions(signed)).flat], PEAK * ROOT_OF_TEN)], case.TRAIN)


@pytest.fixture(scope="module")
def plain_bf16(llama_folder: Path, signed: dict[str, Tensor]) -> dict[str, Any]:
    model = load(llama_folder, dtype=torch.bfloat16)
    return plain_training(model, [([taso(model, core_regions(signed)).flat], PEAK * ROOT_OF_TEN)], case.TRAIN)


@pytest.fixture(scope="module")
def plain_lora(llama_folder: Path) -> dict[str, Any]:
    model = load(llama_folder).requires_grad_(False)
    torch.manual_seed(case.SEED)
    attach_lora(model, list(find_targets(model)), rank=2, scaling=1.0, transposed=False)
    return plain_training(model, [(list(lora_parameters(model).values()), PEAK)], case.TRAIN)


@pytest.fixture(scope="module")
def plain_head(bert_folder: Path) -> dict[str, Any]:
    model = load(bert_folder, head=True)
    corner = {
        name: CoreRegion(torch.arange(4), torch.arange(5), *weight.shape) for name, weight in weights(model).items()
    }
    adapter = taso(model, corner)
    head = [value.requires_grad_(True) for value in model.classifier.parameters()]
    return plain_training(model, [([adapter.flat], PEAK * ROOT_OF_TEN), (head, PEAK)], case.HEAD_TRAIN, head=True)


def assert_same_run(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """fp32 sums in another order: losses equal to 1e-5, and so is what five steps made of the values.

    Single values may differ by more: Adam divides by the gradient's size, however small and inexact it is.
    """
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    assert min(found["grad_norm"]) > case.MAX_GRAD_NORM  # so every step was clipped
    ours, theirs = (torch.cat([torch.as_tensor(value) for value in run["values"]]) for run in (found, expected))
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


# Training: the tests --------------------------------------------------------------------------------------------------


def test_the_case_has_what_it_is_for() -> None:
    plan = BatchPlan(len(case.TRAIN), case.GLOBAL_BATCH, seed=case.SEED)
    assert [len(plan.rows(step)) for step in range(case.STEPS)] == [8, 8, 5, 8, 8]  # an uneven end of an epoch
    units = [sum(case.TRAIN[row].num_supervised for row in plan.rows(step)) for step in range(case.STEPS)]
    assert len(set(units)) > 3  # batches, and so micro-batches, of unequal weight
    assert BatchSizes(1, 4, 2) == case.SPLITS[2][2].sizes(2)


@worlds
def test_every_split_of_the_batch_learns_the_same(
    report: Report, plain: dict[str, Any], ranks: int, stage: int
) -> None:
    splits = report(ranks, stage)["train"]["splits"]
    assert len(splits) == len(case.SPLITS[ranks])
    for found in splits.values():
        assert_same_run(found, plain)
    empty = [max(found["empty_micro_batches"]) for found in splits.values()]
    assert max(empty) > 0  # some rank had a micro-batch without any row


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_output_layer_is_gathered_once_per_forward_whatever_a_rank_has(report: Report, ranks: int) -> None:
    """ZeRO-3 gathers it on ranks without a row too, and not again for backward."""
    splits = report(ranks, 3)["train"]["splits"]
    for split, found in zip(case.SPLITS[ranks], splits.values(), strict=True):
        forwards = case.STEPS * split.accumulation + 1  # one of them to look at the model
        assert found["output_layer_gathers"] == [[forwards, 0]] * ranks


@small_worlds
def test_learning_rates_keep_their_ratio_in_a_running_optimizer(
    report: Report, plain_head: dict[str, Any], ranks: int, stage: int
) -> None:
    found = report(ranks, stage)["train"]["head"]
    assert found["groups"] == [("adapter", 1), ("head", 2)]
    schedule = make_schedule(case.TRAINING, case.STEPS)
    # Warm-up ⌈0.3 · 5⌉ = 2 steps, then linear over 3: 1/2, 1, 1, 2/3, 1/3.
    assert [schedule(step) for step in range(case.STEPS)] == pytest.approx([1 / 2, 1, 1, 2 / 3, 1 / 3])
    for step, (adapter, head) in enumerate(found["live_rates"]):
        assert head == pytest.approx(PEAK * schedule(step), rel=1e-12)
        assert adapter / head == pytest.approx(ROOT_OF_TEN, rel=1e-12)
    assert found["logged_rates"] == found["live_rates"]
    assert_same_run(found, plain_head)


@small_worlds
def test_the_first_step_moves_each_group_by_its_own_rate(report: Report, ranks: int, stage: int) -> None:
    """Adam's first step is the learning rate for every entry with a gradient, besides the decay, lr · 0.1 · value."""
    before, after = report(ranks, stage)["train"]["head"]["first_step"]
    rates = [PEAK * ROOT_OF_TEN / 2, PEAK / 2, PEAK / 2]  # half the peak: the first of two warm-up steps
    for old, new, rate in zip(before, after, rates, strict=True):
        start = torch.tensor(old)
        moved = (torch.tensor(new) - start * (1.0 - rate * case.TRAINING.weight_decay)).abs()
        assert float(moved.max()) == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [0, 3])
def test_gradient_checkpointing_changes_nothing(report: Report, plain: dict[str, Any], ranks: int, stage: int) -> None:
    found = report(ranks, stage)["train"]["checkpointed"]
    # Every block ran twice a step, for it was recomputed; and once when the loss looked at the output layer.
    assert found["forwards"] == 2 * case.STEPS + 1
    assert_same_run(found, plain)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [0, 3])
def test_the_lora_baseline_trains_in_the_same_loop(
    report: Report, plain_lora: dict[str, Any], ranks: int, stage: int
) -> None:
    found = report(ranks, stage)["train"]["lora"]
    assert found.get("partitioned") is (True if stage == 3 else None)
    assert_same_run(found, plain_lora)


# bf16 -----------------------------------------------------------------------------------------------------------------


@worlds
def test_bf16_learns_what_a_plain_bf16_loop_learns(
    report: Report, plain_bf16: dict[str, Any], plain: dict[str, Any], ranks: int, stage: int
) -> None:
    """Within half a unit of bf16, 2^-9: forwards and gradients of a rank's share are rounded in another order."""
    found = report(ranks, stage)["train"]["bf16"]
    assert found["loss"] == pytest.approx(plain_bf16["loss"], rel=2.0**-9)
    assert found["loss"] == pytest.approx(plain["loss"], rel=2.0**-9)
    assert found["grad_norm"] == pytest.approx(plain_bf16["grad_norm"], rel=0.02)
    assert max(abs(ours - fp32) for ours, fp32 in zip(found["loss"], plain["loss"], strict=True)) > 1e-4  # it was bf16


@worlds
def test_bf16_keeps_fp32_masters(
    report: Report, plain_bf16: dict[str, Any], llama_folder: Path, signed: dict[str, Tensor], ranks: int, stage: int
) -> None:
    found = report(ranks, stage)["train"]["bf16"]
    (values,), (masters,) = found["values"], found["masters"]
    live, kept = torch.tensor(values), torch.tensor(masters)
    assert torch.equal(kept.bfloat16().float(), live)  # the parameters are the masters, rounded
    assert (kept != live).float().mean() > 0.9  # which hold more than bf16 can
    start = taso(load(llama_folder, dtype=torch.bfloat16), core_regions(signed)).flat.detach().float()
    moved, expected = kept - start, plain_bf16["values"][0] - start
    assert float((moved - expected).norm() / expected.norm()) < 0.1
