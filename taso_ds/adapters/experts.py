"""Mixture-of-experts weights: which a model has, and the blocks they stand in. They are left alone, and named.

Current transformers keep the experts of a block as fused parameters ``(num_experts, ·, ·)``; models with code of their
own keep a list of modules called ``experts``. Which expert of such a list runs depends on a rank's tokens, so whatever
the ranks do together must not hang on it: ZeRO-3 gathers whole blocks, and scoring stays outside the list.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

_LIST = "experts"


@dataclass(frozen=True)
class Experts:
    """Elements of every expert parameter by name, and the names of the modules that hold experts and router."""

    sizes: dict[str, int]
    blocks: list[str]
    total: int

    def in_words(self) -> str:
        """Return one line: share of the model, and names with ``*`` for the numbers in them."""
        number = sum(self.sizes.values())
        names = sorted({re.sub(r"\.\d+(?=\.)", ".*", name) for name in self.sizes})
        return (
            f"experts: {number:,} of {self.total:,} parameters ({number / self.total:.1%}) stay as they are, scored and"
            f" adapted are the other linears: {', '.join(names)}"
        )


def in_expert_list(name: str) -> bool:
    """Say whether a module or parameter belongs to one expert of a list."""
    return re.search(rf"(^|\.){_LIST}\.\d+(\.|$)", name) is not None


def find_experts(
    model: nn.Module, *, shape_of: Callable[[nn.Parameter], torch.Size] = lambda parameter: parameter.shape
) -> Experts:
    """Find expert weights by structure: 3-D parameters of no convolution inside the block lists, and expert lists.

    Args:
        model: any model, on the meta device too.
        shape_of: the whole shape of a parameter that may be partitioned.
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    sizes = {
        name: shape_of(parameter).numel()
        for name, parameter in _own_parameters(model)
        if in_expert_list(name)
        or (any(name.startswith(f"{block}.") for block in lists) and _is_stack(shape_of(parameter)))
    }
    owners = {re.sub(rf"(^|\.){_LIST}\.\d+\..*", rf"\1{_LIST}.", name).rpartition(".")[0] for name in sizes}
    total = sum(shape_of(parameter).numel() for parameter in model.parameters())
    return Experts(sizes, sorted(_block_of(owner) for owner in owners), total)


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
