"""Linears whose weight bitsandbytes quantized, whole or as a ZeRO-3 partition, and their quantization range by range.

bitsandbytes' own modules stand in the way of partitions: ``Linear8bitLt`` keeps a second reference to its weight, the
product of ``Linear4bit`` keeps the gathered weight alive until backward, and on processors with AVX512-BF16 its first
forward in eval mode repacks the weight in place, after which no gradient passes and gathered bytes mean something else.
``QuantizedLinear`` computes with bitsandbytes' kernels and has none of this; it serves every ZeRO stage.

The weight is one tensor of bytes in the engine's dtype, so that ZeRO gathers it together with all others. Beside it
stand the statistics, whole on every rank: about 1/64 byte per weight in 4 bits, 4 bytes per row in 8.
"""

import functools
import logging
from abc import ABC, abstractmethod
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taso_ds.distributed import comm
from taso_ds.distributed.sharded import Fill

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

# What a format needs to read a whole matrix of bytes: NF4 a ``QuantState``, 8 bits one maximum per row.
Statistics: TypeAlias = "QuantState | Tensor"

# Weights quantized at once; bitsandbytes needs up to 20 bytes for each of them meanwhile.
QUANTIZING_CHUNK = 1 << 22


def quiet_bitsandbytes() -> None:
    """Silence its warnings: one comes with every int8 product of bf16 inputs, one with every import on some CPUs."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@functools.cache
def _bitsandbytes() -> ModuleType:
    quiet_bitsandbytes()
    import bitsandbytes

    return bitsandbytes


class Format(ABC):
    """How a matrix is quantized: in units of consecutive weights that do not depend on one another."""

    weights_per_byte: int

    @abstractmethod
    def unit(self, in_features: int) -> int:
        """Return the number of weights that share one statistic."""

    @abstractmethod
    def quantize(self, weights: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
        """Return the bytes of the flat ``weights``, which begin with a unit, and one fp32 statistic per unit."""

    @abstractmethod
    def statistics(self, units: Tensor, shape: torch.Size, dtype: torch.dtype) -> Statistics:
        """Return what ``dequantize`` needs.

        Args:
            units: the fp32 statistic of every unit of the matrix, ``(units,)``.
            shape: of the matrix, ``(out_features, in_features)``.
            dtype: what ``dequantize`` returns.
        """

    @abstractmethod
    def dequantize(self, packed: Tensor, module: "QuantizedLinear") -> Tensor:
        """Return the weight ``(out_features, in_features)``."""

    @abstractmethod
    def product(self, inputs: Tensor, packed: Tensor, module: "QuantizedLinear") -> Tensor:
        """Return the module's output, ``(..., out_features)``; nothing is recorded for backward."""


