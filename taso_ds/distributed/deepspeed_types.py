"""What this package uses of DeepSpeed's classes, which have no types: engines, optimizers, partitioned parameters.

A version of DeepSpeed that lacks one of these names breaks what reads it.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

ParameterGroup: TypeAlias = dict[str, Any]  # as torch's own optimizers have it


class Engine(Protocol):
    """A DeepSpeed engine, as the loop and its checkpoints see it."""

    module: nn.Module

    @property
    def optimizer(self) -> Any:
        """torch's own optimizer at stage 0 in fp32, else a wrapper around it: another class at each stage."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
    def train(self) -> object: ...
    def backward(self, loss: Tensor, *, scale_wrt_gas: bool) -> object: ...
    def step(self) -> object: ...
    def zero_optimization_stage(self) -> int: ...
    def get_global_grad_norm(self) -> Tensor | float | None: ...


class ForwardHook(Protocol):
    """The handle of a hook that an engine has put on its module."""

    def remove(self) -> None: ...


class Zero3Engine(Protocol):
    """An engine of stage 3 with the hooks that gather parameters for each module."""

    module: nn.Module
    module_forward_pre_hook: ForwardHook
    module_forward_post_hook: ForwardHook


class WholeOptimizer(Protocol):
    """Stage 0 in bf16: each rank holds fp32 masters of everything."""

    optimizer: torch.optim.Optimizer
    fp16_groups: Sequence[Sequence[Tensor]]
    fp32_groups: Sequence[Sequence[Tensor]]


class Bf16Optimizer(Protocol):
    """Stage 1 in bf16: this rank's range of each flattened group."""

    fp32_groups_flat_partition: Sequence[Tensor]
    bf16_groups: Sequence[Sequence[Tensor]]


class CutOptimizer(Protocol):
    """Stages 1 and 2: this rank's range of each flattened group, whose parameters lie at ``offsets``."""

    single_partition_of_fp32_groups: Sequence[Tensor]
    round_robin_bit16_groups: Sequence[Sequence[Tensor]]
    round_robin_bit16_offsets: Sequence[Iterable[int]]


class ShardedOptimizer(Protocol):
    """Stage 3: this rank's shards of a group's parameters, one after the other."""

    fp16_groups: Sequence[Sequence["PartitionedParameter"]]
    fp32_partitioned_groups_flat: Sequence[Tensor]


class Status(Protocol):
    """Where a partition, or the whole parameter, is at the moment: ``AVAILABLE``, ``NOT_AVAILABLE`` or ``INFLIGHT``."""

    @property
    def name(self) -> str: ...


class Shard(Tensor):
    """One rank's padded part of a flattened parameter."""

    ds_numel: int
    status: Status
    final_location: str | None


class Swapper(Protocol):
    """Moves the shards of parameters between NVMe and the host, through pinned buffers."""

    elements_per_buffer: float

    def swappable_tensor(self, *, numel: int) -> bool: ...
    def get_buffer(self, param: nn.Parameter, numel: int) -> Tensor: ...
    def swap_out_and_release(self, params: Sequence[nn.Parameter]) -> object: ...
    def swap_in(self, params: Sequence[nn.Parameter], async_op: bool) -> object: ...
    def remove_partition_and_release_buffers(self, params: Sequence[nn.Parameter]) -> object: ...


class PartitionedParameter(nn.Parameter):
    """A parameter that ZeRO-3 holds as one shard per rank; itself it has no element, unless it is gathered."""

    ds_id: int
    ds_shape: torch.Size
    ds_numel: int
    ds_numel_aligned: int
    ds_status: Status
    ds_tensor: Shard
    ds_secondary_tensor: Shard
    ds_active_sub_modules: set[int]
    nvme_swapper: Swapper

    def partition(self) -> object: ...


class ZeroInit(Protocol):
    """``deepspeed.zero.Init``: how stage 3 partitions parameters, and where it puts the shards."""

    mem_efficient_linear: bool
    param_swapper: Swapper | None
    num_partitions: int
    zero_param_process_group: object | None
    num_ranks_in_param_group: int
    rank_in_group: int
    local_device: torch.device
    remote_device: torch.device | str
    pin_memory: bool

    def get_partition_rank(self) -> int: ...
    def _convert_to_deepspeed_param(self, param: nn.Parameter) -> object: ...
    def _aligned_size(self, param: nn.Parameter) -> int: ...
    def _enable_mem_efficient_linear(self) -> object: ...
