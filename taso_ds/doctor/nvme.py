"""What a run that offloads to NVMe asks of this machine."""

from pathlib import Path

from taso_ds.distributed.ds_config_values import AUTO, Section
from taso_ds.distributed.placement import check_direct_io
from taso_ds.doctor.finding import Finding, fail, ok
from taso_ds.doctor.folders import existing
from taso_ds.errors import UserError


def nvme_section(ds_config: Section) -> Section | None:
    """Return the section of a DeepSpeed JSON that offloads to NVMe; None where nothing does."""
    zero = ds_config.get("zero_optimization")
    section = zero.get("offload_param") if isinstance(zero, dict) else None
    return section if isinstance(section, dict) and section.get("device") == "nvme" else None


def pinned_bytes(section: Section, *, element: int) -> int:
    """Return the bytes of a rank's locked buffers: DeepSpeed's defaults where the JSON has no numbers."""
    if not section.get("pin_memory", False):
        return 0
    count, size = section.get("buffer_count", 5), section.get("buffer_size", 100_000_000)
    return int(count * size) * element if isinstance(count, int) and isinstance(size, (int, float)) else 0


def check_folder(section: Section, nvme_path: str | None) -> Finding:
    """Write past the page cache where the run will."""
    named = section.get("nvme_path", AUTO)
    folder = nvme_path if named == AUTO else str(named)
    if folder is None:
        return fail("NVMe folder", "the run offloads to NVMe and names no folder", "pass --nvme_path FOLDER")
    try:
        check_direct_io(existing(Path(folder)))
    except UserError as error:
        return fail("NVMe folder", str(error).removeprefix("nvme_path: "), "pass --nvme_path, a folder on a local disk")
    return ok("NVMe folder", f"{folder}: direct I/O works")