class NF4(Format):
    """4 bits a weight, one maximum per 64 weights, and those maxima quantized once more, to 8 bits."""

    weights_per_byte = 2
    block = 64

    def unit(self, in_features: int) -> int:
        return self.block

    def quantize(self, weights: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
        # bitsandbytes launches this on a GPU's default stream, so nothing loads on another one
        packed, state = _bitsandbytes().functional.quantize_4bit(weights, blocksize=self.block, quant_type="nf4")
        return packed.flatten(), state.absmax

    def statistics(self, units: Tensor, shape: torch.Size, dtype: torch.dtype) -> Any:
        functional = _bitsandbytes().functional
        offset = units.mean()
        absmax, state2 = functional.quantize_blockwise(units - offset, blocksize=256)
        return functional.QuantState(
            absmax=absmax,
            shape=shape,
            code=functional.get_4bit_type("nf4", device=units.device),
            blocksize=self.block,
            quant_type="nf4",
            dtype=dtype,
            offset=offset,
            state2=state2,
        )

    def dequantize(self, packed: Tensor, module: "QuantizedLinear") -> Tensor:
        weight: Tensor = _bitsandbytes().functional.dequantize_4bit(packed, module.statistics)
        return weight

    def product(self, inputs: Tensor, packed: Tensor, module: "QuantizedLinear") -> Tensor:
        bias = None if module.bias is None else module.bias.to(inputs.dtype)
        out: Tensor = _bitsandbytes().matmul_4bit(inputs, packed, quant_state=module.statistics, bias=bias)
        return out


class Int8(Format):
    """LLM.int8(): 8 bits a weight, one maximum per row; inputs with outliers are multiplied in 16 bits.

    In training the weight is dequantized and multiplied on every device, as bitsandbytes does on a CPU. On a GPU it
    would take the inputs to float16, quantize them and wait for each product's outliers. Scoring and evaluations use
    LLM.int8() itself, as whoever opens the export does.

    Args:
        threshold: from which size on an input is an outlier.
    """

    weights_per_byte = 1

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def unit(self, in_features: int) -> int:
        return in_features

    def quantize(self, weights: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
        rows = weights.view(-1, in_features).to(torch.float16)
        packed, maxima, _ = _bitsandbytes().functional.int8_vectorwise_quant(rows)
        return packed.flatten().view(torch.uint8), maxima

    def statistics(self, units: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return units

    def dequantize(self, packed: Tensor, module: "QuantizedLinear") -> Tensor:
        # As bitsandbytes does in its backward: rounded once, to the dtype it computes in.
        return self._rows(packed, module).to(module.compute_dtype).mul_(self._maxima(module)[:, None] * (1.0 / 127.0))

    def product(self, inputs: Tensor, packed: Tensor, module: "QuantizedLinear") -> Tensor:
        if module.training:
            return F.linear(inputs, self.dequantize(packed, module), module.bias)
        state = _bitsandbytes().MatmulLtState()
        state.CB, state.SCB = self._rows(packed, module), self._maxima(module)
        state.threshold, state.has_fp16_weights, state.is_training = self.threshold, False, False
        out: Tensor = _bitsandbytes().matmul(inputs, state.CB, bias=module.bias, state=state)
        return out

    @staticmethod
    def _rows(packed: Tensor, module: "QuantizedLinear") -> Tensor:
        return packed.view(torch.int8).view(module.out_features, module.in_features)

    @staticmethod
    def _maxima(module: "QuantizedLinear") -> Tensor:
        assert isinstance(module.statistics, Tensor)
        return module.statistics  # (out_features,)


class _Product(torch.autograd.Function):
    """A linear map whose backward dequantizes the weight again.

    Only the parameter is kept for backward, not the gathered data it has in forward: ZeRO frees and gathers in between.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, module: "QuantizedLinear") -> Tensor:
        ctx.save_for_backward(weight)
        ctx.module = module
        return module.format.product(inputs, _aligned(weight), module)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (packed,) = ctx.saved_tensors
        weight = ctx.module.format.dequantize(_aligned(packed), ctx.module)
        return grad_output @ weight.to(grad_output.dtype), None, None


def _aligned(packed: Tensor) -> Tensor:
    """Return the bytes at an address that kernels accept: a gathered weight begins anywhere in ZeRO's buffer."""
    data = packed.detach()
    return data.clone() if data.data_ptr() % 16 else data


class QuantizedLinear(nn.Linear):
    """A frozen linear with a quantized weight.

    Args:
        in_features: of the matrix that the bytes stand for.
        out_features: of the same.
        bias: kept as it is.
        format: how the weight is quantized.
        storage: the dtype its bytes are kept in, the engine's.

    Attributes:
        weight: the bytes, ``(bytes / itemsize, 1)``.
        statistics: what the format needs to read them; None until the weight is there.
        is_linear_map: read by ``adapters.targets``.
    """

    is_linear_map = True

    def __init__(
        self, in_features: int, out_features: int, *, bias: nn.Parameter | None, format: Format, storage: torch.dtype
    ) -> None:
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.register_parameter("bias", bias)
        self.format = format
        self.compute_dtype = storage
        assert self.num_bytes % storage.itemsize == 0
        packed = torch.empty(self.num_bytes // storage.itemsize, 1, dtype=storage, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.statistics: Statistics | None = None

    @property
    def matrix(self) -> torch.Size:
        """Shape of the weight itself."""
        return torch.Size((self.out_features, self.in_features))

    @property
    def num_bytes(self) -> int:
        return -(-self.matrix.numel() // self.format.weights_per_byte)

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = _Product.apply(input.to(self.compute_dtype), self.weight, self)
        return out.to(input.dtype)


def weight_of(module: object, gathered: Tensor) -> Tensor:
    """Return the weight of one linear from its gathered data, dequantized if the linear is quantized."""
    return module.format.dequantize(_aligned(gathered), module) if isinstance(module, QuantizedLinear) else gathered


def quantize_range(
    out: Tensor, first: int, *, module: QuantizedLinear, dtype: torch.dtype, read: Fill
) -> tuple[int, Tensor]:
    """Fill ``out`` with the bytes of the quantized matrix from byte ``first`` on, as if it had been quantized whole.

    Args:
        out: flat ``uint8``, on this rank's device.
        first: where ``out`` begins among the bytes of the matrix.
        module: whose weight is filled.
        dtype: what the weights are rounded to first.
        read: fills a flat tensor with weights. It is asked for whole units, a few at a time.

    Returns:
        The first unit that ``out`` touches, and the statistics of all it touches.
    """
    total, per_byte = module.matrix.numel(), module.format.weights_per_byte
    unit = module.format.unit(module.in_features)
    first_unit = first * per_byte // unit
    end_unit = -(-min((first + out.numel()) * per_byte, total) // unit)
    statistics = torch.empty(end_unit - first_unit, device=comm.device())
    step = max(1, QUANTIZING_CHUNK // unit)
    for start in range(first_unit, end_unit, step):
        stop = min(start + step, end_unit)
        weights = torch.empty(min(stop * unit, total) - start * unit, dtype=dtype, device=comm.device())
        read(weights, start * unit)
        packed, found = module.format.quantize(weights, module.in_features)
        statistics[start - first_unit : stop - first_unit] = found
        begin = start * unit // per_byte
        low, high = max(begin, first), min(begin + len(packed), first + out.numel())
        out[low - first : high - first] = packed[low - begin : high - begin]
    return first_unit, statistics


def share_statistics(module: QuantizedLinear, parts: list[tuple[int, Tensor]], dtype: torch.dtype) -> None:
    """Complete the statistics of one matrix from what the ranks found on their ranges. A collective.

    Ranks that share a unit found the same statistic for it. None is negative, so the largest of all ranks is the one.

    Args:
        module: its ``statistics`` are set.
        parts: of this rank, as ``quantize_range`` returned them.
        dtype: what the weights were rounded to.
    """
    unit = module.format.unit(module.in_features)
    units = torch.zeros(-(-module.matrix.numel() // unit), device=comm.device())
    for first, found in parts:
        units[first : first + len(found)] = found
    comm.largest_everywhere(units)
    module.statistics = module.format.statistics(units, module.matrix, dtype)
