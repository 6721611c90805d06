"""Which matrices of a model are adapted, and their shape as ``(out_features, in_features)``.

By default these are all linears of the transformer blocks: ``nn.Linear``, its subclasses (quantized ones too) and
GPT-2's ``Conv1D``, whose weight is stored transposed. Embeddings, the output head, norms and biases are left alone.
Experts are left alone too (see ``experts``), unless the user asks for those in fused parameters: each of their slices
is a target then. There is no target

- in a module that text never goes through (see ``towers``);
- in a subclass that does not compute ``x Wᵀ + b``, such as a router that returns the experts it chose;
- in a linear whose weight the model uses without calling the module, as the kernels of Mamba's blocks do: an adapter
  would have no effect;
- in what chooses tokens for sparse attention: no gradient reaches it.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from taso_ds.adapters.experts import in_expert_list
from taso_ds.adapters.fused_experts import ExpertMatrix, expert_matrices, get_expert_matrix
from taso_ds.adapters.structure import count_dense, count_parameters
from taso_ds.adapters.towers import inside, textless_parts
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


# A linear, or what stands for one.
Matrix = nn.Module | ExpertMatrix
# The whole shape of a parameter that may be partitioned.
ShapeOf = Callable[[nn.Parameter], torch.Size]


def _own_shape(parameter: nn.Parameter) -> torch.Size:
    return parameter.shape


@dataclass(frozen=True, eq=False)
class Target:
    """One matrix to adapt, and its shape."""

    matrix: Matrix
    shape: MatrixShape

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter it lies in: its own, or one that it shares with other experts."""
        return self.matrix.parameter if isinstance(self.matrix, ExpertMatrix) else self.matrix.get_parameter("weight")


class Targets(Mapping[str, Target]):
    """The matrices of one model to adapt, by module name and in model order."""

    def __init__(self, found: Mapping[str, Target]) -> None:
        self._found = dict(found)

    def __getitem__(self, name: str) -> Target:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    @property
    def shapes(self) -> dict[str, MatrixShape]:
        return {name: target.shape for name, target in self.items()}

    @property
    def linears(self) -> dict[str, nn.Module]:
        """Those that are modules."""
        return {name: one.matrix for name, one in self.items() if not isinstance(one.matrix, ExpertMatrix)}

    @property
    def experts(self) -> dict[str, ExpertMatrix]:
        """Those that are slices of a fused parameter."""
        return {name: one.matrix for name, one in self.items() if isinstance(one.matrix, ExpertMatrix)}

    @property
    def numel(self) -> int:
        return sum(target.shape.numel for target in self.values())

    @property
    def edges(self) -> int:
        """Rows and columns of all matrices: the entries of a low-rank pair of rank 1."""
        return sum(target.shape.out_features + target.shape.in_features for target in self.values())

    @property
    def any_transposed(self) -> bool:
        return any(target.shape.transposed for target in self.values())

    def count(self, structure: str, *, rank: int, core_fraction: float) -> int:
        """Return the trainable parameters of an adapter on all matrices.

        Args:
            rank: of each branch.
            core_fraction: ``p``, the share of rows and of columns in the core region.
        """
        return sum(
            count_parameters(
                structure,
                out_features=target.shape.out_features,
                in_features=target.shape.in_features,
                rank=rank,
                core_fraction=core_fraction,
            )
            for target in self.values()
        )

    def count_dense(self, structure: str, *, rank: int) -> int:
        """Return the entries of that adapter's dense pairs, pruned ones included."""
        return sum(
            count_dense(
                structure, out_features=target.shape.out_features, in_features=target.shape.in_features, rank=rank
            )
            for target in self.values()
        )

    def some(self, names: Sequence[str]) -> "Targets":
        """Return the targets of these names only."""
        return Targets({name: self[name] for name in names})

    def within(self, model: nn.Module, *, shape_of: ShapeOf = _own_shape) -> "Targets":
        """Return the same matrices of another copy of the model, such as one with weights.

        Args:
            model: the copy. Quantization may have replaced its linears, and their weights lie otherwise then.
            shape_of: the whole shape of a parameter that may be partitioned.
        """
        return Targets({name: _target(get_target(model, name), shape_of) for name in self})


def _target(matrix: Matrix, shape_of: ShapeOf) -> Target:
    shape = matrix_shape(matrix, shape_of=shape_of)
    assert shape is not None
    return Target(matrix, shape)


