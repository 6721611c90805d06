"""What DeepSpeed does that this package must correct: one list, for whoever raises its version.

Each function corrects one thing. Its docstring names the version in which that was seen last and where it is known
upstream; ``tests/distributed/test_deepspeed_fixes.py`` holds a test of each that fails once DeepSpeed no longer
needs it. Then both go.

``placement.resolve_offload`` corrects by refusing: with NVMe, DeepSpeed must not read ahead.

Other modules of this room only read what DeepSpeed keeps to itself. When a version moves it, their tests fail.
``deepspeed_types`` lists the attributes;
``sharded`` the layout of a partition that ``zero.Init`` makes, ``zero`` the attributes of a partitioned parameter,
``trained_state`` where the optimizer of each stage keeps masters and moments, ``accelerator`` the rules by which it
builds operators, ``launcher`` and ``hostfile`` those by which it starts ranks, ``ds_config_keys`` and
``ds_config_check`` what it accepts in its JSON.
"""

import functools
import inspect

import torch

from taso_ds.distributed import zero
from taso_ds.distributed.deepspeed_types import Engine, WholeOptimizer, Zero3Engine, ZeroInit


def forget_stale_releases() -> None:
    """Make ZeRO-3 work out anew what to release after each module when it records a new order of use.

    DeepSpeed memoizes that by module and position and keeps it for ever. Say a forward without backward precedes the
    first step (a probe, an evaluation). No weight is needed again after it, so every later step would release in
    forward what its backward must then gather once more.

    Seen in: DeepSpeed 0.19.8.
    Upstream: no issue known; ``PartitionedParameterCoordinator.__params_to_release`` has an unbounded ``lru_cache``.
    """
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    instrumented = Coordinator._PartitionedParameterCoordinator__params_to_release
    memo = inspect.getclosurevars(instrumented).nonlocals.get("func", instrumented)
    forget_order = Coordinator._clear_trace_structures
    if hasattr(forget_order, "__wrapped__") or not hasattr(memo, "cache_clear"):
        return  # done already, or of a DeepSpeed without such a memo

    @functools.wraps(forget_order)
    def forget_both(coordinator: object) -> None:
        forget_order(coordinator)
        memo.cache_clear()

    Coordinator._clear_trace_structures = forget_both


def detach_engine(engine: Zero3Engine) -> None:
    """Remove what a destroyed ZeRO-3 engine leaves on its model: hooks, backward functions, whole parameters.

    The backward functions would make the next engine's backward gather through this one's coordinator: unrecorded,
    hence never ahead of need. A parameter that was gathered for a module whose backward never ended, because the graph
    begins inside the module or behind it, would stay whole for ever.

    Seen in: DeepSpeed 0.19.8.
    Upstream: deepspeedai/DeepSpeed#7204, open.
    """
    for handle in (engine.module_forward_pre_hook, engine.module_forward_post_hook):
        handle.remove()  # they would keep the engine alive
    for module in engine.module.modules():
        for name in ("pre_bwd_fn", "post_bwd_fn"):
            module.__dict__.pop(name, None)
    for parameter in engine.module.parameters():
        assert zero.is_partitioned(parameter)
        parameter.ds_active_sub_modules.clear()
        if parameter.ds_status.name == "AVAILABLE":
            parameter.partition()


def undo_warm_up_step(wrapper: WholeOptimizer) -> None:
    """Put stage 0's bf16 optimizer back to its start.

    DeepSpeed steps it once with zero gradients to allocate its state, which decays the fp32 masters and leaves Adam's
    step counter at 1, so every later bias correction would be off.

    Seen in: DeepSpeed 0.19.8.
    Upstream: deepspeedai/DeepSpeed#5151; the pull request that removes the step, #5104, is open.
    """
    wrapper.optimizer.state.clear()
    with torch.no_grad():
        for masters, weights in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
            for master, weight in zip(masters, weights, strict=True):
                master.copy_(weight)


def missing_norm(engine: Engine) -> float | None:
    """Return the norm of the gradient where DeepSpeed keeps none, at stage 0 in fp32; None elsewhere.

    Call it before the step, which clips and clears the gradient.

    Seen in: DeepSpeed 0.19.8.
    Upstream: deepspeedai/DeepSpeed#7255, open.
    """
    optimizer = engine.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        return None
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    return float(torch.nn.utils.get_total_norm([value.grad for value in parameters if value.grad is not None]))


def let_linears_drop_weights(init: ZeroInit) -> None:
    """Let a linear drop its gathered weight between forward and backward, if the JSON does not forbid it.

    DeepSpeed does this on entering ``zero.Init``, and in ``deepspeed.initialize`` when that partitions a model. It does
    not when all parameters are partitions already. Then plain ``F.linear`` saves a view of each weight, and the whole
    model stays gathered.

    Args:
        init: a ``deepspeed.zero.Init`` that is not entered.

    Seen in: DeepSpeed 0.19.8.
    Upstream: deepspeedai/DeepSpeed#8189 did it for whole models, in 0.19.4; no issue known for partitioned ones.
    """
    if init.mem_efficient_linear:
        init._enable_mem_efficient_linear()
