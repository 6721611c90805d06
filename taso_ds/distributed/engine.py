"""DeepSpeed engines: one without an optimizer to score the base, one with to train."""

import functools
import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from taso_ds.distributed import comm
from taso_ds.distributed.zero_config import ZeroConfig


def quiet_deepspeed() -> None:
    """Keep DeepSpeed's own log to warnings, of rank 0; ours says what a user needs."""
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING if comm.is_main() else logging.ERROR)


def zero_stage_of(engine: Any) -> int:
    return int(engine.zero_optimization_stage())


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """Return the optimizer that DeepSpeed's own, if there is one, wraps."""
    optimizer = engine.optimizer
    inner: torch.optim.Optimizer = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer
    return inner


@contextmanager
def zero3_loading(zero: ZeroConfig) -> Iterator[None]:
    """Make ``from_pretrained`` partition parameters as it creates them, at stage 3; nothing below.

    transformers keeps only a weak reference to this object: it must live while models are built, and must be
    gone afterwards, or helper models would be partitioned too.
    """
    if zero.stage != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    alive = HfDeepSpeedConfig(zero.raw)
    try:
        yield
    finally:
        del alive


@contextmanager
def scoring_engine(model: nn.Module, zero: ZeroConfig) -> Iterator[nn.Module]:
    """Yield a module that runs forward and backward on the frozen base, at stage 3 with ZeRO's gathering hooks.

    Direct ``loss.backward()`` is allowed on it. The hooks are removed on exit: left behind, a second engine would
    gather every layer twice.
    """
    if zero.stage != 3:
        yield model.to(comm.device())
        return
    import deepspeed

    _keep_no_memo_of_another_order()
    engine, *_ = deepspeed.initialize(model=model, config=zero.raw)
    try:
        yield engine.module
    finally:
        engine.destroy()
        for handle in (engine.module_forward_pre_hook, engine.module_forward_post_hook):
            handle.remove()  # they would keep the engine alive
        for module in engine.module.modules():
            # Kept on the module, they would make the next engine's backward gather through this one's coordinator:
            # unrecorded, hence never ahead of need.
            for name in ("pre_bwd_fn", "post_bwd_fn"):
                module.__dict__.pop(name, None)
        for parameter in engine.module.parameters():
            # Gathered for a module whose backward never ended, for the graph begins inside it or behind it: the next
            # engine would keep it whole for ever.
            parameter.ds_active_sub_modules.clear()
            if parameter.ds_status.name == "AVAILABLE":
                parameter.partition()


def _keep_no_memo_of_another_order() -> None:
    """Make ZeRO-3 work out anew what to release after each module when it records a new order of use.

    DeepSpeed 0.19 memoizes that by module and position and keeps it for ever. So a forward without backward before the
    first step (a probe, an evaluation), after which no weight is needed again, would make every step release in forward
    what its backward gathers once more.
    """
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    instrumented = Coordinator._PartitionedParameterCoordinator__params_to_release
    memo = inspect.getclosurevars(instrumented).nonlocals.get("func", instrumented)
    forget_order = Coordinator._clear_trace_structures
    if hasattr(forget_order, "__wrapped__") or not hasattr(memo, "cache_clear"):
        return  # done already, or of a DeepSpeed without such a memo

    @functools.wraps(forget_order)
    def forget_both(coordinator: Any) -> None:
        forget_order(coordinator)
        memo.cache_clear()

    Coordinator._clear_trace_structures = forget_both


def set_leaf_modules(model: nn.Module, names: Sequence[str]) -> None:
    """Make ZeRO-3 gather each named module as a whole, with everything inside it.

    Ranks whose tokens take different ways through such a module would otherwise wait for one another's gathers.
    """
    from deepspeed.utils import set_z3_leaf_module

    for name in names:
        set_z3_leaf_module(model.get_submodule(name), True)


def training_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, zero: ZeroConfig
) -> Any:  # deepspeed.DeepSpeedEngine
    """Return the DeepSpeed engine of ``model``; ZeRO partitions what ``optimizer`` trains."""
    import deepspeed

    _keep_no_memo_of_another_order()
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=zero.raw)
    if zero.stage == 0 and zero.bf16:
        _undo_warm_up_step(engine.optimizer)
    return engine


def _undo_warm_up_step(wrapper: Any) -> None:
    """Put stage 0's bf16 optimizer back to its start.

    DeepSpeed steps it once with zero gradients to allocate its state, which decays the fp32 masters and leaves Adam's
    step counter at 1, so every later bias correction would be off.
    """
    wrapper.optimizer.state.clear()
    with torch.no_grad():
        for masters, weights in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
            for master, weight in zip(masters, weights, strict=True):
                master.copy_(weight)


def optimizer_groups(engine: Any) -> Sequence[dict[str, Any]]:
    """Return the live parameter groups: setting ``lr`` in them sets the rate of the next step."""
    groups: Sequence[dict[str, Any]] = engine.optimizer.param_groups
    return groups


def step(engine: Any) -> float:
    """Take the optimizer's step and return the norm of its gradient before clipping, over all ranks."""
    optimizer, norm = engine.optimizer, None
    if isinstance(optimizer, torch.optim.Optimizer):  # stage 0 in fp32, of which DeepSpeed keeps no norm
        parameters = [value for group in optimizer.param_groups for value in group["params"]]
        norm = torch.nn.utils.get_total_norm([value.grad for value in parameters if value.grad is not None])
    engine.step()
    return float(engine.get_global_grad_norm() if norm is None else norm)
