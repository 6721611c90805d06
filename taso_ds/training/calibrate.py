"""Importance scoring of the frozen base over all ranks (method sections 1 and 2).

Each target matrix has one owner rank. Every micro-batch's gradient of a matrix is summed to its owner the moment
backward produces it, so besides the owners' fp32 accumulators (parameters / ranks) one gradient is alive at a time.
After the last micro-batch each weight is gathered once, its owner turns accumulator into importance, and all owners
select in parallel; then the row and column scores, a few numbers per row, are broadcast.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from taso_ds.adapters.importance import needs_gradient, score_matrix, tap_gradient, weight_gradient
from taso_ds.adapters.selection import RegionScores, score_rows_and_cols
from taso_ds.adapters.targets import MatrixShape
from taso_ds.distributed import comm, zero
from taso_ds.distributed.quantized import weight_of
from taso_ds.errors import UserError

log = logging.getLogger(__name__)

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class ScoringSettings:
    """How importance is computed and reduced.

    Attributes:
        original_weight: returns the weight of a target before it was quantized; None to score with the model's own.
    """

    score: str
    reduction: str
    ladder: tuple[float, ...]
    seed: int
    original_weight: Callable[[str], Tensor] | None = None


def assign_owners(shapes: Mapping[str, MatrixShape], world_size: int) -> dict[str, int]:
    """Give each matrix an owner rank, balanced by size: largest first, to the rank that owns least."""
    owned = [0] * world_size
    owners = {}
    for name, shape in sorted(shapes.items(), key=lambda item: -item[1].numel):
        owners[name] = min(range(world_size), key=owned.__getitem__)
        owned[owners[name]] += shape.numel
    return {name: owners[name] for name in shapes}


class GradientSum:
    """Sums each matrix's gradient on its owner, in fp32, as backward delivers it.

    ``signed_mean``: the token-weighted sum of signed gradients (loss summed over tokens). ``per_batch_abs``: the sum
    over micro-batches of the absolute gradient of that micro-batch's mean loss.
    """

    def __init__(self, shapes: Mapping[str, MatrixShape], owners: Mapping[str, int], *, absolute: bool) -> None:
        self._shapes = shapes
        self._owners = owners
        self._absolute = absolute
        # The two matrices beside the sums, reused for every gradient: thousands of new ones would fragment memory.
        self._largest = max(shape.numel for shape in shapes.values())
        self._product: Tensor | None = None
        self._travelling = torch.empty(0)
        self.sums = {
            name: torch.zeros(shape.out_features, shape.in_features, device=comm.device())
            for name, shape in shapes.items()
            if owners[name] == comm.rank()
        }

    def deliver_to(self, name: str) -> Callable[[Tensor, Tensor], None]:
        """Return the callback of one matrix for ``tap_gradient``."""

        def deliver(inputs: Tensor, grad_output: Tensor) -> None:
            shape = self._shapes[name]
            if self._product is None:
                self._product = torch.empty(self._largest, dtype=grad_output.dtype, device=grad_output.device)
                self._travelling = comm.reduction_buffer(self._product)
            gradient = self._product[: shape.numel].view(shape.out_features, shape.in_features)
            weight_gradient(inputs, grad_output, out=gradient)
            if self._absolute:
                gradient.abs_()
            comm.add_on_owner(self.sums.get(name), gradient, self._owners[name], buffer=self._travelling)

        return deliver


@contextmanager
def scoring_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off, gradients flowing although no weight wants one, checkpointed blocks still checkpointed."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    rates: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) is True:
            # A block checkpoints only in training mode; then the dropouts it applies itself must be silenced too.
            module.training = True
            for attribute, value in list(vars(module).items()):
                if "dropout" in attribute and isinstance(value, float):
                    rates.append((module, attribute, value))
                    setattr(module, attribute, 0.0)
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    handle = embedding.register_forward_hook(lambda _module, _args, output: output.requires_grad_(True))
    try:
        yield
    finally:
        handle.remove()
        for module, attribute, value in rates:
            setattr(module, attribute, value)
        for module, training in was_training.items():
            module.training = training


def score_regions(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    shapes: Mapping[str, MatrixShape],
    batches: Sequence[Batch],
    *,
    loss_sum: Callable[[nn.Module, Batch], tuple[Tensor, int]],
    settings: ScoringSettings,
) -> dict[str, RegionScores]:
    """Return row and column scores of every target, the same on every rank.

    Args:
        model: the frozen base, able to run backward (a ``scoring_engine``).
        batches: this rank's micro-batches, on this rank's device; every rank has the same number of them, some perhaps
            fully masked.
        loss_sum: the loss summed over supervised units, and their number.

    Raises:
        UserError: when the ranks disagree on the result, or a score is not finite; names the matrix.
    """
    owners = assign_owners(shapes, comm.world_size())
    sums: dict[str, Tensor] = {}
    if needs_gradient(settings.score):
        sums = _sum_gradients(model, targets, shapes, owners, batches, loss_sum=loss_sum, settings=settings)
    scores = _score_owned(targets, shapes, owners, sums, settings)
    shared = _share(scores, shapes, owners, settings.ladder)
    _assert_agreement(shared)
    return shared


def _sum_gradients(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    shapes: Mapping[str, MatrixShape],
    owners: Mapping[str, int],
    batches: Sequence[Batch],
    *,
    loss_sum: Callable[[nn.Module, Batch], tuple[Tensor, int]],
    settings: ScoringSettings,
) -> dict[str, Tensor]:
    per_batch = settings.reduction == "per_batch_abs"
    accumulator = GradientSum(shapes, owners, absolute=per_batch)
    handles = [tap_gradient(module, accumulator.deliver_to(name)) for name, module in targets.items()]
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in frozen:  # a task head: its gradients are not asked for here
        parameter.requires_grad_(False)
    units = 0.0
    try:
        with scoring_mode(model):
            for batch in tqdm(batches, desc="scoring", unit="batch", disable=not comm.is_main()):
                loss, number = loss_sum(model, batch)
                (loss / max(1, number) if per_batch else loss).backward()
                units += float(number > 0) if per_batch else number
    finally:
        for handle in handles:
            handle.remove()
        for parameter in frozen:
            parameter.requires_grad_(True)
    total = torch.tensor([units], dtype=torch.float64, device=comm.device())
    comm.sum_everywhere(total)
    for value in accumulator.sums.values():
        value.div_(float(total))
    return accumulator.sums


def _score_owned(
    targets: Mapping[str, nn.Module],
    shapes: Mapping[str, MatrixShape],
    owners: Mapping[str, int],
    sums: dict[str, Tensor],
    settings: ScoringSettings,
) -> dict[str, RegionScores]:
    """Gather every weight once, then select on the owners in parallel."""
    importances: dict[str, Tensor] = {}
    modules: dict[str, Any] = dict(targets)
    for number, (name, module) in enumerate(modules.items()):
        shape = shapes[name]
        needs_weight = settings.score in ("importance", "magnitude")
        original = settings.original_weight
        with zero.gathered([module.weight] if needs_weight and original is None else []):
            if owners[name] == comm.rank():
                weight = None
                if needs_weight:
                    weight = weight_of(module) if original is None else original(name)
                if weight is not None and shape.transposed:
                    weight = weight.t()
                importances[name] = score_matrix(
                    settings.score,
                    weight=weight,
                    grad=sums.pop(name, None),
                    shape=(shape.out_features, shape.in_features),
                    seed=settings.seed + number,
                )
    scores, not_finite = {}, []
    for name in list(importances):
        try:
            scores[name] = score_rows_and_cols(importances.pop(name), settings.ladder)
        except FloatingPointError:
            not_finite.append(name)
    found = [name for names in comm.gather_objects(not_finite) for name in names]
    if found:
        raise UserError(f"scoring: the importance of {found[0]} is not finite; check the base and the calibration rows")
    return scores


def _share(
    scores: dict[str, RegionScores],
    shapes: Mapping[str, MatrixShape],
    owners: Mapping[str, int],
    ladder: tuple[float, ...],
) -> dict[str, RegionScores]:
    """Broadcast each owner's row and column scores as one tensor of bits per owner."""
    shared: dict[str, RegionScores] = {}
    for owner in range(comm.world_size()):
        names = [name for name in shapes if owners[name] == owner]
        lengths = {name: shapes[name].out_features + shapes[name].in_features for name in names}
        packed = torch.zeros((len(ladder) + 1) * sum(lengths.values()), dtype=torch.int32)
        if owner == comm.rank():
            packed = torch.cat([_pack(scores[name]) for name in names] or [packed])
        on_device = packed.to(comm.device())
        comm.broadcast(on_device, owner)
        parts = on_device.cpu().split([(len(ladder) + 1) * lengths[name] for name in names])
        shared.update({name: _unpack(part, shapes[name], ladder) for name, part in zip(names, parts, strict=True)})
    return {name: shared[name] for name in shapes}


def _pack(scores: RegionScores) -> Tensor:
    return torch.cat(
        [
            scores.row_counts.flatten(),
            scores.col_counts.flatten(),
            scores.row_importance.view(torch.int32),
            scores.col_importance.view(torch.int32),
        ]
    )


def _unpack(packed: Tensor, shape: MatrixShape, ladder: tuple[float, ...]) -> RegionScores:
    steps, rows, cols = len(ladder), shape.out_features, shape.in_features
    row_counts, col_counts, row_importance, col_importance = packed.split([steps * rows, steps * cols, rows, cols])
    return RegionScores(
        ladder=ladder,
        row_counts=row_counts.view(steps, rows),
        col_counts=col_counts.view(steps, cols),
        row_importance=row_importance.view(torch.float32),
        col_importance=col_importance.view(torch.float32),
    )


def _assert_agreement(scores: Mapping[str, RegionScores]) -> None:
    digest = hashlib.sha256()
    for name, entry in scores.items():
        digest.update(name.encode())
        digest.update(_pack(entry).numpy().tobytes())
    digests = comm.gather_objects(digest.hexdigest())
    different = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if different:
        raise UserError(f"scoring: rank {different[0]} holds other core regions than rank 0; check the interconnect")
