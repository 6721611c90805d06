"""Gradients of matrices, each summed on the rank that owns the matrix."""

from collections.abc import Mapping

import torch
from torch import Tensor

from taso_ds.adapters.importance import weight_gradient
from taso_ds.adapters.targets import MatrixShape
from taso_ds.distributed import comm


class GradientSum:
    """Sums each matrix's gradient on its owner, in fp32, as backward delivers it.

    ``signed_mean`` sums the signed gradients of a loss that is summed over tokens. ``per_batch_abs`` sums over
    micro-batches the absolute gradient of that micro-batch's mean loss.

    Args:
        shapes: of the matrices, by name.
        owners: the rank that sums each of them.
        absolute: ``per_batch_abs``.
        offload: keep the sums in host memory.
    """

    def __init__(
        self, shapes: Mapping[str, MatrixShape], owners: Mapping[str, int], *, absolute: bool, offload: bool = False
    ) -> None:
        self._shapes = shapes
        self._owners = owners
        self._absolute = absolute
        self._device = torch.device("cpu") if offload else comm.device()
        self._largest = max(shape.numel for shape in shapes.values())
        # Two matrices beside the sums, reused for every gradient: thousands of new ones would fragment memory. There
        # are two for each dtype, because a router may compute in fp32 within a model in bf16.
        self._buffers: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, inputs: Tensor, grad_output: Tensor) -> None:
        """Add one micro-batch's gradient of one matrix. A collective.

        Args:
            inputs: ``(tokens, in_features)``.
            grad_output: ``(tokens, out_features)``.
        """
        shape = self._shapes[name]
        if grad_output.dtype not in self._buffers:
            made = torch.empty(self._largest, dtype=grad_output.dtype, device=grad_output.device)
            self._buffers[grad_output.dtype] = made, comm.reduction_buffer(made)
        product, travelling = self._buffers[grad_output.dtype]
        gradient = product[: shape.numel].view(shape.out_features, shape.in_features)
        weight_gradient(inputs, grad_output, out=gradient)
        if self._absolute:
            gradient.abs_()
        if self._owners[name] == comm.rank() and name not in self._sums:
            self._sums[name] = torch.zeros(shape.out_features, shape.in_features, device=self._device)
        comm.add_on_owner(self._sums.get(name), gradient, self._owners[name], buffer=travelling)

    def take(self, name: str) -> Tensor | None:
        """Return a matrix's sum and forget it; None where this rank is not its owner, or nothing was delivered."""
        total = self._sums.pop(name, None)
        return None if total is None else total.to(comm.device())

    def free_buffers(self) -> None:
        """Free the memory that only ``add`` needs; a later ``add`` allocates it again."""
        self._buffers.clear()
