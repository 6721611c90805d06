"""What ranks do for the tests of parity: scoring and training with DeepSpeed, on however many there are."""

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import parity_case as case
import torch
from configs import zero_config
from tiny_models import VOCABULARY
from torch import nn

from taso_ds.adapters.adapter import TasoAdapter
from taso_ds.adapters.selection import CoreRegion, RegionScores, cut_region
from taso_ds.config import parse_run_config
from taso_ds.data.batch_plan import BatchPlan
from taso_ds.data.collate import collate, collate_head
from taso_ds.data.encode import EncodedRow
from taso_ds.distributed import comm
from taso_ds.distributed import engine as engines
from taso_ds.distributed.zero import full_copy, full_numel, is_partitioned
from taso_ds.distributed.zero_config import ZeroConfig
from taso_ds.job import Job
from taso_ds.methods.lora import attach_lora, lora_parameters
from taso_ds.methods.method import adapter_groups
from taso_ds.models.spec import BaseSpec, load_config
from taso_ds.objectives import chunked_loss
from taso_ds.objectives.batches import dealt_batches
from taso_ds.objectives.chunked_loss import LanguageModelLoss
from taso_ds.objectives.loss import head_loss_sum
from taso_ds.reports.observer import Observer, StepMetrics
from taso_ds.runs.open_job import load_base
from taso_ds.scoring import score as calibrate
from taso_ds.scoring import scoring_pass
from taso_ds.scoring.score import score_regions
from taso_ds.scoring.scoring_pass import ScoringSettings
from taso_ds.training.arguments import batch_sizes
from taso_ds.training.feed import Feed
from taso_ds.training.optim import Group, make_group, make_optimizer, make_schedule
from taso_ds.training.trainer import Trainer

COLLATE = partial(collate, pad_id=0)
COLLATE_HEAD = partial(collate_head, pad_id=0, is_regression=False)

Regions = dict[str, CoreRegion]


def zero_config_of(stage: int, split: case.Split, *, bf16: bool = False) -> ZeroConfig:
    sizes = {"micro": split.micro, "accumulation": split.accumulation}
    return zero_config(f"zero{stage}.json", **sizes, bf16=bf16, max_grad_norm=case.MAX_GRAD_NORM)


def load(
    folder: str,
    zero: ZeroConfig,
    *,
    bf16: bool = False,
    head: bool = False,
    checkpointing: bool = False,
    experts: bool = False,
) -> Any:
    """The base and its targets, as a run loads them."""
    flags = ["--model_name_or_path", folder, "--task", "sst2", "--bf16" if bf16 else "--no_bf16"]
    flags += ["--seed", str(case.SEED), *(["--gradient_checkpointing"] if checkpointing else [])]
    flags += ["--adapt_experts"] if experts else []
    config = parse_run_config(flags)
    spec = BaseSpec(config.model, folder, load_config(config.model, folder), head)
    targets = spec.targets(config.adapter.target_modules, experts=config.adapter.adapt_experts)
    sizes = batch_sizes(config.training, comm.world_size())
    job = Job(config, zero, sizes, spec, targets, region_file=None, data=None)
    return load_base(job)


# Scoring --------------------------------------------------------------------------------------------------------------


def as_json(scores: dict[str, RegionScores]) -> dict[str, Any]:
    found = {}
    for name, entry in scores.items():
        region = cut_region(entry, element_fraction=case.ELEMENT_FRACTION, core_fraction=case.CORE_FRACTION)
        found[name] = {
            "rows": region.rows.tolist(),
            "cols": region.cols.tolist(),
            "row_importance": entry.row_importance.tolist(),
            "col_importance": entry.col_importance.tolist(),
        }
    return found


class Watched(scoring_pass.GradientSum):
    """Remembers how many accumulator elements this rank held at once."""

    elements = 0

    def add(self, *args: Any) -> None:
        super().add(*args)
        assert all(value.dtype == torch.float32 for value in self._sums.values())
        Watched.elements = max(Watched.elements, sum(value.numel() for value in self._sums.values()))


class WatchedPass(calibrate.ScoringPass):
    """Remembers how many owners selected at the same time, turn by turn."""

    turns: ClassVar[list[int]] = []

    def _select_waiting(self) -> None:
        WatchedPass.turns.append(len(self._waiting))
        super()._select_waiting()


