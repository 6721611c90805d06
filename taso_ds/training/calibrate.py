"""Importance scoring of the frozen base over all ranks (method sections 1 and 2).

Each target matrix has one owner rank. Every micro-batch's gradient of a matrix is summed to its owner the moment
backward produces it, so besides the owners' fp32 accumulators (parameters / ranks) one gradient is alive at a time.
After the last micro-batch each weight is gathered to its owner, which turns the accumulator into importance and
selects, all owners in parallel; then the row and column scores, a few numbers per row, are broadcast.

Less memory: ``passes`` scores that many groups of matrices one after the other, with the accumulators of one group at a
time; a backward ends at its group's lowest matrix. With one micro-batch per rank nothing has to be summed over time:
each matrix is selected from as soon as every owner has one, or one owner would have two, and no accumulator exists.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from taso_ds.adapters.fused_experts import ExpertMatrix
from taso_ds.adapters.importance import (
    needs_gradient,
    needs_weight,
    score_matrix,
    tap_expert_gradients,
    tap_gradient,
    weight_gradient,
)
from taso_ds.adapters.selection import RegionScores, score_rows_and_cols
from taso_ds.adapters.targets import MatrixShape, Target
from taso_ds.distributed import comm, zero
from taso_ds.distributed.quantized import weight_of
from taso_ds.errors import UserError
from taso_ds.training.loss import LossSum

log = logging.getLogger(__name__)

Batch = dict[str, Tensor]
# What backward brings: module name, inputs (tokens, in), output gradient (tokens, out).
Deliver = Callable[[str, Tensor, Tensor], None]


@dataclass(frozen=True)
class ScoringSettings:
    """How importance is computed and reduced.

    Attributes:
        offload: keep accumulators in host memory.
        original_weight: returns the weight of a target before it was quantized; None to score with the model's own.
    """

    score: str
    reduction: str
    ladder: tuple[float, ...]
    seed: int
    passes: int = 1
    offload: bool = False
    original_weight: Callable[[str], Tensor] | None = None


def assign_owners(shapes: Mapping[str, MatrixShape], world_size: int) -> dict[str, int]:
    """Give each matrix an owner rank, balanced by size: largest first, to the rank that owns least."""
    owned = [0] * world_size
    owners = {}
    for name, shape in sorted(shapes.items(), key=lambda item: -item[1].numel):
        owners[name] = min(range(world_size), key=owned.__getitem__)
        owned[owners[name]] += shape.numel
    return {name: owners[name] for name in shapes}


def split_passes(shapes: Mapping[str, MatrixShape], passes: int) -> list[dict[str, MatrixShape]]:
    """Cut the matrices, in model order, into at most ``passes`` groups of about the same size."""
    total = sum(shape.numel for shape in shapes.values())
    groups: dict[int, dict[str, MatrixShape]] = {}
    before = 0
    for name, shape in shapes.items():
        middle = before + shape.numel // 2
        groups.setdefault(min(passes - 1, middle * passes // total), {})[name] = shape
        before += shape.numel
    return list(groups.values())


class GradientSum:
    """Sums each matrix's gradient on its owner, in fp32, as backward delivers it.

    ``signed_mean``: the token-weighted sum of signed gradients (loss summed over tokens). ``per_batch_abs``: the sum
    over micro-batches of the absolute gradient of that micro-batch's mean loss.
    """

    def __init__(
        self, shapes: Mapping[str, MatrixShape], owners: Mapping[str, int], *, absolute: bool, offload: bool = False
    ) -> None:
        self._shapes = shapes
        self._owners = owners
        self._absolute = absolute
        self._device = torch.device("cpu") if offload else comm.device()
        # The two matrices beside the sums, reused for every gradient: thousands of new ones would fragment memory.
        self._largest = max(shape.numel for shape in shapes.values())
        self._product: Tensor | None = None
        self._travelling = torch.empty(0)
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, inputs: Tensor, grad_output: Tensor) -> None:
        """Add one micro-batch's gradient of one matrix, a collective."""
        shape = self._shapes[name]
        if self._product is None:
            self._product = torch.empty(self._largest, dtype=grad_output.dtype, device=grad_output.device)
            self._travelling = comm.reduction_buffer(self._product)
        gradient = self._product[: shape.numel].view(shape.out_features, shape.in_features)
        weight_gradient(inputs, grad_output, out=gradient)
        if self._absolute:
            gradient.abs_()
        if self._owners[name] == comm.rank() and name not in self._sums:
            self._sums[name] = torch.zeros(shape.out_features, shape.in_features, device=self._device)
        comm.add_on_owner(self._sums.get(name), gradient, self._owners[name], buffer=self._travelling)

    def take(self, name: str) -> Tensor | None:
        """Hand the sum over to its owner, who forgets it; None on other ranks and where nothing was delivered."""
        total = self._sums.pop(name, None)
        return None if total is None else total.to(comm.device())

    def free_buffers(self) -> None:
        """Give back what only ``add`` needs; a later ``add`` makes it anew."""
        self._product, self._travelling = None, torch.empty(0)


