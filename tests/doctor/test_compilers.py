"""Building operators: real compilers that work and that do not, a PATH without ninja, toolkits of other versions."""

import os
import shutil
from pathlib import Path

import pytest
from faked import script

from taso_ds.distributed.accelerator import Accelerator, build_folder
from taso_ds.doctor.compilers import check_build_folder, check_compiler, check_cuda_toolkit, check_libaio
from taso_ds.doctor.finding import FAIL, OK, WARN

CPU = Accelerator("cpu", "gloo", 1, True, None)
GPU = Accelerator("cuda", "nccl", 8, True, "12.4")


@pytest.mark.skipif(shutil.which("c++") is None or shutil.which("ninja") is None, reason="no compiler on this machine")
def test_this_machine_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    assert [(one.check, one.status) for one in check_compiler(CPU, offload=False)] == [
        ("C++ compiler", OK),
        ("ninja", OK),
    ]


@pytest.mark.parametrize(
    ("accelerator", "offload", "status"),
    [(CPU, False, FAIL), (GPU, False, WARN), (GPU, True, FAIL), (None, False, FAIL)],
)
def test_without_compiler_and_ninja(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, accelerator: Accelerator | None, offload: bool, status: str
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    compiler, ninja = check_compiler(accelerator, offload=offload)
    assert (compiler.status, ninja.status) == (status, status)
    assert "No such file" in compiler.found
    assert ninja.remedy.startswith("pip install ninja")


def test_a_compiler_that_is_there_and_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = script(tmp_path / "g++", 'echo "fatal error: vector: No such file" >&2; exit 1')
    monkeypatch.setenv("CXX", str(broken))
    found = check_compiler(CPU, offload=False)[0]
    assert found.status == FAIL
    assert "fatal error: vector" in found.found


@pytest.fixture
def _cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A torch built for CUDA 12.4 that finds its toolkit in tmp_path."""
    import torch
    import torch.utils.cpp_extension as extension

    monkeypatch.setattr(torch.version, "cuda", GPU.cuda)
    monkeypatch.setattr(extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("DS_SKIP_CUDA_CHECK", raising=False)


@pytest.mark.usefixtures("_cuda")
@pytest.mark.parametrize(
    ("release", "offload", "status"),
    [("12.4", False, OK), ("12.6", True, OK), ("11.8", False, WARN), ("11.8", True, FAIL), (None, False, WARN)],
)
def test_cuda_toolkit(tmp_path: Path, release: str | None, offload: bool, status: str) -> None:
    if release is not None:
        script(tmp_path / "bin" / "nvcc", f"echo 'Cuda compilation tools, release {release}, V{release}.99'")
    (found,) = check_cuda_toolkit(GPU, offload=offload)
    assert found.status == status
    assert "12.4" in found.found
    assert release is None or release in found.found


def test_no_toolkit_is_needed_without_cuda() -> None:
    assert check_cuda_toolkit(CPU, offload=True) == []
    assert check_cuda_toolkit(Accelerator("xpu", "ccl", 4, True, None), offload=False) == []


def test_locks_of_builds_that_died(tmp_path: Path) -> None:
    (building,) = check_build_folder(tmp_path / "new")
    assert (building.check, building.status) == ("build folder", OK)
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert len(check_build_folder(tmp_path)) == 1  # of a build that is running now
    os.utime(lock, (0, 0))
    _, left = check_build_folder(tmp_path)
    assert (left.status, left.remedy) == (WARN, f"rm {lock}")
    assert check_build_folder(Path("/proc/extensions"))[0].status == FAIL


def test_where_operators_are_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert build_folder() == tmp_path
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    assert build_folder().name == "torch_extensions"


def test_libaio(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_, **__: True)
    assert check_libaio(offload=True).status == OK
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_, **__: False)
    assert check_libaio(offload=False).status == OK
    missing = check_libaio(offload=True)
    assert missing.status == FAIL
    assert "libaio-dev" in missing.remedy
