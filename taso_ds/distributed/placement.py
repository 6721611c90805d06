"""Where ZeRO-3 keeps partitions besides the device: CPU, NVMe, and a second copy inside each node (ZeRO++ hpZ)."""

import os
import uuid
from pathlib import Path

from taso_ds.distributed import ds_config_keys as keys
from taso_ds.distributed.accelerator import can_build_async_io
from taso_ds.distributed.ds_config_values import AUTO, Section, checked, checked_section, number_of, section_of
from taso_ds.distributed.zero_config import ZeroConfig
from taso_ds.errors import UserError


def resolve_offload(zero: Section, nvme_path: str | None, source: str) -> None:
    """Check the offload sections, which DeepSpeed ignores at stages that have nothing to offload; fill ``nvme_path``.

    Args:
        zero: the ``zero_optimization`` section; changed in place.
        nvme_path: the folder where the JSON leaves it to the run; None where the run names none.
        source: what to call the JSON in errors.

    Raises:
        UserError: an unknown key or device, a stage without anything to offload, or no folder for NVMe.
    """
    for name, known, stages in (
        ("offload_optimizer", keys.OFFLOAD_OPTIMIZER, (1, 2, 3)),
        ("offload_param", keys.OFFLOAD_PARAM, (3,)),
    ):
        path = f"zero_optimization.{name}."
        if name not in zero:
            continue
        section = checked(checked_section(zero[name], path[:-1], source), known, path, source)
        zero[name] = section
        for key, value in (("ratio", 1), ("super_offload", False)) if name == "offload_optimizer" else ():
            if section.get(key, value) not in (value, AUTO):
                raise UserError(
                    f"{source}: {path}{key} needs DeepSpeed's own Adam, and the optimizer is torch's AdamW: remove it"
                )
        device = section.get("device", "none")
        stage = number_of(zero, "stage")
        if device in ("cpu", "nvme") and stage not in stages:
            raise UserError(f"{source}: zero_optimization.{name} needs stage {min(stages)} or more, not {stage}")
        if device != "nvme":
            continue
        if name == "offload_optimizer":
            raise UserError(f"{source}: {path}device nvme is not supported: an adapter's optimizer state is a few MB")
        if not isinstance(section.get("nvme_path"), str) or not section["nvme_path"]:
            raise UserError(f"{source}: {path}device nvme needs {path}nvme_path, a folder on a local disk")
        if section["nvme_path"] == AUTO:
            if nvme_path is None:
                raise UserError(f"{source}: {path}nvme_path is not known: pass --nvme_path, a folder on a local disk")
            section["nvme_path"] = nvme_path
        # DeepSpeed 0.19 reads ahead each use of a frozen parameter that it will meet, those of the coming backward too.
        # At the turn it meets one twice and stops with "already assigned swap buffer".
        if zero.setdefault("stage3_prefetch_bucket_size", 0) != 0:
            raise UserError(f"{source}: zero_optimization.stage3_prefetch_bucket_size must be 0 with {path}device nvme")


def resolve_secondary_shards(zero: Section, world_size: int, ranks_per_node: int, source: str) -> None:
    """Make ``zero_hpz_partition_size`` a number: the ranks of one node, and 1 (off) when there is but one node.

    Args:
        zero: the ``zero_optimization`` section; changed in place.
        source: what to call the JSON in errors.

    Raises:
        UserError: groups of that size do not make up the ranks, or the stage has no parameter shards.
    """
    name = "zero_hpz_partition_size"
    if name not in zero:
        return
    if zero[name] == AUTO:
        zero[name] = ranks_per_node if ranks_per_node < world_size else 1
    size, stage = number_of(zero, name), number_of(zero, "stage")
    if size > 1 and stage != 3:
        raise UserError(f"{source}: zero_optimization.{name} needs stage 3, not {stage}")
    if size < 1 or world_size % size:
        raise UserError(f"{source}: zero_optimization.{name} is {size}, which does not divide the {world_size} ranks")
    if size > 1 and section_of(zero, "offload_param").get("device", "none") != "none":
        raise UserError(f"{source}: zero_optimization.{name} keeps a second copy on the device: drop offload_param")


def check_nvme(zero: ZeroConfig) -> None:
    """Refuse an NVMe folder that DeepSpeed could not use on this rank, before any weight is loaded.

    Raises:
        UserError: DeepSpeed's async_io cannot be built, or the folder cannot be written past the page cache.
    """
    folder = zero.nvme_folder
    if folder is None:
        return
    if not can_build_async_io():
        raise UserError("nvme_path: DeepSpeed's async_io needs libaio: install libaio-dev (libaio-devel on Red Hat)")
    check_direct_io(folder)


def check_direct_io(folder: Path) -> None:
    """Refuse a folder that cannot be written past the page cache.

    Raises:
        UserError: the folder, and why.
    """
    probe = folder / f".taso-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
    except OSError as error:
        raise UserError(f"nvme_path: cannot write into {folder}: {error.strerror}") from error
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_DIRECT))
    except OSError as error:
        raise UserError(f"nvme_path: {folder} has no direct I/O ({error.strerror}): use a local disk") from error
    finally:
        probe.unlink()
