"""Trains one run per case, one after another, on however many ranks the launcher started, then evaluates some again.

torchrun variants_worker.py CASES.json, which holds lists of the flags of ``launch/train.py`` under "train" and of those
of ``launch/evaluate.py`` under "evaluate"; the scores of these go to evaluated.json beside it.
"""

import faulthandler
import gc
import json
import sys
from pathlib import Path

from taso_ds.config import parse_run_config
from taso_ds.distributed import comm, process_group
from taso_ds.interrupts import Interrupts
from taso_ds.runs.finished import evaluate
from taso_ds.runs.finished_arguments import EVALUATE, parse_over_run
from taso_ds.runs.join import join
from taso_ds.runs.train import train


def main(cases: str) -> None:
    from deepspeed.utils import groups

    faulthandler.dump_traceback_later(400, exit=True)  # a rank that waits for ever says where
    flags_of = json.loads(Path(cases).read_text())
    for flags in flags_of["train"]:
        config = parse_run_config(flags)
        join(config)
        train(config, Interrupts(process_group.give_up, resumes=True))
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # hpZ's, which DeepSpeed makes once in a process
        gc.collect()
    scores = []
    for flags in flags_of["evaluate"]:
        config, finished = parse_over_run(flags, verb=EVALUATE)
        scores.append(evaluate(config, finished.run))
        gc.collect()
    if comm.is_main():
        Path(cases).with_name("evaluated.json").write_text(json.dumps(scores))
    process_group.leave()


if __name__ == "__main__":
    main(sys.argv[1])