@contextmanager
def scoring_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off, checkpointed blocks still checkpointed."""
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
    try:
        yield
    finally:
        for module, attribute, value in rates:
            setattr(module, attribute, value)
        for module, training in was_training.items():
            module.training = training


@contextmanager
def _tapped(model: nn.Module, targets: Mapping[str, Target], deliver: Deliver) -> Iterator[None]:
    """Deliver the inputs and output gradients of the targets, in ``scoring_mode``; no weight wants a gradient."""
    experts = {name: target for name, target in targets.items() if isinstance(target, ExpertMatrix)}
    linears = {name: target for name, target in targets.items() if not isinstance(target, ExpertMatrix)}
    handles: list[Any] = [tap_gradient(module, partial(deliver, name)) for name, module in linears.items()]
    handles += tap_expert_gradients(experts, deliver)
    heads = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in heads:  # a task head: its gradients are not asked for here
        parameter.requires_grad_(False)
    try:
        with scoring_mode(model):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in heads:
            parameter.requires_grad_(True)


def score_regions(
    model: nn.Module,
    targets: Mapping[str, Target],
    shapes: Mapping[str, MatrixShape],
    batches: Sequence[Batch],
    *,
    loss_sum: LossSum,
    settings: ScoringSettings,
    done: Mapping[str, RegionScores] | None = None,
    on_pass: Callable[[dict[str, RegionScores]], None] | None = None,
) -> dict[str, RegionScores]:
    """Return row and column scores of every target, the same on every rank.

    Args:
        model: the frozen base, able to run backward (a ``scoring_engine``).
        batches: this rank's micro-batches, on this rank's device; every rank has the same number of them, some perhaps
            fully masked.
        loss_sum: the loss summed over supervised units, and their number.
        done: scores of an interrupted call with the same arguments, which are not computed again.
        on_pass: called after every pass with all scores so far, on every rank.

    Raises:
        UserError: when the ranks disagree on the result, or a score is not finite; names the matrix.
    """
    known = dict(done or {})
    passes = [group for group in split_passes(shapes, settings.passes) if not known.keys() >= group.keys()]
    seeds = {name: settings.seed + number for number, name in enumerate(shapes)}
    for number, group in enumerate(passes):
        scorer = _Pass(targets, group, settings, seeds)
        if needs_gradient(settings.score):
            title = "scoring" if len(passes) == 1 else f"scoring, pass {number + 1} of {len(passes)}"
            _run_backward(model, scorer, batches, loss_sum=loss_sum, title=title)
        known |= _share(scorer.finish(), group, scorer.owners, settings.ladder)
        if on_pass is not None:
            on_pass(known)
    scores = {name: known[name] for name in shapes}
    _assert_agreement(scores)
    return scores


def _run_backward(
    model: nn.Module, scorer: "_Pass", batches: Sequence[Batch], *, loss_sum: LossSum, title: str
) -> None:
    """Send every micro-batch's gradients to the scorer; a single one is selected from as it arrives."""
    at_once = len(batches) == 1
    total, unit = (len(scorer.targets), "matrix") if at_once else (len(batches), "batch")
    with tqdm(total=total, desc=title, unit=unit, disable=not comm.is_main()) as bar:

        def select(name: str, inputs: Tensor, grad_output: Tensor) -> None:
            scorer.select_from(name, inputs, grad_output)
            bar.update()

        with _tapped(model, scorer.targets, select if at_once else scorer.add):
            for batch in batches:
                loss, units = loss_sum(model, batch)
                scorer.count(units)
                if at_once:
                    scorer.sum_counts()
                (loss / max(1, units) if scorer.per_batch else loss).backward()
                # Memory peaks at the next batch's loss: this one's graph and the buffers are gone by then.
                del loss
                scorer.free_buffers()
                if not at_once:
                    bar.update()
    if not at_once:
        scorer.sum_counts()


