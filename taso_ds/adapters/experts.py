"""Mixture-of-experts weights: which ones a model has, the blocks they stand in, and a line on those not adapted.

Current transformers keep the experts of a block as fused parameters ``(num_experts, ·, ·)``. Models with code of their
own keep a list of modules called ``experts``. Which expert runs depends on a rank's tokens, so nothing that the ranks
do together may depend on it. Therefore ZeRO-3 gathers whole blocks, and scoring stays outside such lists. The experts
in fused parameters are left alone too, unless the user asks for them (see ``fused_experts``).
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from taso_ds.adapters.fused_experts import fused_parameters
from taso_ds.adapters.towers import inside, textless_parts

_LIST = "experts"


@dataclass(frozen=True)
class Experts:
    """Elements of every expert parameter by name, and the names of the modules that hold experts and router.

    Attributes:
        fused: those parameters whose slices can be adapted.
    """

    sizes: dict[str, int]
    fused: frozenset[str]
    blocks: list[str]
    total: int

    def left_in_words(self, targets: Iterable[str]) -> str | None:
        """Return one line on the parameters that hold no target, or None: their share of the model, and their names.

        Numbers in names are written as ``*``.
        """
        adapted = {name.rpartition(".")[0] for name in targets}
        left = {name: size for name, size in self.sizes.items() if name not in adapted}
        if not left:
            return None
        number = sum(left.values())
        names = sorted({re.sub(r"\.\d+(?=\.)", ".*", name) for name in left})
        remedy = "" if self.fused.isdisjoint(left) else " (--adapt_experts takes in those in fused parameters)"
        return (
            f"experts: {number:,} of {self.total:,} parameters ({number / self.total:.1%}) stay as they are, scored and"
            f" adapted are the other linears{remedy}: {', '.join(names)}"
        )


def in_expert_list(name: str) -> bool:
    """Say whether a module or parameter belongs to one expert of a list."""
    return re.search(rf"(^|\.){_LIST}\.\d+(\.|$)", name) is not None


def find_experts(
    model: nn.Module, *, shape_of: Callable[[nn.Parameter], torch.Size] = lambda parameter: parameter.shape
) -> Experts:
    """Find expert weights by structure: 3-D parameters of no convolution inside the block lists, and expert lists.

    Experts in a module that text never goes through (see ``towers``) do not count.

    Args:
        model: any model, on the meta device too.
        shape_of: the whole shape of a parameter that may be partitioned.
    """
    textless = textless_parts(model)
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    sizes = {
        name: shape_of(parameter).numel()
        for name, parameter in _own_parameters(model)
        if not inside(name, textless)
        and (in_expert_list(name) or (inside(name, lists) and _is_stack(shape_of(parameter))))
    }
    fused = (f"{name}.{inner}" for name, module in model.named_modules() for inner in fused_parameters(module))
    owners = {re.sub(rf"(^|\.){_LIST}\.\d+\..*", rf"\1{_LIST}.", name).rpartition(".")[0] for name in sizes}
    total = sum(shape_of(parameter).numel() for parameter in model.parameters())
    return Experts(sizes, frozenset(fused), sorted(_block_of(owner) for owner in owners), total)


def _own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for prefix, module in model.named_modules():
        if not isinstance(module, _ConvNd):
            yield from module.named_parameters(prefix, recurse=False)


def _is_stack(shape: torch.Size) -> bool:
    return len(shape) == 3 and shape[0] > 1


def _block_of(owner: str) -> str:
    """Return the module that holds the experts and their router: the parent, unless that is a whole layer."""
    parent = owner.rpartition(".")[0]
    return owner if not parent or parent.rpartition(".")[2].isdigit() else parent
