"""The accelerator: what DeepSpeed sees here, and the machines where a run would not start."""

from dataclasses import replace

import pytest

from taso_ds.distributed.accelerator import Accelerator, find_accelerator
from taso_ds.doctor import accelerator as checks
from taso_ds.doctor.accelerator import check_accelerator, look_for_accelerator
from taso_ds.doctor.finding import FAIL, OK, WARN

GPUS = Accelerator("cuda", "nccl", 8, True, "12.4")


def test_this_machine() -> None:
    from deepspeed.accelerator import get_accelerator

    found, broken = look_for_accelerator()
    assert not broken
    assert found == find_accelerator()
    assert (found.name, found.devices) == (get_accelerator().device_name(), get_accelerator().device_count())


def test_an_installation_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> Accelerator:
        raise OSError("libcudart.so.12: cannot open shared object file\nand more")

    monkeypatch.setattr(checks, "find_accelerator", load)
    found, (finding,) = look_for_accelerator()
    assert found is None
    assert finding.status == FAIL
    assert finding.found.endswith("OSError: libcudart.so.12: cannot open shared object file")


def test_devices_and_precision() -> None:
    good = check_accelerator(GPUS, bf16=True)
    assert (good.status, good.found) == (OK, "8 × cuda, communication by nccl, bf16 supported")
    assert check_accelerator(replace(GPUS, devices=0), bf16=True).status == FAIL
    old = check_accelerator(replace(GPUS, bf16=False), bf16=True)
    assert (old.status, old.remedy) == (FAIL, "pass --no_bf16")
    assert check_accelerator(replace(GPUS, bf16=False), bf16=False).status == OK


def test_a_torch_for_gpus_that_sees_none(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = Accelerator("cpu", "gloo", 1, True, "12.4")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert check_accelerator(cpu, bf16=True).status == WARN
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert check_accelerator(cpu, bf16=True).status == OK
