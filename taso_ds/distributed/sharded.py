"""ZeRO-3 partitions filled directly: every rank allocates and reads its own part of every parameter, and no more.

``deepspeed.zero.Init`` partitions a parameter that exists: rank 0 holds it whole and broadcasts it. Here the whole
parameter never exists. Its data is one element expanded to the full shape while DeepSpeed does its bookkeeping; then
the caller fills the partition.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from taso_ds.distributed import comm
from taso_ds.distributed.deepspeed_fixes import let_linears_drop_weights
from taso_ds.distributed.deepspeed_types import PartitionedParameter, Shard, Status, Swapper, ZeroInit
from taso_ds.distributed.zero import is_partitioned
from taso_ds.distributed.zero_config import ZeroConfig
from taso_ds.errors import UserError

# Fills a flat tensor with a parameter's elements from the given one on.
Fill = Callable[[Tensor, int], None]


@contextmanager
def parameters_without_memory() -> Iterator[None]:
    """Put the parameters of modules that are built inside on the meta device; their buffers become real."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class Partitioner:
    """Turns meta parameters into ZeRO-3 partitions, as the DeepSpeed config places them (device, CPU, NVMe, hpZ)."""

    def __init__(self, zero: ZeroConfig) -> None:
        import deepspeed

        self._init: ZeroInit = deepspeed.zero.Init(config_dict_or_path=zero.raw)
        let_linears_drop_weights(self._init)

    def partition(self, parameter: nn.Parameter, fill: Fill) -> nn.Parameter:
        """Return a partitioned parameter with the shape and dtype of ``parameter``, which is on the meta device.

        Args:
            fill: gives the partition its values.

        Raises:
            UserError: the JSON's NVMe buffers are too small for the partition.
        """
        from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, free_param

        init = self._init
        data = torch.empty((), dtype=parameter.dtype, device=comm.device()).expand(parameter.shape)
        partitioned = _converted(nn.Parameter(data, requires_grad=False), init)
        partitioned.ds_numel_aligned = init._aligned_size(partitioned)
        size = partitioned.ds_numel_aligned // init.num_partitions
        swapper = init.param_swapper
        if swapper is not None and not swapper.swappable_tensor(numel=size):
            swapper = None
        shard = self._allocate(parameter.dtype, size) if swapper is None else _swap_buffer(partitioned, size, swapper)
        _fill_range(shard, init.get_partition_rank() * size, parameter.numel(), fill)
        partitioned.ds_tensor = _described(shard, PartitionedParamStatus.AVAILABLE)
        if init.zero_param_process_group is not None:
            size = partitioned.ds_numel_aligned // init.num_ranks_in_param_group
            second = self._allocate(parameter.dtype, size)
            _fill_range(second, init.rank_in_group * size, parameter.numel(), fill)
            partitioned.ds_secondary_tensor = _described(second, PartitionedParamStatus.AVAILABLE)
        free_param(partitioned)
        if swapper is not None:
            partitioned.ds_tensor.final_location = "nvme"
            swapper.swap_out_and_release([partitioned])
        return partitioned

    def _allocate(self, dtype: torch.dtype, size: int) -> Tensor:
        init = self._init
        device = init.local_device if init.remote_device == init.local_device else "cpu"
        shard = torch.empty(size, dtype=dtype, device=device)
        if init.pin_memory and device == "cpu":
            from deepspeed.accelerator import get_accelerator

            shard = get_accelerator().pin_memory(shard)
        return shard


def _converted(parameter: nn.Parameter, init: ZeroInit) -> PartitionedParameter:
    init._convert_to_deepspeed_param(parameter)
    assert is_partitioned(parameter)
    return parameter


def _swap_buffer(parameter: PartitionedParameter, size: int, swapper: Swapper) -> Tensor:
    """Return the part of the swapper's pinned memory that is written to disk as this parameter's partition."""
    if size > swapper.elements_per_buffer:
        raise UserError(
            f"ds_config: zero_optimization.offload_param.buffer_size is {swapper.elements_per_buffer:.0f}, but a"
            f" rank's share of the {tuple(parameter.ds_shape)} parameter has {size} numbers: write at least that"
        )
    shard = torch.empty(0, dtype=parameter.dtype)
    shard.data = swapper.get_buffer(parameter, size)
    return shard


def _fill_range(shard: Tensor, first: int, numel: int, fill: Fill) -> None:
    """Fill the part of ``shard`` that lies inside the parameter, and zero the padding behind its end."""
    count = max(0, min(shard.numel(), numel - first))
    if count:
        fill(shard[:count], first)
    shard[count:].zero_()


def _described(tensor: Tensor, status: Status) -> Shard:
    """Give a tensor the attributes that make it a shard to DeepSpeed."""
    shard = cast(Shard, tensor)
    shard.requires_grad = False
    shard.ds_numel = shard.numel()
    shard.status = status
    shard.final_location = None
    return shard


def replace_parameters(model: nn.Module, replacements: dict[nn.Parameter, nn.Parameter]) -> None:
    """Put each replacement wherever its original is registered, in tied modules too."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter in replacements:
                module._parameters[name] = replacements[parameter]