class _Pass:
    """One group of matrices on its way from gradients to row and column scores."""

    def __init__(
        self,
        targets: Mapping[str, Target],
        shapes: Mapping[str, MatrixShape],
        settings: ScoringSettings,
        seeds: Mapping[str, int],
    ) -> None:
        self.targets: dict[str, Any] = {name: targets[name] for name in shapes}
        self.owners = assign_owners(shapes, comm.world_size())
        self.per_batch = settings.reduction == "per_batch_abs"
        self._shapes, self._settings, self._seeds = shapes, settings, seeds
        self._gradients = GradientSum(shapes, self.owners, absolute=self.per_batch, offload=settings.offload)
        self._units = torch.zeros(1, dtype=torch.float64, device=comm.device())
        # At the owners, with the weight as it is stored; at most one matrix of each, and known to all ranks.
        self._waiting: dict[str, Tensor | None] = {}
        self._taken: set[str] = set()
        self._scores: dict[str, RegionScores] = {}
        self._not_finite: list[str] = []

    def count(self, units: int) -> None:
        """Count what a micro-batch weighs: its supervised units, or itself if it has any."""
        self._units += float(units > 0) if self.per_batch else units

    def sum_counts(self) -> None:
        """Add the counts of all ranks; before anything is selected."""
        comm.sum_everywhere(self._units)

    def add(self, name: str, inputs: Tensor, grad_output: Tensor) -> None:
        """Add one micro-batch's gradient of one matrix to its owner's sum."""
        self._gradients.add(name, inputs, grad_output)

    def select_from(self, name: str, inputs: Tensor, grad_output: Tensor) -> None:
        """Select from the only gradient there is."""
        if name in self._taken:
            raise UserError(f"scoring: {name} runs twice in one forward; use two calibration batches or more")
        self._make_room(name)
        self.add(name, inputs, grad_output)
        self._take_weight(name)

    def free_buffers(self) -> None:
        """Keep nothing but sums between two micro-batches."""
        self._gradients.free_buffers()

    def finish(self) -> dict[str, RegionScores]:
        """Select what is not selected yet and return this rank's scores."""
        for name in _by_turns([name for name in self.targets if name not in self._taken], self.owners):
            self._make_room(name)
            self._take_weight(name)
        self._select_waiting()
        found = [name for names in comm.gather_objects(self._not_finite) for name in names]
        if found:
            raise UserError(
                f"scoring: the importance of {found[0]} is not finite; check the base and the calibration rows"
            )
        return self._scores

    def _make_room(self, name: str) -> None:
        """Select from what waits once an owner's turn comes again: all owners work at the same time."""
        if self.owners[name] in {self.owners[other] for other in self._waiting}:
            self._select_waiting()

    def _take_weight(self, name: str) -> None:
        """Let a matrix wait at its owner. A collective: its weight is gathered to the owner."""
        is_read = needs_weight(self._settings.score) and self._settings.original_weight is None
        self._waiting[name] = _stored_on(self.targets[name], self.owners[name]) if is_read else None
        self._taken.add(name)

    def _select_waiting(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for name in [name for name in waiting if self.owners[name] == comm.rank()]:
            self._select(name, waiting.pop(name))

    def _select(self, name: str, stored: Tensor | None) -> None:
        """Score one matrix, which this rank owns."""
        score, shape, original = self._settings.score, self._shapes[name], self._settings.original_weight
        weight = weight_of(self.targets[name], stored) if stored is not None else None
        if needs_weight(score) and original is not None:
            weight = original(name).to(comm.device())
        grad = self._gradients.take(name)
        if grad is not None:
            grad.div_(float(self._units))
        elif needs_gradient(score):  # the loss does not depend on this matrix
            grad = torch.zeros(shape.out_features, shape.in_features, device=comm.device())
        importance = score_matrix(
            score,
            weight=weight.t() if weight is not None and shape.transposed else weight,
            grad=grad,
            shape=(shape.out_features, shape.in_features),
            seed=self._seeds[name],
        )
        del stored, weight
        try:
            self._scores[name] = score_rows_and_cols(importance, self._settings.ladder)
        except FloatingPointError:
            self._not_finite.append(name)


def _by_turns(names: Sequence[str], owners: Mapping[str, int]) -> list[str]:
    """Return the names so that one of each owner comes before the second of any."""
    turns = zip_longest(*([name for name in names if owners[name] == owner] for owner in sorted(set(owners.values()))))
    return [name for turn in turns for name in turn if name is not None]


def _stored_on(target: Any, owner: int) -> Tensor | None:
    if isinstance(target, ExpertMatrix):
        return zero.gathered_on(target.parameter, owner, index=target.index)
    return zero.gathered_on(target.weight, owner)


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
