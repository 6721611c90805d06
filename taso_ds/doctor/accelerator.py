"""The devices of this machine, as DeepSpeed sees them."""

import os

from taso_ds.distributed.accelerator import Accelerator, find_accelerator
from taso_ds.doctor.finding import Finding, fail, ok, warn


def look_for_accelerator() -> tuple[Accelerator | None, list[Finding]]:
    """Return the accelerator, or what keeps torch and DeepSpeed from loading."""
    try:
        return find_accelerator(), []
    except Exception as error:
        # A library that is missing, of another CUDA or of another machine fails in as many ways as there are.
        first = (str(error).splitlines() or [""])[0][:160]
        found = f"torch and DeepSpeed do not load: {type(error).__name__}: {first}"
        return None, [fail("accelerator", found, "install both again (pip install .), with the same Python")]


def check_accelerator(accelerator: Accelerator, *, bf16: bool) -> Finding:
    """Judge the devices.

    Args:
        bf16: whether the run computes in it.
    """
    found = (
        f"{accelerator.devices} × {accelerator.name}, communication by {accelerator.backend},"
        f" bf16 {'supported' if accelerator.bf16 else 'not supported'}"
    )
    if accelerator.devices < 1:
        return fail("accelerator", found, "ask for devices in the job, or set DS_ACCELERATOR=cpu to do without")
    if bf16 and not accelerator.bf16:
        return fail("accelerator", found, "pass --no_bf16")
    if accelerator.is_host and accelerator.cuda and "DS_ACCELERATOR" not in os.environ:
        remedy = "run this on a node with GPUs, check the driver, or set DS_ACCELERATOR=cpu if that is meant"
        return warn("accelerator", f"{found}; but torch is built for CUDA {accelerator.cuda}", remedy)
    return ok("accelerator", found)