def left_behind(model: nn.Module, stage: int) -> list[str]:
    """What scoring should not have left on this rank."""
    found = []
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found.append(f"{name} has a gradient")
        if parameter.requires_grad:
            found.append(f"{name} wants gradients")
        if stage == 3:
            shard: Any = parameter
            if parameter.numel():
                found.append(f"{name} is whole")
            if shard.ds_tensor.numel() > -(-full_numel(parameter) // comm.world_size()):
                found.append(f"{name} has more than its shard")
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or "forward" in vars(module):
            found.append(f"{name} has hooks")
        if {"pre_bwd_fn", "post_bwd_fn"} & vars(module).keys():  # the next engine would gather through this one
            found.append(f"{name} keeps the scoring engine's backward functions")
    return found


def score(
    folder: str,
    stage: int,
    runs: Sequence[tuple[str, str, str, int]],
    *,
    bf16: bool = False,
    checkpointing: bool = False,
    experts: bool = False,
) -> tuple[dict[str, Any], Any]:
    """Score one base several times; ``runs`` are (label, score, reduction, rows per batch)."""
    zero = zero_config_of(stage, case.SPLITS[comm.world_size()][0], bf16=bf16)
    base, targets = load(folder, zero, bf16=bf16, checkpointing=checkpointing, experts=experts)
    scoring_pass.GradientSum, calibrate.ScoringPass = Watched, WatchedPass  # type: ignore[misc]
    hooks_before = left_behind(base.model, stage)
    found: dict[str, Any] = {"held": {}, "turns": {}}
    language_model_loss = LanguageModelLoss(targets)
    with engines.scoring_engine(base.model, zero) as scored:
        for label, kind, reduction, batch_size in runs:
            Watched.elements, WatchedPass.turns = 0, []
            batches = dealt_batches(case.CALIBRATION, batch_size=batch_size, collate=COLLATE)
            passes = case.PASSES if "passes" in label else 1
            settings = ScoringSettings(kind, reduction, case.LADDER, case.SEED, passes=passes, offload=passes > 1)
            scores = score_regions(
                scored, targets, [batch for _, batch in batches],
                loss_sum=language_model_loss, settings=settings,
            )  # fmt: skip
            found[label] = as_json(scores)
            found["held"][label] = comm.gather_objects(Watched.elements)
            found["turns"][label] = comm.gather_objects(WatchedPass.turns)
    found["left_behind"] = comm.gather_objects(
        [what for what in left_behind(base.model, stage) if what not in hooks_before]
    )
    found["target_elements"] = targets.numel
    found["largest_target"] = max(shape.numel for shape in targets.shapes.values())
    return found, base


def regions_of(scored: dict[str, Any]) -> Regions:
    return {
        name: CoreRegion(
            torch.tensor(entry["rows"]),
            torch.tensor(entry["cols"]),
            out_features=len(entry["row_importance"]),
            in_features=len(entry["col_importance"]),
        )
        for name, entry in scored.items()
    }


# Training -------------------------------------------------------------------------------------------------------------


def taso_groups(base: Any, regions: Regions) -> list[Group]:
    adapter = TasoAdapter(regions, structure="union", rank=1, scaling=1.0, seed=case.SEED, dtype=base.model.dtype)
    adapter.attach(base.model)
    return adapter_groups(case.TRAINING, base, [adapter.flat], rho=case.RHO)


def values_of(groups: list[Group]) -> list[list[float]]:
    """All trained values, gathered. A collective."""
    return [full_copy(value).float().flatten().tolist() for group in groups for value in group.parameters]


def train(
    base: Any,
    groups: list[Group],
    zero: ZeroConfig,
    split: case.Split,
    *,
    rows: Sequence[EncodedRow] = case.TRAIN,
    head: bool = False,
    after_step: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    sizes = split.sizes(comm.world_size())
    plan = BatchPlan(len(rows), sizes.global_batch_size, seed=case.SEED)
    engine: Any = engines.training_engine(base.model, make_optimizer(groups, case.TRAINING), zero)
    found: dict[str, Any] = {"loss": [], "grad_norm": [], "logged_rates": [], "live_rates": []}

    class Log(Observer):
        def on_step(self, metrics: StepMetrics) -> None:
            found["loss"].append(metrics["loss"])
            found["grad_norm"].append(metrics["grad_norm"])
            found["logged_rates"].append(list(metrics["learning_rate"].values()))
            found["live_rates"].append([group["lr"] for group in engines.optimizer_groups(engine)])
            after_step()

    trainer = Trainer(
        engine, Feed(rows, plan, sizes, COLLATE_HEAD if head else COLLATE),
        loss_sum=head_loss_sum if head else LanguageModelLoss(), groups=groups,
        schedule=make_schedule(case.TRAINING, case.STEPS), logging_steps=1, eval_steps=None, observer=Log(),
    )  # fmt: skip
    engine.train()
    with gathers_of(None if head else base.model.lm_head.weight) as gathers:
        trainer.fit()
    found["output_layer_gathers"] = comm.gather_objects([gathers["forward"], gathers["backward"]])
    found["empty_micro_batches"] = comm.gather_objects(
        sum(not ids for step in range(case.STEPS) for ids in trainer.feed.step(step).micro_batches)
    )
    found["values"] = values_of(groups)
    found["masters"] = masters(engine, groups)
    engine.destroy()
    return found


@contextmanager
def gathers_of(weight: Any) -> Iterator[Counter[str]]:
    """Count how often ZeRO-3 gathers a weight in forwards and in backwards."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    counts: Counter[str] = Counter()
    name = "_PartitionedParameterCoordinator__all_gather_params_"
    gather = getattr(Coordinator, name)

    def counted(self: Any, params: Any, forward: bool, quantize: bool = False) -> None:
        if any(param is weight and param.ds_status.name == "NOT_AVAILABLE" for param in params):
            counts["forward" if forward else "backward"] += 1
        gather(self, params, forward, quantize)

    setattr(Coordinator, name, counted)
    try:
        yield counts
    finally:
        setattr(Coordinator, name, gather)


def masters(engine: Any, groups: list[Group]) -> list[list[float]] | None:
    """The fp32 values the optimizer steps on; None at stage 0 in fp32, where they are the parameters."""
    from deepspeed.utils import safe_get_full_fp32_param

    if engine.zero_optimization_stage() == 0:
        wrapped = getattr(engine.optimizer, "fp32_groups", None)
        if wrapped is None:
            return None
        values = [value for group in wrapped for value in group]
    else:
        values = [safe_get_full_fp32_param(value) for group in groups for value in group.parameters]
    assert all(value.dtype == torch.float32 for value in values)
    return [value.detach().flatten().tolist() for value in values]


def train_stage(stage: int, folders: dict[str, str], regions: Regions, scored_base: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"splits": {}}
    splits = case.SPLITS[comm.world_size()]
    first = splits[0]
    for number, split in enumerate(splits):
        zero = zero_config_of(stage, split)
        base = scored_base if number == 0 else load(folders["llama"], zero)[0]  # a run trains the base it scored
        groups = taso_groups(base, regions)
        found["splits"][f"{split.micro}x{split.accumulation}"] = train(base, groups, zero, split)

    zero = zero_config_of(stage, first, bf16=True)
    base, *_ = load(folders["llama"], zero, bf16=True)
    groups = taso_groups(base, regions)
    found["bf16"] = train(base, groups, zero, first)
    if comm.world_size() > case.SMALL_WORLD:
        return found

    if stage in (0, 3):
        zero = zero_config_of(stage, first)
        base, *_ = load(folders["llama"], zero, checkpointing=True)
        groups = taso_groups(base, regions)
        forwards: list[int] = []
        base.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: forwards.append(1))
        found["checkpointed"] = train(base, groups, zero, first)
        found["checkpointed"]["forwards"] = len(forwards)

        base, targets = load(folders["llama"], zero)
        torch.manual_seed(case.SEED)
        attach_lora(base.model, list(targets), rank=2, scaling=1.0, transposed=False)
        trained = list(lora_parameters(base.model).values())
        groups = [make_group(case.TRAINING, "adapter", trained)]
        found["lora"] = train(base, groups, zero, first)
        if stage == 3:
            shards: Any = trained
            found["lora"]["partitioned"] = all(is_partitioned(value) for value in shards)

    zero = zero_config_of(stage, first)
    base, targets = load(folders["bert"], zero, head=True)
    corner = {
        name: CoreRegion(torch.arange(4), torch.arange(5), shape.out_features, shape.in_features)
        for name, shape in targets.shapes.items()
    }
    groups = taso_groups(base, corner)
    values = [values_of(groups)]  # before the first step, and after each
    found["head"] = train(
        base, groups, zero, first, rows=case.HEAD_TRAIN, head=True,
        after_step=lambda: values.append(values_of(groups)),
    )  # fmt: skip
    found["head"]["first_step"] = values[:2]
    found["head"]["groups"] = [(group.name, len(group.parameters)) for group in groups]
    return found


def run_stage(stage: int, folders: dict[str, str]) -> dict[str, Any]:
    every = len(case.CALIBRATION)
    runs = [
        ("batches of 2", "importance", "signed_mean", 2),
        ("batches of 5", "importance", "signed_mean", 5),
        ("batches of 5 in passes", "importance", "signed_mean", 5),
        ("one batch", "importance", "signed_mean", every),
        ("one batch, absolute", "importance", "per_batch_abs", every),
        ("batches of 5, absolute", "importance", "per_batch_abs", 5),
        ("magnitude", "magnitude", "signed_mean", 5),
        ("gradient", "gradient", "signed_mean", 5),
        ("random", "random", "signed_mean", 5),
    ]
    llama, base = score(folders["llama"], stage, runs)
    found = {"llama": llama, "train": train_stage(stage, folders, regions_of(llama["batches of 2"]), base)}
    found["bf16"], _ = score(folders["llama"], stage, runs[1:2], bf16=True)
    if comm.world_size() <= case.SMALL_WORLD:
        found["gpt2"], _ = score(folders["gpt2"], stage, runs[1:2])
    return found


def run_stages(folders: dict[str, str]) -> dict[int, dict[str, Any]]:
    """Run all stages of as many ranks as there are on the models ``llama``, ``gpt2`` and ``bert``."""
    # Chunks of five positions: how many there are differs from rank to rank, and an empty micro-batch has none.
    chunked_loss.CHUNK_BYTES = 5 * 4 * VOCABULARY
    results = {}
    for stage in case.STAGES[comm.world_size()]:
        results[stage] = run_stage(stage, folders)
        gc.collect()
    return results
