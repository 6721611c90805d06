"""A Slurm batch script from flags: one process per device, requeued and resumed after a signal.

Everything that a site decides stands in the script's head, where it can be edited. ``srun`` starts the ranks. The flags
behind ``sbatch script`` go on to the program.
"""

import dataclasses
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from taso_ds.config import GROUPS, RunConfig
from taso_ds.errors import UserError
from taso_ds.flags.command_line import given_names, parse_groups, parse_known
from taso_ds.flags.flag import arg, check_new_file
from taso_ds.flags.verbs import command
from taso_ds.training.arguments import batch_sizes

_TIME = re.compile(r"\d+|(\d+-)?\d+(:\d+){0,2}")
_WORD = re.compile(r"[\w.,:-]+")


@dataclass(frozen=True)
class SlurmArguments:
    """The job. The flags of a run stand beside these, and are written into the script."""

    nodes: int = arg(1, "Number of nodes.", unit="nodes")
    devices_per_node: int = arg(8, "Devices of a node, one process each.", unit="devices")
    cpus_per_device: int = arg(8, "CPU cores of each process.", unit="cores")
    gpus: bool = arg(True, "The devices are GPUs; --no_gpus on a CPU cluster.")
    partition: str | None = arg(None, "Slurm partition; default: the site's.")
    account: str | None = arg(None, "Account the job is booked on.")
    time: str = arg("24:00:00", "Time limit as Slurm writes it; the run is saved two minutes before.", unit="time")
    job_name: str = arg("taso", "Name of the job.")
    activate: str = arg(
        'source "${VENV:-.venv}/bin/activate" || exit', "Shell line that brings taso-train into PATH.", unit="line"
    )
    container: str | None = arg(None, "Words before the program, like 'apptainer exec --nv taso.sif'.", unit="words")
    network_interface: str | None = arg(None, "Interface between the nodes, like ib0, for NCCL and gloo.")
    requeue: bool = arg(True, "Queue again what was stopped before its end; --no_requeue to leave it.")
    sweep_tasks: list[str] | None = arg(
        None, "Job array: one run for each of these tasks and sweep_seeds.", unit="task"
    )
    sweep_seeds: list[int] | None = arg(None, "Seeds of the job array.", unit="seed")
    plan_for: str | None = arg(None, "Let the plan choose the fastest strategy that fits these devices, like a100-80.")
    plan_network: str = arg("ib-400", "Network between the nodes, for the plan.")
    write: str | None = arg(None, "File to write; default: the terminal.", path=True)

    def __post_init__(self) -> None:
        for name in ("nodes", "devices_per_node", "cpus_per_device"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} is not a positive number")
        for name in ("partition", "account", "job_name"):
            value = getattr(self, name)
            if value is not None and not _WORD.fullmatch(value):
                raise UserError(f"{name}: {value!r} is not a word of letters, digits and .,:_-")
        if not _TIME.fullmatch(self.time):
            raise UserError(f"time: {self.time!r} is not a time limit of Slurm, like 24:00:00 or 2-12")
        check_new_file("write", self.write)
        if (self.sweep_tasks is None) != (self.sweep_seeds is None):
            raise UserError("sweep_tasks and sweep_seeds make a job array together: pass both")

    @property
    def world_size(self) -> int:
        return self.nodes * self.devices_per_node


def parse_job(argv: Sequence[str], *, description: str = "") -> tuple[SlurmArguments, RunConfig, list[str]]:
    """Parse the job's flags, and check those of the run.

    Returns:
        The job, the run, and the words of the run's flags as they were given.

    Raises:
        UserError: unknown flag, a value that cannot work, or no run folder to go on in.
    """
    *groups, job = parse_groups((*GROUPS, SlurmArguments), argv, description=description, own=SlurmArguments)
    config = RunConfig(*groups, given=given_names(argv))
    _, flags = parse_known([SlurmArguments], argv)
    if job.sweep_tasks is not None:
        if given := config.given.intersection(_flags_of_each_run(job)):
            name = min(given)
            raise UserError(f"{name}: a job array decides it for each of its runs; drop it")
    elif config.run.output_dir is None:
        raise UserError("output_dir: name a run folder; the job goes on there when it is started again")
    _check_run(job, config)
    if job.requeue and (config.run.overwrite_output_dir or config.run.resume != "auto"):
        raise UserError("resume, overwrite_output_dir: a requeued job would begin there again; pass --no_requeue too")
    return job, config, flags


def _check_run(job: SlurmArguments, config: RunConfig) -> None:
    """Refuse what the ranks would refuse once the job has waited for them."""
    for seed in job.sweep_seeds or []:
        dataclasses.replace(config.run, seed=seed)
    for name in ("sweep_tasks", "sweep_seeds"):
        values = getattr(job, name) or []
        if len(set(values)) < len(values):
            raise UserError(f"{name}: {' '.join(map(str, values))} names one twice; its runs would share a folder")
    if config.run.dry_run:
        raise UserError(f"dry_run: the job would only print; drop --dry_run, or pass it to {command('train')}")
    if config.run.expected_world_size not in (None, job.world_size):
        raise UserError(
            f"expected_world_size: {config.run.expected_world_size} is not {job.nodes} nodes × {job.devices_per_node}"
            f" devices = {job.world_size}; drop it"
        )
    batch_sizes(config.training, job.world_size)


