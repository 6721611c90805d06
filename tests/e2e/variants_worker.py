"""Trains one run per case, one after another, on however many ranks the launcher started.

torchrun variants_worker.py CASES.json, which holds a list of the flags of ``launch/train.py``.
"""

import faulthandler
import gc
import json
import sys
from pathlib import Path

from taso_ds.config import parse_run_config
from taso_ds.distributed import process_group
from taso_ds.training.build import join
from taso_ds.training.run import train


def main(cases: str) -> None:
    from deepspeed.utils import groups

    faulthandler.dump_traceback_later(400, exit=True)  # a rank that waits for ever says where
    for flags in json.loads(Path(cases).read_text()):
        config = parse_run_config(flags)
        join(config)
        train(config)
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # hpZ's, which DeepSpeed makes once in a process
        gc.collect()
    process_group.leave()


if __name__ == "__main__":
    main(sys.argv[1])
