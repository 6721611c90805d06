"""A device that is not there is refused in one line, before a library of the device meets it."""

from types import SimpleNamespace

import deepspeed.accelerator
import pytest

from taso_ds.distributed.accelerator import usable_accelerator
from taso_ds.errors import UserError


def pretend(monkeypatch: pytest.MonkeyPatch, *, devices: int) -> None:
    """Let DeepSpeed find this many GPUs."""
    found = SimpleNamespace(device_name=lambda: "cuda", is_available=lambda: devices > 0, device_count=lambda: devices)
    monkeypatch.setattr(deepspeed.accelerator, "get_accelerator", lambda: found)


def test_gpus_that_were_asked_for_and_are_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    pretend(monkeypatch, devices=0)
    with pytest.raises(UserError, match=r"DS_ACCELERATOR is 'cuda', and torch .* finds no such device here; unset it"):
        usable_accelerator(0)


def test_an_accelerator_that_deepspeed_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise ValueError("must be one of cuda, cpu")

    monkeypatch.setenv("DS_ACCELERATOR", "gpu")
    monkeypatch.setattr(deepspeed.accelerator, "get_accelerator", refuse)
    with pytest.raises(
        UserError, match=r"DS_ACCELERATOR is 'gpu', which DeepSpeed refuses \(must be one of .*unset it"
    ):
        usable_accelerator(0)


def test_more_processes_than_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, devices=2)
    assert usable_accelerator(1).device_count() == 2
    with pytest.raises(UserError, match="LOCAL_RANK is 2, and this process sees 2 devices; start one process per"):
        usable_accelerator(2)


def test_a_cpu_takes_any_number_of_processes() -> None:
    assert usable_accelerator(7).device_name() == "cpu"
