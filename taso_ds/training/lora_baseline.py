"""The baseline ``--method lora``: the peft library's own layers, in the same loop."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from taso_ds.distributed import zero

_ADAPTER = "default"


def attach_lora(model: nn.Module, targets: Sequence[str], *, rank: int, scaling: float, transposed: bool) -> Any:
    """Put PEFT's LoRA on the targets, in place, in the model's dtype; returns PEFT's configuration."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=rank,
        lora_alpha=rank * scaling,  # type: ignore[arg-type]
        target_modules=list(targets),
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=transposed,
    )
    inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    for parameter in lora_parameters(model).values():
        parameter.data = parameter.data.to(model.dtype)  # type: ignore[arg-type]
    return config


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return PEFT's trainable tensors by parameter name."""
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}


def lora_tensors(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the gathered tensors under the names of PEFT's file. A collective."""
    return {
        f"base_model.model.{name.replace(f'.{_ADAPTER}.', '.')}": zero.full_copy(parameter)
        for name, parameter in parameters.items()
    }
