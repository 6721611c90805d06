"""Scores and trains each mixture of experts at several ZeRO stages on however many ranks there are; writes JSON.

torchrun moe_worker.py OUT.json NAME=FOLDER ...
"""

import faulthandler
import json
import sys
from pathlib import Path
from typing import Any

import parity_case as case
import parity_worker as worker
from deepspeed.utils import get_z3_leaf_modules

from taso_ds.distributed import comm, process_group
from taso_ds.distributed import engine as engines

RUNS = [("scores", "importance", "signed_mean", 5)]
# Micro-batches of one row miss most experts; passes begin and end within a module of experts.
EXPERT_RUNS = [
    ("batches of 1", "importance", "signed_mean", 1),
    ("batches of 5 in passes", "importance", "signed_mean", 5),
    ("one batch", "importance", "signed_mean", 13),
    ("magnitude", "magnitude", "signed_mean", 5),
]


def without_experts(folder: str, stage: int, split: case.Split) -> dict[str, Any]:
    scores, base = worker.score(folder, stage, RUNS)
    groups = worker.taso_groups(base, worker.regions_of(scores["scores"]))
    trained = worker.train(base, groups, worker.zero_config_of(stage, split), split)
    leaves = [type(module).__name__ for module in get_z3_leaf_modules(base.model)]
    return scores | {"train": trained, "leaves": leaves}


def with_experts(folder: str, stage: int, split: case.Split, *, checkpointing: bool) -> dict[str, Any]:
    scores, base = worker.score(folder, stage, EXPERT_RUNS, checkpointing=checkpointing, experts=True)
    groups = worker.taso_groups(base, worker.regions_of(scores["one batch"]))
    trained = worker.train(base, groups, worker.zero_config_of(stage, split), split)
    return scores | {"train": trained}


def main(out: str, *folders: str) -> None:
    faulthandler.dump_traceback_later(450, exit=True)  # a rank that waits for ever says where
    process_group.init(timeout_minutes=3.0)
    engines.quiet_deepspeed()
    split, results = case.SPLITS[comm.world_size()][-1], {}
    for name, folder in (entry.split("=", 1) for entry in folders):
        for stage in (2, 3) if comm.world_size() > 1 else ():
            results[f"{name} {stage}"] = without_experts(folder, stage, split)
        for stage, checkpointing in ((0, False), (3, False), (3, True)):
            key = f"{name} {stage} experts" + " checkpointed" * checkpointing
            results[key] = with_experts(folder, stage, split, checkpointing=checkpointing)
    if comm.is_main():
        Path(out).write_text(json.dumps(results))
    process_group.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
