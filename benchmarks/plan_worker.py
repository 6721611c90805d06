"""What ``plan_check.py`` and ``scale.py`` launch on every rank: the phases of a run, with time and peak memory.

All flags but ``--result`` are those of ``launch/train.py``. Peaks are resident memory above what the process held when
everything was imported, the ranks had met and the data was read.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import resident
import torch
import transformers.models.llama.modeling_llama  # noqa: F401  (imported lazily otherwise, inside what is measured)

from taso_ds.config import parse_run_config
from taso_ds.data.batch_plan import BatchPlan
from taso_ds.defaults import with_defaults
from taso_ds.distributed import comm, process_group
from taso_ds.distributed import engine as engines
from taso_ds.job import Job
from taso_ds.runs.core_regions import find_regions
from taso_ds.runs.export import save
from taso_ds.runs.folder import RunFolder
from taso_ds.runs.join import join
from taso_ds.runs.open_job import load_base, open_job
from taso_ds.runs.stages import Stages
from taso_ds.training.feed import Feed
from taso_ds.training.optim import Schedule, make_optimizer
from taso_ds.training.trainer import Trainer


class Phases:
    """The worst rank's peak resident memory and seconds of each phase; of one that repeats, the last one's seconds."""

    def __init__(self) -> None:
        comm.sum_everywhere(torch.zeros(1 << 20, device=comm.device()))
        self.start = resident.forget_peak()
        self.began = time.perf_counter()
        self.found: dict[str, dict[str, float]] = {}

    def end(self, name: str) -> None:
        peak = resident.resident_gb("VmHWM") - self.start
        seconds = time.perf_counter() - self.began
        after = resident.forget_peak() - self.start
        own = {
            "peak_gb": max(peak, self.found.get(name, {}).get("peak_gb", 0.0)),
            "after_gb": after,
            "seconds": seconds,
        }
        self.found[name] = {key: max(comm.gather_objects(value)) for key, value in own.items()}
        self.began = time.perf_counter()


def run(job: Job, folder: Path) -> dict[str, dict[str, float]]:
    phases, config = Phases(), job.config
    base, targets = load_base(job)
    phases.end("load")
    regions = find_regions(job, base, targets).cut
    phases.end("score")
    groups = config.method.attach(base, targets, regions)
    engine = engines.training_engine(base.model, make_optimizer(groups, config.training), job.zero)
    engine.train()
    steps = config.training.max_steps
    trainer = Trainer(
        engine,
        Feed(
            job.rows,
            BatchPlan(len(job.rows), job.sizes.global_batch_size, seed=0),
            job.sizes,
            job.objective.collate,
        ),
        loss_sum=job.objective.loss_sum,
        groups=groups,
        schedule=Schedule("constant", steps, 0),
        logging_steps=steps,
        eval_steps=None,
    )
    phases.end("start")
    for step in range(steps):
        trainer.step(step)
        phases.end("first step" if step == 0 else "train")  # the first one records DeepSpeed's trace
    out = RunFolder(folder)
    comm.on_main(out.start)
    save(job, out.path, base, engine.module, Stages([]))
    phases.end("export")
    return phases.found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--local_rank", type=int)
    arguments, flags = parser.parse_known_args()
    config: Any = with_defaults(parse_run_config(flags))
    join(config)
    if config.model.load_in_4bit:  # loading would import what quantizes
        import accelerate  # noqa: F401
        import bitsandbytes  # noqa: F401
        import transformers.integrations.bitsandbytes  # noqa: F401
    found = run(open_job(config), arguments.result.parent / "run")
    if comm.is_main():
        arguments.result.write_text(json.dumps(found))
    process_group.leave()


if __name__ == "__main__":
    main()
