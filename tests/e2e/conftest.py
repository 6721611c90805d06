"""What the end-to-end tests share: one process group for all runs within this process."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from damaged_places import damaged_models, damaged_runs, region_files
from sample_rows import write_splits

__all__ = ["damaged_models", "damaged_runs", "region_files"]  # fixtures


@pytest.fixture(scope="package", autouse=True)
def _one_process() -> Iterator[None]:
    """Let scripts run one after another in this process: on the CPU, in one process group, which is left at the end."""
    from deepspeed.accelerator import real_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    from taso_ds.distributed import process_group

    before, threads = dict(os.environ), torch.get_num_threads()
    os.environ["OMP_NUM_THREADS"] = "1"  # more threads only wait for one another on tiny models and busy machines
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real_accelerator, "ds_accelerator", CPU_Accelerator())
        patch.setattr(process_group, "leave", lambda: None)
        patch.setattr(process_group, "_stores", [])  # the meeting point ends with the group
        yield
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: rows, and nothing else. A cache of its own, so that nothing is converted already."""
    write_splits(tmp_path, 8, 8)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TASO_CACHE", str(tmp_path.with_name(f"{tmp_path.name}_cache")))
    return tmp_path


@pytest.fixture
def forbid_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_args: object, **_options: object) -> None:
        pytest.fail("the weights were loaded")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", load)
