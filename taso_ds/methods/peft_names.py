"""What PEFT does to names where transformers has rearranged a type of model since its checkpoints were published.

PEFT takes every adapter of such a type for one of the older arrangement, whatever the model at hand holds. It renames
the targets and the tensors that it reads, so an export can end up on other matrices, or nowhere.

No architecture is listed here, so a new one needs no entry: transformers' rules tell which types were rearranged, and
PEFT itself is tried on the model without weights. What it does not read back is refused by name before a run starts.
"""

import copy
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from taso_ds.adapters.fused_experts import fused_sizes
from taso_ds.adapters.peft_format import peft_targets
from taso_ds.errors import UserError
from taso_ds.models.transformers_fixes import rearrangements, stacks_modules

if TYPE_CHECKING:  # what is asked here is of a model that transformers made
    from transformers import PreTrainedModel

_PREFIX = "base_model.model."


def fuses_experts(model: "PreTrainedModel") -> bool:
    """Say whether transformers puts the experts of this type of model into one parameter as it loads them."""
    return any(map(stacks_modules, rearrangements(model)))


def check_read_back(model: "PreTrainedModel", names: Sequence[str]) -> None:
    """Refuse targets in a model (without weights) whose export PEFT would not read."""
    lost = not_read_back(model, names)
    if lost:
        raise UserError(
            f"target_modules: of {type(model).__name__}, peft does not read back what it writes of {lost[0]}"
            f"{f' and {len(lost) - 1} more' if lost[1:] else ''}; name --target_modules without them, or pass"
            " --no_verify_export and merge the adapter (launch/export.py --merge)"
        )


def not_read_back(model: "PreTrainedModel", names: Sequence[str]) -> list[str]:
    """Return the modules that PEFT wraps for these targets and does not find again in the file that it writes.

    Args:
        model: on the meta device; not changed.
    """
    if not rearrangements(model):
        return []
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

    targets = peft_targets(
        names, _module_names(model), experts=list(fused_sizes(model, names)), fuses_experts=fuses_experts(model)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT would warn about a model that it is to train
        opened = PeftModel(copy.deepcopy(model), LoraConfig(r=1, **targets))
        written = get_peft_model_state_dict(opened, save_embedding_layers=False)
        read: Any = set_peft_model_state_dict(opened, written)
    lost = (name.partition(".lora_")[0] for name in read.missing_keys if ".lora_" in name)
    return sorted({name.removeprefix(_PREFIX) for name in lost})


def _module_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules()]
