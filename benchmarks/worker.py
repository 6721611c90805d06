"""What ``benchmarks/train.py`` launches on every rank: timed training steps, timed scoring, or peak memory."""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import resident
import torch
from torch import Tensor

from taso_ds.adapters.selection import ELEMENT_FRACTION_LADDER
from taso_ds.config import parse_run_config
from taso_ds.data.batch_plan import BatchPlan
from taso_ds.defaults import with_defaults
from taso_ds.distributed import comm, process_group, zero
from taso_ds.distributed import engine as engines
from taso_ds.job import Job
from taso_ds.objectives.batches import dealt_batches, on_device
from taso_ds.runs.core_regions import find_regions
from taso_ds.runs.join import join
from taso_ds.runs.open_job import load_base, open_job
from taso_ds.scoring import score as calibrate
from taso_ds.scoring.regions import calibration_rows
from taso_ds.training.feed import Feed
from taso_ds.training.optim import Schedule, make_optimizer
from taso_ds.training.trainer import Trainer

Action = Callable[[], object]
_COMMON = (
    "--ds_config zero3.json --task boolq --data_dir embedded --max_train_samples 512 --max_seq_length 256"
    " --per_device_train_batch_size 4 --calibration_samples 96 --importance magnitude --learning_rate 1e-4"
)


def make_job(flags: Sequence[str]) -> Job:
    config = with_defaults(parse_run_config([*_COMMON.split(), *flags]))
    join(config)
    return open_job(config)


def make_trainer(job: Job, steps: int) -> Trainer:
    """Build one method's engine, as a run does. Regions come from magnitudes: where they lie changes no time."""
    base, targets = load_base(job)
    method = job.config.method
    regions = find_regions(job, base, targets).cut if method.needs_regions else {}
    groups = method.attach(base, targets, regions)
    engine = engines.training_engine(base.model, make_optimizer(groups, job.config.training), job.zero)
    engine.train()
    plan = BatchPlan(len(job.rows), job.sizes.global_batch_size, seed=0)
    return Trainer(
        engine,
        Feed(job.rows, plan, job.sizes, job.objective.collate),
        loss_sum=job.objective.loss_sum,
        groups=groups,
        schedule=Schedule("constant", steps, 0),
        logging_steps=1,
        eval_steps=None,
    )


def time_steps(methods: dict[str, list[str]], steps: int) -> dict[str, Any]:
    """Take the methods' steps in turn and return each one's median."""
    trainers = {name: make_trainer(make_job(flags), steps) for name, flags in methods.items()}
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    tokens: dict[str, list[int]] = {name: [] for name in trainers}
    for step in range(steps + 2):
        for name, trainer in trainers.items():
            comm.barrier()
            started = time.perf_counter()
            metrics = trainer.step(step)
            comm.barrier()
            if step >= 2:
                seconds[name].append(time.perf_counter() - started)
                tokens[name].append(metrics["tokens"])
    return {
        name: {
            "median_s": statistics.median(seconds[name]),
            "tokens": statistics.mean(tokens[name]),
            "trainable": sum(zero.full_numel(row) for group in trainers[name].groups for row in group.parameters),
        }
        for name in trainers
    }


@dataclasses.dataclass(frozen=True)
class ScoringJobs:
    """What is compared: scoring, and a plain forward and backward with all weight gradients on the same batches."""

    backward: Action
    score: Action
    select: Action
    tokens: int
    allowed_gb: float


