"""Slurm: write the batch script of a run; its flags are checked before the job waits in a queue.

python launch/slurm.py --nodes 2 --partition gpu --plan_for a100-80 --task gsm8k --output_dir runs/gsm8k \
    --write gsm8k.sbatch
sbatch gsm8k.sbatch
"""

import sys

from taso_ds.entry import run_script
from taso_ds.interrupts import Interrupts


def _slurm(_: Interrupts) -> str:
    from taso_ds.batch_script import batch_script, parse_job, write_script

    job, config, flags = parse_job(sys.argv[1:], description=str(__doc__))
    if job.plan_for is not None:
        from taso_ds.flags.command_line import given_names
        from taso_ds.planning.arguments import PlanArguments
        from taso_ds.planning.report_text import planned_flags

        plan = PlanArguments(
            device=job.plan_for, network=job.plan_network, nodes=job.nodes, gpus_per_node=job.devices_per_node
        )
        flags = [*planned_flags(config, plan, given_names(flags)), *flags]
    return write_script(batch_script(job, flags), job)


def main() -> None:
    """Console entry point ``taso-slurm``."""
    run_script(_slurm)


if __name__ == "__main__":
    main()
