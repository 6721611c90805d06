"""All checks of one job, in the order in which they matter to each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from taso_ds.distributed.accelerator import build_folder
from taso_ds.distributed.ds_config import read_ds_config
from taso_ds.distributed.ds_config_values import Section
from taso_ds.distributed.hostfile import read_hostfile
from taso_ds.doctor import cluster, compilers, folders, limits, network, nvme
from taso_ds.doctor.accelerator import check_accelerator, look_for_accelerator
from taso_ds.doctor.arguments import DoctorArguments
from taso_ds.doctor.cache import HubModel, check_cache
from taso_ds.doctor.finding import Finding, fail, ok, warn
from taso_ds.doctor.versions import check_versions
from taso_ds.errors import UserError

if TYPE_CHECKING:  # the rest of the package needs torch
    from taso_ds.config import RunConfig


@dataclass(frozen=True)
class JobFlags:
    """What the flags say of the job.

    Attributes:
        config: None where the flags could not be read.
        nvme: the section that offloads to NVMe; None where nothing does.
    """

    config: RunConfig | None
    nvme: Section | None

    @property
    def bf16(self) -> bool:
        return self.config is None or self.config.model.bf16

    @property
    def output_dir(self) -> Path:
        named = None if self.config is None else self.config.run.output_dir
        return Path("runs" if named is None else named)


def examine(arguments: DoctorArguments, flags: Sequence[str]) -> list[Finding]:
    """Examine this machine for a job.

    Args:
        flags: of ``launch/train.py``.

    Raises:
        UserError: a flag that the job itself would refuse.
    """
    try:
        job, findings = _read_flags(flags), check_versions()
    except ImportError as error:  # of what reads --config
        job, findings = JobFlags(None, None), [*check_versions(), _not_installed("flags", error)]
    accelerator, broken = look_for_accelerator()
    findings += broken
    if accelerator is not None:
        findings.append(check_accelerator(accelerator, bf16=job.bf16))
        findings += compilers.check_cuda_toolkit(accelerator, offload=job.nvme is not None)
    findings += compilers.check_compiler(accelerator, offload=job.nvme is not None)
    if accelerator is not None:
        findings.append(compilers.check_libaio(offload=job.nvme is not None))
        findings += compilers.check_build_folder(build_folder())
    hosts, unread = _read_hosts(arguments.hostfile)
    nodes = max(len(hosts), cluster.slurm_nodes())
    ranks = arguments.gpus_per_node or max(hosts.values(), default=accelerator.devices if accelerator else 1)
    needed, model, uncounted = _planned(job, ranks=nodes * ranks, ranks_per_node=ranks)
    findings += [*uncounted, *_folders(job, needed, nodes=nodes)]
    findings += _limits(job, nodes=nodes, ranks=ranks, is_host=accelerator is None or accelerator.is_host)
    backend = accelerator.backend if accelerator else "gloo"
    findings += [network.check_port(arguments.master_port), network.check_hostname(backend, nodes=nodes)]
    findings += _guarded("interface", lambda: [network.check_interfaces(backend)])
    findings += [cluster.check_slurm(), *unread, *(cluster.check_hosts(hosts) if hosts else [])]
    return [*findings, *_guarded("HF cache", lambda: check_cache(model))]


def _read_flags(flags: Sequence[str]) -> JobFlags:
    from taso_ds.config import parse_run_config

    config = parse_run_config(flags)
    return JobFlags(config, nvme.nvme_section(read_ds_config(config.run.ds_config)))


def _read_hosts(hostfile: str | None) -> tuple[dict[str, int], list[Finding]]:
    if hostfile is None:
        return {}, []
    try:
        return read_hostfile(hostfile), []
    except UserError as error:
        found = str(error).removeprefix("hostfile: ")
        return {}, [fail("hostfile", found, "write one line 'NAME slots=NUMBER' for each host")]
    except Exception as error:  # of the import, which a broken torch fails in its own way
        return {}, [fail("hostfile", f"DeepSpeed cannot read it: {error}", "install DeepSpeed again (pip install .)")]


def _folders(job: JobFlags, needed: dict[str, float] | None, *, nodes: int) -> list[Finding]:
    folder = job.output_dir
    remedy = "choose another --output_dir"
    findings = [
        folders.check_writing("output folder", folder, remedy=remedy),
        folders.check_space("output space", folder, needed, remedy=f"make room, or {remedy}"),
        folders.check_sharing("file system", folder, nodes=nodes),
    ]
    if job.nvme is not None and job.config is not None:
        findings.append(nvme.check_folder(job.nvme, job.config.run.nvme_path))
    return findings


def _planned(
    job: JobFlags, *, ranks: int, ranks_per_node: int
) -> tuple[dict[str, float] | None, HubModel | None, list[Finding]]:
    """Return what the run will write and download, from its model's ``config.json``, and whether that can be read."""
    if job.config is None or job.config.model.model_name_or_path is None:
        return None, None, []
    try:
        from taso_ds.job import preflight
        from taso_ds.planning.count_model import NotCountedError, count_model
        from taso_ds.planning.forecast import planned_files
    except (ImportError, OSError, RuntimeError) as error:  # the ways in which importing torch fails
        return None, None, [_not_installed("model", error)]
    model = job.config.model
    name = str(model.model_name_or_path)
    try:
        planned = preflight(_with_nvme(job.config), ranks, ranks_per_node=ranks_per_node, read_rows=False)
        shape = count_model(job.config, planned.base, planned.targets)
    except NotCountedError as error:
        return None, None, [warn("model", str(error), "it trains all the same; leave room on the disk")]
    except UserError as error:
        remedy = "correct the flag; a Hub id must be in the cache, or the Hub in reach"
        return None, None, [fail("model", " ".join(str(error).split()), remedy)]
    needed = planned_files(planned, shape)
    is_local = Path(name).is_dir() or model.gguf_file is not None
    hub = None if is_local else HubModel(name, model.model_revision, float(shape.stored_bytes))
    found = f"{name}: {shape.parameters:,} parameters, {shape.trainable:,} to train"
    return needed, hub, [ok("model", found)]


def _with_nvme(config: RunConfig) -> RunConfig:
    """Name some folder for NVMe where none is named: ``nvme.check_folder`` reports that; the rest is checked."""
    folder = config.run.nvme_path or config.run.output_dir or "."
    return dataclasses.replace(config, run=dataclasses.replace(config.run, nvme_path=folder))


def _limits(job: JobFlags, *, nodes: int, ranks: int, is_host: bool) -> list[Finding]:
    pinned = 0 if job.nvme is None else nvme.pinned_bytes(job.nvme, element=2 if job.bf16 else 4)
    return [
        limits.check_open_files(ranks=nodes * ranks),
        limits.check_locked_memory(pinned=pinned),
        limits.check_core_files(),
        limits.check_shared_memory(ranks=ranks, is_host=is_host),
    ]


def _guarded(check: str, action: Callable[[], list[Finding]]) -> list[Finding]:
    """Run a check that needs another package; without it that is the finding."""
    try:
        return action()
    except ImportError as error:
        return [_not_installed(check, error)]


def _not_installed(check: str, error: Exception) -> Finding:
    return fail(check, f"not checked: {error}", "install what is missing or broken (pip install .)")
