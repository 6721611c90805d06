"""Train: score the base, cut its core regions, train adapters there, evaluate, export and prove the export.

deepspeed launch/train.py --ds_config zero3.json
deepspeed launch/train.py --ds_config zero3.json --model_name_or_path Qwen/Qwen2.5-3B-Instruct --task gsm8k
python launch/train.py --task gsm8k --dry_run
"""

from taso_ds.entry import run_script
from taso_ds.interrupts import Interrupts


def _train(interrupts: Interrupts) -> str:
    from taso_ds.config import parse_run_config

    config = parse_run_config(description=__doc__)
    from taso_ds.defaults import with_defaults
    from taso_ds.distributed import environment

    config = with_defaults(config)
    if config.run.dry_run:
        from taso_ds.runs.dry_run import describe

        return describe(config, environment.world_size(), goes_on=True) if environment.rank() == 0 else ""
    from taso_ds.runs.join import join
    from taso_ds.runs.train import train

    join(config)
    return f"RUN {train(config, interrupts)}"


def main() -> None:
    """Console entry point ``taso-train``."""
    run_script(_train, resumes=True, libraries_to_log=True)


if __name__ == "__main__":
    main()
