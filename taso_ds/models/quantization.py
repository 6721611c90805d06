"""Which linears of a base are quantized and how: ``--load_in_4bit``, ``--load_in_8bit``, or as a checkpoint has them.

A run quantizes the linears inside the blocks. Embeddings, output head and whatever else stands outside the blocks stay
as they are. A checkpoint that bitsandbytes has quantized names what is quantized in it.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from taso_ds.adapters.targets import find_targets, matrix_shape
from taso_ds.distributed import comm, zero
from taso_ds.errors import UserError
from taso_ds.models.arguments import ModelArguments
from taso_ds.models.quantized_linear import NF4, Format, Int8, QuantizedLinear
from taso_ds.models.transformers_fixes import converted_names

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_THRESHOLD = 6.0  # bitsandbytes' own: from which size on an input is an outlier to LLM.int8()


@dataclass(frozen=True)
class Stored:
    """What the ``quantization_config`` of a checkpoint that is quantized already says beyond the number of bits.

    Attributes:
        threshold: from which size on an input is an outlier to LLM.int8().
        skipped: modules that are not quantized; None leaves the choice to transformers.
        double_quantized: whether the maxima of NF4 are quantized too.
    """

    threshold: float
    skipped: list[str] | None
    double_quantized: bool


@dataclass(frozen=True)
class Quantization:
    """How a base is quantized.

    Attributes:
        bits: 4 or 8.
        dtype: the engine's; weights are rounded to it first, and their bytes are stored in it.
        stored: None unless the checkpoint is quantized already.
    """

    bits: int
    dtype: torch.dtype
    stored: Stored | None = None

    @property
    def flag(self) -> str:
        return f"load_in_{self.bits}bit"

    @property
    def format(self) -> Format:
        if self.bits == 4:
            return NF4()
        return Int8(_THRESHOLD if self.stored is None else self.stored.threshold)

    def names(self, model: "PreTrainedModel") -> list[str]:
        """Return the linears of a model without weights that are quantized.

        Raises:
            UserError: there are none, or the bytes of one are not whole elements of the engine's dtype.
        """
        plain = [name for name in _linears(model) if _is_plain(model.get_submodule(name))]
        if self.stored is None:
            inside = find_targets(model)
            found = [name for name in plain if name in inside]
            if not found:
                raise UserError(
                    f"{self.flag}: bitsandbytes quantizes no linear of {type(model).__name__}, which has classes of its"
                    " own for them; drop the flag"
                )
        else:
            found = converted_names(model, plain, self.stored.skipped)
        for name in found:
            shape = matrix_shape(model.get_submodule(name))
            assert shape is not None
            if shape.numel % (self.dtype.itemsize * self.format.weights_per_byte):
                raise UserError(
                    f"{self.flag}: {name} has {shape.numel} weights, not a multiple of"
                    f" {self.dtype.itemsize * self.format.weights_per_byte}"
                )
        return found

    def settings(self, model: nn.Module) -> dict[str, object] | None:
        """Return the ``BitsAndBytesConfig`` that transformers needs to quantize alike; None when the checkpoint has it.

        Args:
            model: not quantized yet, or quantized by this.
        """
        if self.stored is not None:
            return None
        inside = find_targets(model)
        found: dict[str, object] = {
            self.flag: True,
            "llm_int8_skip_modules": [name for name in _linears(model) if name not in inside],
        }
        if self.bits == 4:
            dtype = str(self.dtype).removeprefix("torch.")
            found |= {
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
                "bnb_4bit_compute_dtype": dtype,
                "bnb_4bit_quant_storage": dtype,
            }
        return found

    def options(self, model: "PreTrainedModel") -> dict[str, object]:
        """Return what ``from_pretrained`` needs to quantize as it loads, onto this rank's device."""
        from transformers import BitsAndBytesConfig

        settings = self.settings(model)
        found: dict[str, object] = {"device_map": {"": str(comm.device())}}
        return found if settings is None else found | {"quantization_config": BitsAndBytesConfig(**settings)}


