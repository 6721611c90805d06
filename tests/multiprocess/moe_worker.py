"""Scores and trains each mixture of experts at ZeRO stages 2 and 3 on however many ranks there are; writes JSON.

torchrun moe_worker.py OUT.json NAME=FOLDER ...
"""

import faulthandler
import json
import sys
from pathlib import Path

import parity_case as case
import parity_worker as worker
from deepspeed.utils import get_z3_leaf_modules

from taso_ds.distributed import comm
from taso_ds.distributed import engine as engines

RUNS = [("scores", "importance", "signed_mean", 5)]


def main(out: str, *folders: str) -> None:
    faulthandler.dump_traceback_later(200, exit=True)  # a rank that waits for ever says where
    comm.init(timeout_minutes=3.0)
    engines.quiet_deepspeed()
    split, results = case.SPLITS[comm.world_size()][0], {}
    for name, folder in (entry.split("=", 1) for entry in folders):
        for stage in (2, 3):
            scores, base = worker.score(folder, stage, RUNS)
            groups = worker.taso_groups(base, worker.regions_of(scores["scores"]))
            trained = worker.train(base, groups, worker.ds_config_of(stage, split), split)
            leaves = [type(module).__name__ for module in get_z3_leaf_modules(base.model)]
            results[f"{name} {stage}"] = scores | {"train": trained, "leaves": leaves}
    if comm.is_main():
        Path(out).write_text(json.dumps(results))
    comm.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