def write_script(text: str, job: SlurmArguments) -> str:
    """Write the script where the job says; returns the last line for the user."""
    if job.write is None:
        return text.rstrip("\n")
    path = Path(job.write)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"write: cannot write {path}: {error.strerror}") from error
    return f"SCRIPT {path}"


def batch_script(job: SlurmArguments, flags: Sequence[str]) -> str:
    """Return the script of a job whose runs have these flags."""
    parts = [
        _head(job),
        _environment(job),
        *([] if job.sweep_tasks is None else [_sweep(job)]),
        _start(job, flags),
        _REQUEUE if job.requeue else 'exit "$status"\n',
    ]
    return "\n".join(parts)


def _head(job: SlurmArguments) -> str:
    runs = "" if job.sweep_tasks is None else "one run per task and seed, "
    options = {
        "job-name": job.job_name,
        "partition": job.partition,
        "account": job.account,
        "nodes": job.nodes,
        "ntasks-per-node": job.devices_per_node,
        "gpus-per-node": job.devices_per_node if job.gpus else None,
        "cpus-per-task": job.cpus_per_device,
        "time": job.time,
        "array": None if job.sweep_tasks is None else f"0-{len(job.sweep_tasks) * len(job.sweep_seeds or ()) - 1}",
        "signal": "USR1@120",
        "output": "%x-%j.out",
        "open-mode": "append",
    }
    lines = [
        "#!/bin/bash",
        f"# {_plural(job.nodes, 'node')} with {_plural(job.devices_per_node, 'device')}: {runs}one process per device.",
        "# Further flags go on to the program: sbatch THIS_FILE --max_steps 100",
        *(f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None),
        "#SBATCH --requeue" if job.requeue else "#SBATCH --no-requeue",
    ]
    return "\n".join(lines) + "\n"


def _environment(job: SlurmArguments) -> str:
    default = {field.name: field.default for field in dataclasses.fields(SlurmArguments)}["activate"]
    lines = []
    if job.activate == default and job.container is None:
        lines += ["# shellcheck source=/dev/null", job.activate]
    elif job.activate != default:
        lines += [job.activate]
    lines += [
        "set -euo pipefail",
        'export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"  # srun does not take it over by itself',
    ]
    if job.network_interface is None:
        lines += ["# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0  # where the nodes do not find each other"]
    else:
        name = shlex.quote(job.network_interface)
        lines += [f"export NCCL_SOCKET_IFNAME={name} GLOO_SOCKET_IFNAME={name}"]
    return "\n".join(lines) + "\n"


def _flags_of_each_run(job: SlurmArguments) -> dict[str, str]:
    """Return the flags that a job array decides, with words of its script."""
    return {"task": "$task", "seed": "$seed", "output_dir": f"runs/{job.job_name}/$task-seed$seed"}


def _sweep(job: SlurmArguments) -> str:
    tasks, seeds = shlex.join(job.sweep_tasks or ()), " ".join(map(str, job.sweep_seeds or ()))
    run = " ".join(f'--{name} "{word}"' for name, word in _flags_of_each_run(job).items())
    return (
        f"tasks=({tasks})\n"
        f"seeds=({seeds})\n"
        "task=${tasks[SLURM_ARRAY_TASK_ID / ${#seeds[@]}]}\n"
        "seed=${seeds[SLURM_ARRAY_TASK_ID % ${#seeds[@]}]}\n"
        f"run=({run})\n"
    )


def _start(job: SlurmArguments, flags: Sequence[str]) -> str:
    # the program follows from PROGRAM, so that one script serves a chain: calibrate, train, evaluate
    words = [*([] if job.container is None else [job.container]), '"${PROGRAM:-taso-train}"']
    run = shlex.join(flags) if job.sweep_tasks is None else " ".join(['"${run[@]}"', *map(shlex.quote, flags)])
    # A rank that fails ends the others, and rank 0 says why; Slurm's own --kill-on-bad-exit would silence it. --wait is
    # for ranks that cannot know, because they have not met yet.
    return (
        "status=0\n"
        "srun --wait=60 --mpi=none \\\n"
        f"    {' '.join(words)} --expected_world_size {job.world_size} \\\n"
        f'    {run} "$@" || status=$?\n'
    )


# 138 = 128 + SIGUSR1: a rank whose Python had not started yet.
_REQUEUE = """\
# Stopped by a signal, and saved (75) or not begun yet (138): the same command goes on from there.
if [[ $status == 75 || $status == 138 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