def quantization_of(arguments: ModelArguments, config: "PretrainedConfig") -> Quantization | None:
    """Return how the base of this configuration will be quantized; None when it will not.

    Raises:
        UserError: a flag for a checkpoint that is quantized already, or one that is quantized by other means.
    """
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    stored = getattr(config, "quantization_config", None)
    asked = 4 if arguments.load_in_4bit else 8 if arguments.load_in_8bit else None
    if stored is None:
        return None if asked is None else Quantization(asked, dtype)
    if not isinstance(stored, dict):
        stored = stored.to_dict()
    method = stored.get("quant_method", "unknown")
    method = getattr(method, "value", method)
    if asked is not None:
        raise UserError(f"load_in_{asked}bit: {arguments.model_name_or_path} is quantized already; drop the flag")
    if method != "bitsandbytes":
        raise UserError(
            f"model_name_or_path: {arguments.model_name_or_path} is quantized by {method}, which is not supported;"
            " bitsandbytes is, and so is the checkpoint it was made from"
        )
    threshold = stored.get("llm_int8_threshold")
    said = Stored(
        threshold=_THRESHOLD if threshold is None else float(threshold),
        skipped=stored.get("llm_int8_skip_modules"),
        double_quantized=bool(stored.get("bnb_4bit_use_double_quant")),
    )
    return Quantization(4 if stored.get("load_in_4bit") else 8, dtype, said)


@dataclass(frozen=True, eq=False)
class Replaced:
    """A linear whose weight is still to come; ``transposed`` when checkpoints store it ``(in, out)``."""

    module: QuantizedLinear
    transposed: bool


def replace_linears(model: "PreTrainedModel", quantization: Quantization) -> dict[nn.Parameter, Replaced]:
    """Replace the linears to be quantized by quantized ones without weights. Return these, each by its weight."""
    found: dict[nn.Parameter, Replaced] = {}
    for name in quantization.names(model):
        module = model.get_submodule(name)
        shape = matrix_shape(module)
        assert shape is not None
        replacement = QuantizedLinear(
            shape.in_features,
            shape.out_features,
            bias=dict(module.named_parameters()).get("bias"),
            format=quantization.format,
            storage=quantization.dtype,
        )
        replacement.train(module.training)
        model.set_submodule(name, replacement)
        found[replacement.get_parameter("weight")] = Replaced(replacement, shape.transposed)
    return found


def adopt_linears(model: nn.Module, quantization: Quantization) -> None:
    """Replace the linears of bitsandbytes by ours, which take over the weights."""
    for name, module in list(model.named_modules()):
        kind = type(module).__name__
        if kind not in ("Linear4bit", "Linear8bitLt"):
            continue
        theirs: Any = module  # bitsandbytes' types do not name what it puts on its weights
        replacement = QuantizedLinear(
            theirs.in_features,
            theirs.out_features,
            bias=theirs.bias,
            format=quantization.format,
            storage=quantization.dtype,
        )
        packed = theirs.weight.data.contiguous().view(-1).view(torch.uint8)
        assert packed.numel() == replacement.num_bytes, name
        replacement.weight = nn.Parameter(packed.view(quantization.dtype)[:, None], requires_grad=False)
        replacement.train(theirs.training)
        replacement.statistics = theirs.weight.quant_state if kind == "Linear4bit" else theirs.weight.SCB
        model.set_submodule(name, replacement)


def num_parameters(model: nn.Module) -> int:
    """Return the number of weights; a quantized matrix counts as what it stands for."""
    packed = {id(module.weight): module.matrix for module in model.modules() if isinstance(module, QuantizedLinear)}
    return sum(math.prod(packed.get(id(value), zero.full_shape(value))) for value in model.parameters())


def _is_plain(module: nn.Module) -> bool:
    """Say whether transformers would quantize this linear; it leaves classes of a model's own alone."""
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def _linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if matrix_shape(module) is not None]
