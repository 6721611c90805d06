"""Matrices that one forward uses several times (ALBERT has one block for all its layers, Zamba a shared one).

The gradient of such a matrix is the sum over its uses, and only of that sum may an absolute value or a selection be
taken. So what backward brings from one use waits for the others: inputs and output gradients of all of them, one
after the other, give the whole gradient at once.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from taso_ds.adapters.fused_experts import ExpertMatrix
from taso_ds.adapters.targets import Target

# What backward brings: module name, inputs (tokens, in), output gradient (tokens, out).
Deliver = Callable[[str, Tensor, Tensor], None]


class JoinedCalls:
    """Delivers every matrix once per backward, however often the forward called it."""

    def __init__(self, targets: Mapping[str, Target], deliver: Deliver) -> None:
        self._modules: dict[str, Any] = {
            name: target.experts if isinstance(target, ExpertMatrix) else target for name, target in targets.items()
        }
        self._deliver = deliver
        self._calls: Counter[Any] = Counter()
        self._waiting: dict[str, list[tuple[Tensor, Tensor]]] = {}

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the calls of one forward, not those of its recomputation in backward."""

        def count(module: Any, _args: Any) -> None:
            if torch.is_grad_enabled():
                self._calls[module] += 1

        self._calls.clear()
        handles = [module.register_forward_pre_hook(count) for module in set(self._modules.values())]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add(self, name: str, inputs: Tensor, grad_output: Tensor) -> None:
        """Take what backward brings from one call; the last one delivers."""
        waiting = self._waiting.setdefault(name, [])
        waiting.append((inputs, grad_output))
        if len(waiting) == self._calls[self._modules[name]]:
            self._deliver_joined(name)

    def finish(self) -> None:
        """Deliver what still waits for a call that the loss does not depend on; after every backward."""
        for name in list(self._waiting):
            self._deliver_joined(name)

    def _deliver_joined(self, name: str) -> None:
        calls = self._waiting.pop(name)
        if len(calls) == 1:
            self._deliver(name, *calls[0])
        else:
            self._deliver(name, *(torch.cat(parts) for parts in zip(*calls, strict=True)))
