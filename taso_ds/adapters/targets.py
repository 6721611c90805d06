"""Which matrices of a model are adapted, and their shape as ``(out_features, in_features)``.

By default every linear of the transformer blocks: ``nn.Linear`` and its subclasses (quantized ones too) and GPT-2's
``Conv1D``, whose weight is stored transposed. Embeddings, the output head, norms and biases are left alone, and so are
experts (see ``experts``).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from taso_ds.adapters.experts import in_expert_list
from taso_ds.errors import UserError, nearest


@dataclass(frozen=True)
class MatrixShape:
    """Shape of a target matrix; ``transposed`` when its weight is stored as ``(in_features, out_features)``."""

    out_features: int
    in_features: int
    transposed: bool = False

    @property
    def numel(self) -> int:
        return self.out_features * self.in_features


def matrix_shape(module: Any) -> MatrixShape | None:
    """Return the shape of a linear map, or None for any other module. Reads no weight, which may be partitioned."""
    if isinstance(module, nn.Linear):
        return MatrixShape(module.out_features, module.in_features)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx"):
        return MatrixShape(int(module.nf), int(module.nx), transposed=True)
    return None


def find_targets(model: nn.Module, target_modules: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """Return the matrices to adapt by module name, in model order.

    Args:
        model: any model whose blocks stand in an ``nn.ModuleList``.
        target_modules: None for every linear inside the blocks; otherwise names matched against the end of the module
            path (``q_proj``, ``mlp.down_proj``), or a regular expression for the whole path.

    Raises:
        UserError: when a name matches no linear, with the nearest one that exists.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if matrix_shape(module) is not None and not in_expert_list(name)
    }
    if not target_modules:
        blocks = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        found = {
            name: module for name, module in linears.items() if any(name.startswith(f"{block}.") for block in blocks)
        }
        if not found:
            raise UserError(f"{type(model).__name__} has no linear inside a block list: name --target_modules")
        return found
    matches = {pattern: [name for name in linears if _matches(pattern, name)] for pattern in target_modules}
    for pattern, names in matches.items():
        if not names:
            suffixes = sorted({name.rsplit(".", 1)[-1] for name in linears})
            raise UserError(
                f"target_modules: {pattern!r} matches no linear of {type(model).__name__}"
                f"{nearest(pattern, suffixes)}; there are {', '.join(suffixes)}"
            )
    chosen = {name for names in matches.values() for name in names}
    return {name: module for name, module in linears.items() if name in chosen}


def _matches(pattern: str, name: str) -> bool:
    if re.search(r"[\\^$*+?\[\](){}|]", pattern):
        try:
            return re.fullmatch(pattern, name) is not None
        except re.error as error:
            raise UserError(f"target_modules: {pattern!r} is not a regular expression: {error}") from error
    return name == pattern or name.endswith(f".{pattern}")
