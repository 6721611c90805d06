"""Matrices that one forward uses several times (ALBERT has one block for all its layers, Zamba a shared one).

The gradient of such a matrix is the sum over its uses. An absolute value or a selection may be taken of that sum only.
So what backward brings from one use waits for the other uses. Put end to end, the inputs and the output gradients of
all uses give the whole gradient in one product.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from taso_ds.adapters.targets import Targets

# Takes what backward brings: module name, inputs (tokens, in), output gradient (tokens, out).
DeliverNamed = Callable[[str, Tensor, Tensor], None]


class JoinedCalls:
    """Delivers every matrix once per backward, however often the forward called it."""

    def __init__(self, targets: Targets, deliver: DeliverNamed) -> None:
        self._modules = targets.linears | {name: matrix.experts for name, matrix in targets.experts.items()}
        self._deliver = deliver
        self._calls: Counter[nn.Module] = Counter()
        self._waiting: dict[str, list[tuple[Tensor, Tensor]]] = {}

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the calls of one forward, not those of its recomputation in backward."""

        def count(module: nn.Module, _inputs: object) -> None:
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
        """Take what backward brings from one call of a matrix; its last call delivers.

        Args:
            inputs: ``(tokens, in_features)``.
            grad_output: ``(tokens, out_features)``.
        """
        waiting = self._waiting.setdefault(name, [])
        waiting.append((inputs, grad_output))
        if len(waiting) == self._calls[self._modules[name]]:
            self._deliver_joined(name)

    def finish(self) -> None:
        """Deliver what still waits for a call that the loss does not depend on. Called after every backward."""
        for name in list(self._waiting):
            self._deliver_joined(name)

    def _deliver_joined(self, name: str) -> None:
        calls = self._waiting.pop(name)
        if len(calls) == 1:
            self._deliver(name, *calls[0])
        else:
            self._deliver(name, *(torch.cat(parts) for parts in zip(*calls, strict=True)))
