"""What DeepSpeed finds on this machine: the accelerator, its communication backend, what it could build."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from taso_ds.errors import UserError


@dataclass(frozen=True)
class Accelerator:
    """This machine's devices as DeepSpeed sees them.

    Attributes:
        name: DeepSpeed's name of the kind of device.
        backend: its communication library.
        devices: how many of them this process sees.
        bf16: whether they compute in bfloat16.
        cuda: the CUDA version torch was built for; None for other builds.
    """

    name: str
    backend: str
    devices: int
    bf16: bool
    cuda: str | None

    @property
    def is_host(self) -> bool:
        return self.name == "cpu"


class DeepSpeedAccelerator(Protocol):
    """What this package asks DeepSpeed's own object for the devices that this process sees."""

    def device_name(self, device_index: int | None = None) -> str: ...
    def communication_backend_name(self) -> str: ...
    def is_available(self) -> bool: ...
    def device_count(self) -> int: ...
    def set_device(self, device_index: int) -> object: ...


@dataclass(frozen=True)
class Toolkit:
    """The CUDA toolkit, and why DeepSpeed would not compile with it."""

    version: str | None
    problem: str | None = None


def find_accelerator() -> Accelerator:
    """Return the accelerator that DeepSpeed would use.

    Raises:
        Exception: whatever a broken installation raises.
    """
    import torch
    from deepspeed.accelerator import get_accelerator

    found = get_accelerator()
    backend, bf16 = found.communication_backend_name(), bool(found.is_bf16_supported())
    return Accelerator(found.device_name(), backend, found.device_count(), bf16, torch.version.cuda)


def usable_accelerator(local_rank: int) -> DeepSpeedAccelerator:
    """Return DeepSpeed's own accelerator, on which this process has a device.

    Raises:
        UserError: ``DS_ACCELERATOR`` names what is not here, or a node has fewer devices than processes.
    """
    named = f"environment: DS_ACCELERATOR is {os.environ.get('DS_ACCELERATOR')!r}"
    remedy = "unset it, and DeepSpeed takes what there is"
    try:
        from deepspeed.accelerator import get_accelerator

        found: DeepSpeedAccelerator = get_accelerator()
    except ValueError as error:
        raise UserError(f"{named}, which DeepSpeed refuses ({error}); {remedy}") from error
    if found.device_name() == "cpu":
        return found
    if not found.is_available():
        raise UserError(f"{named}, and torch {_torch_version()} finds no such device here; {remedy}")
    if local_rank >= found.device_count():
        raise UserError(
            f"environment: LOCAL_RANK is {local_rank}, and this process sees {found.device_count()} devices; start one"
            " process per device"
        )
    return found


def _torch_version() -> str:
    import torch

    return str(torch.__version__)


def cuda_toolkit() -> Toolkit:
    """Return the toolkit that would compile operators, by DeepSpeed's own rule."""
    from deepspeed.ops.op_builder import builder

    try:
        version = ".".join(map(str, builder.installed_cuda_version()))
    except builder.MissingCUDAException as error:
        return Toolkit(None, str(error))
    try:
        builder.assert_no_cuda_mismatch()
    except builder.CUDAMismatchException as error:
        return Toolkit(version, str(error))
    return Toolkit(version)


def build_folder() -> Path:
    """Return where operators are compiled at first use."""
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def can_build_async_io() -> bool:
    """Say whether DeepSpeed's asynchronous disk access can be built here."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible(verbose=False))