# What chooses the tokens that sparse attention looks at: a choice passes no gradient.
_CHOOSER = ".indexer."
# By model type, the linears whose weights the model uses without calling the module: on some devices, with some
# kernels, or always.
_TAKEN_PAST: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("mamba", "falcon_mamba"), (".x_proj", ".dt_proj", ".out_proj")),
    **dict.fromkeys(("mamba2", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba2"), (".out_proj",)),
    "jamba": (".dt_proj",),
    "gemma3n_text": (".correction_coefs",),
    "longcat_flash": (".router.classifier",),
}


def matrix_shape(module: Matrix, *, shape_of: ShapeOf = _own_shape) -> MatrixShape | None:
    """Return the shape of a linear map, or None for any other module. Reads no weight, which may be partitioned.

    Args:
        shape_of: the whole shape of a parameter that may be partitioned; experts do not say it otherwise.
    """
    if isinstance(module, ExpertMatrix):
        _, first, second = shape_of(module.parameter)
        return MatrixShape(second, first, transposed=True) if module.transposed else MatrixShape(first, second)
    if isinstance(module, nn.Linear):
        return MatrixShape(module.out_features, module.in_features)
    rows, cols = getattr(module, "nf", None), getattr(module, "nx", None)
    if type(module).__name__ == "Conv1D" and isinstance(rows, int) and isinstance(cols, int):
        return MatrixShape(rows, cols, transposed=True)
    return None


def is_linear_map(module: nn.Module) -> bool:
    """Say whether a linear computes ``x Wᵀ + b``, which adapters and scoring rely on.

    A class with a ``forward`` of its own may say so (``is_linear_map``), and bitsandbytes' are known to. Otherwise a
    copy of the module with a tiny weight is tried, because its own weight may be partitioned or not there yet.
    """
    kind = type(module)
    if not isinstance(module, nn.Linear) or kind.forward is nn.Linear.forward:
        return True
    is_known = getattr(kind, "is_linear_map", False) or kind.__module__.startswith("bitsandbytes.")
    return bool(is_known) or _computes_linear(module)


def _computes_linear(module: nn.Linear) -> bool:
    generator = torch.Generator().manual_seed(0)
    inputs, weight, bias = (torch.rand(shape, generator=generator) for shape in ((2, 4, 3), (5, 3), (5,)))
    tiny = copy.copy(module)
    parameters = {"weight": nn.Parameter(weight), "bias": None if module.bias is None else nn.Parameter(bias)}
    vars(tiny).update(_parameters=parameters, in_features=3, out_features=5, training=False)
    wanted = nn.functional.linear(inputs, weight, None if module.bias is None else bias)
    try:
        with torch.no_grad():
            found: object = type(module).forward(tiny, inputs)
    except Exception:  # whatever the forward needs that a linear does not
        return False
    return isinstance(found, torch.Tensor) and found.shape == wanted.shape and torch.allclose(found, wanted)


def get_target(model: nn.Module, name: str) -> Matrix:
    """Return the matrix of this name."""
    return get_expert_matrix(model, name) or model.get_submodule(name)


def find_targets(model: nn.Module, target_modules: Sequence[str] | None = None, *, experts: bool = False) -> Targets:
    """Return the matrices to adapt by module name, in model order.

    Args:
        model: any model whose blocks stand in an ``nn.ModuleList``, with whole parameters or without weights.
        target_modules: None for every linear inside the blocks; otherwise names matched against the end of the module
            path (``q_proj``, ``mlp.down_proj``), or a regular expression for the whole path. The matrices of a fused
            parameter answer to the parameter's name too.
        experts: take in the experts of fused parameters, as ``<module>.<parameter>.<expert>``.

    Raises:
        UserError: when a name matches no linear, with the nearest one that exists; when there are no such experts.
    """
    linears = _linears(model, experts=experts)
    if not target_modules:
        blocks = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        inner = [name for name in linears if any(name.startswith(f"{block}.") for block in blocks)]
        if not inner:
            raise UserError(f"{type(model).__name__} has no linear inside a block list: name --target_modules")
        return linears.some(inner)
    called = {
        name: (name, name.rpartition(".")[0]) if isinstance(target.matrix, ExpertMatrix) else (name,)
        for name, target in linears.items()
    }
    matches = {
        pattern: [name for name, names in called.items() if any(_matches(pattern, one) for one in names)]
        for pattern in target_modules
    }
    for pattern, names in matches.items():
        if not names:
            suffixes = sorted({names[-1].rsplit(".", 1)[-1] for names in called.values()})
            raise UserError(
                f"target_modules: {pattern!r} matches no linear of {type(model).__name__}"
                f"{nearest(pattern, suffixes)}; there are {', '.join(suffixes)}"
            )
    chosen = {name for names in matches.values() for name in names}
    found = linears.some([name for name in linears if name in chosen])
    if experts and not found.experts:
        raise UserError("adapt_experts: target_modules names no experts; name theirs too, or drop the flag")
    return found


def _linears(model: nn.Module, *, experts: bool) -> Targets:
    linears: dict[str, Target] = {}
    taken_past, textless = _taken_past(model), textless_parts(model)
    for name, module in model.named_modules():
        if inside(name, textless) or _CHOOSER in name:
            continue
        shape = matrix_shape(module)
        if shape is not None and is_linear_map(module) and not in_expert_list(name) and not name.endswith(taken_past):
            linears[name] = Target(module, shape)
        if experts:
            matrices = expert_matrices(module)
            linears |= {f"{name}.{inner}": _target(matrix, _own_shape) for inner, matrix in matrices.items()}
    found = Targets(linears)
    if experts and not found.experts:
        raise UserError(f"adapt_experts: {type(model).__name__} has no experts in fused parameters; drop the flag")
    return found


def _taken_past(model: nn.Module) -> tuple[str, ...]:
    config: object = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return _TAKEN_PAST.get(getattr(text, "model_type", ""), ())


def _matches(pattern: str, name: str) -> bool:
    if re.search(r"[\\^$*+?\[\](){}|]", pattern):
        try:
            return re.fullmatch(pattern, name) is not None
        except re.error as error:
            raise UserError(f"target_modules: {pattern!r} is not a regular expression: {error}") from error
    return name == pattern or name.endswith(f".{pattern}")
