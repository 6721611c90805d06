"""Evaluate: the task metrics of what a finished run trained, or of a base model as it is.

deepspeed launch/evaluate.py --run runs/taso-sst2
deepspeed launch/evaluate.py --run runs/taso-sst2 --task rte --data_dir embedded
deepspeed launch/evaluate.py --model_name_or_path Qwen/Qwen2.5-3B-Instruct --task gsm8k
"""

import json

from taso_ds.entry import run_script
from taso_ds.interrupts import Interrupts


def _evaluate(_: Interrupts) -> str:
    from taso_ds.runs.finished_arguments import EVALUATE, parse_over_run

    config, finished = parse_over_run(verb=EVALUATE, description=__doc__)
    from taso_ds.runs.finished import evaluate
    from taso_ds.runs.join import join

    join(config)
    return json.dumps(evaluate(config, finished.run))


def main() -> None:
    """Console entry point ``taso-evaluate``."""
    run_script(_evaluate, libraries_to_log=True)


if __name__ == "__main__":
    main()
