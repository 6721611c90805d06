"""Calibrate: score the base and write its core regions, without training.

deepspeed launch/calibrate.py --ds_config zero3.json --output_dir runs/regions
deepspeed launch/train.py --core_regions runs/regions/core_regions.safetensors
"""

from taso_ds.entry import run_script
from taso_ds.interrupts import Interrupts


def _calibrate(_: Interrupts) -> str:
    from taso_ds.config import parse_run_config

    config = parse_run_config(description=__doc__)
    from taso_ds.defaults import with_defaults
    from taso_ds.distributed import environment

    config = with_defaults(config)
    if config.run.dry_run:
        from taso_ds.runs.dry_run import describe

        return describe(config, environment.world_size(), goes_on=False) if environment.rank() == 0 else ""
    from taso_ds.runs.calibrate import calibrate
    from taso_ds.runs.join import join

    join(config)
    return f"RUN {calibrate(config)}"


def main() -> None:
    """Console entry point ``taso-calibrate``."""
    run_script(_calibrate, resumes=True, libraries_to_log=True)


if __name__ == "__main__":
    main()
