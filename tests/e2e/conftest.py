"""What the end-to-end tests share: one process group for all runs within this process."""

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist


@pytest.fixture(scope="package", autouse=True)
def _one_process() -> Iterator[None]:
    """Let scripts run one after another in this process: on the CPU, in one process group, which is left at the end."""
    from deepspeed.accelerator import real_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    from taso_ds.distributed import comm

    before, threads = dict(os.environ), torch.get_num_threads()
    os.environ["OMP_NUM_THREADS"] = "1"  # more threads only wait for one another on tiny models and busy machines
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real_accelerator, "ds_accelerator", CPU_Accelerator())
        patch.setattr(comm, "leave", lambda: None)
        patch.setattr(comm, "_stores", [])  # the meeting point ends with the group
        yield
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(before)
