"""Fill quantized linears from a checkpoint, each rank its own range of bytes.

What is stored in 16 bits is quantized on the way; what is quantized already is copied.

A range of bytes stands for whole units of weights (64 consecutive ones in 4 bits, rows in 8), which are quantized
without regard to their neighbours. So each rank reads the units that its range touches, and the bytes of all ranks
together equal those of the matrix quantized whole. Once all ranks have loaded, they exchange the units' statistics.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from taso_ds.distributed import comm
from taso_ds.distributed.sharded import Fill
from taso_ds.files.safetensors_ranges import SafetensorsCheckpoint
from taso_ds.models.quantization import Quantization, replace_linears
from taso_ds.models.quantized_linear import Statistics, quantize_range, share_statistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class QuantizedLoad:
    """How ``load_sharded`` fills the parameters of one model, the quantized ones in their own way.

    Args:
        quantization: None when nothing is quantized.
        model: without weights; its linears are replaced.
    """

    def __init__(self, quantization: Quantization | None, model: "PreTrainedModel") -> None:
        self._replaced = {} if quantization is None else replace_linears(model, quantization)
        self._bits = 0 if quantization is None else quantization.bits
        self._stored = quantization is not None and quantization.stored is not None
        self._parts: dict[nn.Parameter, list[tuple[int, Tensor]]] = {weight: [] for weight in self._replaced}

    def __contains__(self, parameter: nn.Parameter) -> bool:
        return parameter in self._replaced

    def shape(self, parameter: nn.Parameter, checkpoint: SafetensorsCheckpoint, key: str) -> torch.Size:
        """Return the shape in which the checkpoint should hold this parameter."""
        if parameter not in self._replaced:
            return parameter.shape
        replaced = self._replaced[parameter]
        if self._stored:
            matrix, bytes_each = replaced.module.matrix, checkpoint.tensors[key].dtype.itemsize
            return matrix if self._bits == 8 else torch.Size((replaced.module.num_bytes // bytes_each, 1))
        return replaced.module.matrix[::-1] if replaced.transposed else replaced.module.matrix

    def fill(self, parameter: nn.Parameter, checkpoint: SafetensorsCheckpoint, key: str) -> Fill:
        """Return what fills a range of the parameter."""
        if parameter not in self._replaced:
            return lambda out, first: checkpoint.read_into(out, key, first=first)
        if not self._stored:
            return self._quantizing(parameter, checkpoint, key)
        module, size = self._replaced[parameter].module, parameter.dtype.itemsize
        module.statistics = _stored_statistics(checkpoint, key, bits=self._bits)

        def fill(out: Tensor, first: int) -> None:
            checkpoint.read_into(out.view(torch.uint8), key, first=first * size, as_bytes=True)

        return fill

    def _quantizing(self, parameter: nn.Parameter, checkpoint: SafetensorsCheckpoint, key: str) -> Fill:
        replaced, dtype = self._replaced[parameter], parameter.dtype

        def fill(out: Tensor, first: int) -> None:
            if replaced.transposed:
                whole = checkpoint.read(key).t().flatten()

                def read(weights: Tensor, start: int) -> None:
                    weights.copy_(whole[start : start + weights.numel()])
            else:

                def read(weights: Tensor, start: int) -> None:
                    checkpoint.read_into(weights, key, first=start)

            part = quantize_range(
                out.view(torch.uint8), first * dtype.itemsize, module=replaced.module, dtype=dtype, read=read
            )
            self._parts[parameter].append(part)

        return fill

    def without_statistics(self, keys: Iterable[str]) -> set[str]:
        """Return the checkpoint keys that are not statistics of a quantized weight."""
        if not self._stored:
            return set(keys)
        return {key for key in keys if ".weight." not in key and not key.endswith((".SCB", ".weight_format"))}

    def finish(self) -> None:
        """Give every weight that was quantized here its statistics. A collective."""
        if self._stored:
            return
        for parameter, replaced in self._replaced.items():
            share_statistics(replaced.module, self._parts.pop(parameter), parameter.dtype)


def _stored_statistics(checkpoint: SafetensorsCheckpoint, key: str, *, bits: int) -> Statistics:
    if bits == 8:
        return checkpoint.read(key.removesuffix("weight") + "SCB").to(comm.device())
    from bitsandbytes.functional import QuantState

    prefix = f"{key}."
    found = {name.removeprefix(prefix): checkpoint.read(name) for name in checkpoint.tensors if name.startswith(prefix)}
    return QuantState.from_dict(found, device=comm.device())
