"""DeepSpeed engines: one without an optimizer, to score the base, and one that trains."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from taso_ds.distributed import comm, deepspeed_fixes
from taso_ds.distributed.deepspeed_types import Engine, ParameterGroup
from taso_ds.distributed.zero_config import ZeroConfig


def quiet_deepspeed() -> None:
    """Keep DeepSpeed's own log to warnings, of rank 0; ours says what a user needs."""
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING if comm.is_main() else logging.ERROR)


def base_optimizer(engine: Engine) -> torch.optim.Optimizer:
    """Return the optimizer that DeepSpeed's own, if there is one, wraps."""
    optimizer = engine.optimizer
    inner: torch.optim.Optimizer = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer
    return inner


@contextmanager
def zero3_loading(zero: ZeroConfig) -> Iterator[None]:
    """Make ``from_pretrained`` partition parameters as it creates them, at stage 3; nothing below.

    transformers keeps only a weak reference to what says so. It must live while models are built. Afterwards it must
    be gone, or helper models would be partitioned too.
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

    ``loss.backward()`` may be called directly. The hooks are removed on exit: if they stayed, a second engine would
    gather every layer twice.
    """
    if zero.stage != 3:
        yield model.to(comm.device())
        return
    import deepspeed

    deepspeed_fixes.forget_stale_releases()
    engine, *_ = deepspeed.initialize(model=model, config=zero.raw)
    try:
        yield engine.module
    finally:
        engine.destroy()
        deepspeed_fixes.detach_engine(engine)


def set_leaf_modules(model: nn.Module, names: Sequence[str]) -> None:
    """Make ZeRO-3 gather each named module as a whole, with everything inside it.

    Ranks whose tokens take different ways through such a module would otherwise wait for one another's gathers.
    """
    from deepspeed.utils import set_z3_leaf_module

    for name in names:
        set_z3_leaf_module(model.get_submodule(name), True)


def training_engine(model: nn.Module, optimizer: torch.optim.Optimizer, zero: ZeroConfig) -> Engine:
    """Return the DeepSpeed engine of ``model``; ZeRO partitions what ``optimizer`` trains."""
    import deepspeed

    deepspeed_fixes.forget_stale_releases()
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=zero.raw)
    if zero.stage == 0 and zero.bf16:
        deepspeed_fixes.undo_warm_up_step(engine.optimizer)
    made: Engine = engine
    return made


def optimizer_groups(engine: Engine) -> Sequence[ParameterGroup]:
    """Return the live parameter groups: setting ``lr`` in them sets the rate of the next step."""
    groups: Sequence[ParameterGroup] = engine.optimizer.param_groups
    return groups


def step(engine: Engine) -> float:
    """Take the optimizer's step and return the norm of its gradient before clipping, over all ranks."""
    norm: float | torch.Tensor | None = deepspeed_fixes.missing_norm(engine)
    engine.step()
    norm = engine.get_global_grad_norm() if norm is None else norm
    assert norm is not None
    return float(norm)