@contextmanager
def scoring_jobs(*flags: str) -> Iterator[ScoringJobs]:
    job = make_job(["--importance", "importance", *flags])
    base, targets = load_base(job)
    rows = calibration_rows(job.rows, number=job.config.calibration.calibration_samples, seed=job.config.run.seed)
    dealt = dealt_batches(rows, batch_size=8, collate=job.objective.collate)
    batches = [on_device(batch) for _, batch in dealt]
    settings = calibrate.ScoringSettings("importance", "signed_mean", ELEMENT_FRACTION_LADDER, 0)
    # the same gathering and selecting, without a backward before it
    weights_only = dataclasses.replace(settings, score="magnitude")
    weights: list[Any] = [target.matrix.weight for target in targets.values()]
    numels = [shape.numel for shape in targets.shapes.values()]
    losses = job.objective.loss_sum
    with engines.scoring_engine(base.model, job.zero) as model:
        score = partial(calibrate.score_regions, model, targets, loss_sum=losses)
        jobs = ScoringJobs(
            backward=partial(_plain_backward, model, weights, batches, losses),
            score=partial(score, batches=batches, settings=settings),
            select=partial(score, batches=[], settings=weights_only),
            tokens=sum(len(row.input_ids) for row in rows),
            allowed_gb=(sum(numels) / comm.world_size() + 2 * max(numels)) * 4 / 1e9,
        )
        jobs.backward()  # records DeepSpeed's trace
        yield jobs


def time_scoring(rounds: int) -> dict[str, Any]:
    """Score, and run a plain backward, in turn."""
    with scoring_jobs() as jobs:
        pairs = [(_seconds(jobs.backward), _seconds(jobs.score)) for _ in range(rounds)]
        selecting = _seconds(jobs.select)
    return {
        "backward_s": statistics.median(backward for backward, _ in pairs),
        "scoring_s": statistics.median(score for _, score in pairs),
        "select_s": selecting,
        "tokens": jobs.tokens,
    }


def scoring_memory(rounds: int) -> dict[str, Any]:
    """Return what scoring takes beyond the plain backward on the worst rank, each measured from a fresh start."""
    with scoring_jobs("--calibration_samples", "32") as jobs:
        extra = []
        for _ in range(rounds + 1):
            backward = _peak_gb(jobs.backward)
            extra.append(_peak_gb(jobs.score) - backward)
        worst = max(comm.gather_objects(statistics.median(extra[1:])))  # the first round also fills caches
    return {"extra_gb": worst, "allowed_gb": jobs.allowed_gb}


def _plain_backward(model: Any, weights: Sequence[Any], batches: Sequence[dict[str, Tensor]], losses: Any) -> None:
    """Forward and backward with every target's weight gradient, each dropped as soon as it is whole."""
    for weight in weights:
        weight.requires_grad_(True)
    handles = [weight.register_post_accumulate_grad_hook(_drop) for weight in weights]
    try:
        with calibrate.scoring_mode(model):
            for batch in batches:
                losses(model, batch)[0].backward()
    finally:
        for weight in weights:
            weight.requires_grad_(False)
        for handle in handles:
            handle.remove()


def _drop(weight: Any) -> None:
    weight.grad = None


def _seconds(action: Action) -> float:
    comm.barrier()
    started = time.perf_counter()
    action()
    comm.barrier()
    return time.perf_counter() - started


def _peak_gb(action: Action) -> float:
    """Return the peak resident memory of an action above its start."""
    before = resident.forget_peak()
    comm.barrier()
    action()
    comm.barrier()
    return resident.resident_gb("VmHWM") - before


def peak_memory(methods: dict[str, list[str]]) -> dict[str, Any]:
    """Return the worst rank's peak resident memory of a few steps."""
    (flags,) = methods.values()
    trainer = make_trainer(make_job(flags), 3)
    for step in range(3):
        trainer.step(step)
    return {"peak_gb": max(comm.gather_objects(resident.resident_gb("VmHWM")))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", choices=("steps", "scoring", "scoring_memory", "memory"), required=True)
    parser.add_argument("--methods", type=json.loads, default={})
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--local_rank", type=int)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.job == "steps":
        found = time_steps(arguments.methods, arguments.steps)
    elif arguments.job == "scoring":
        found = time_scoring(arguments.rounds)
    elif arguments.job == "scoring_memory":
        found = scoring_memory(arguments.rounds)
    else:
        found = peak_memory(arguments.methods)
    if comm.is_main():
        arguments.result.write_text(json.dumps(found))
    process_group.leave()


if __name__ == "__main__":
    main()
