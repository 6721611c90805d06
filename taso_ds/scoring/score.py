"""Importance scoring of the frozen base over all ranks (method sections 1 and 2).

Each target matrix has one owner rank. When backward produces a micro-batch's gradient of a matrix, the gradient is
added to the sum at the matrix's owner. So one gradient is alive at a time besides the owners' fp32 accumulators
(parameters / ranks). After the last micro-batch each weight is gathered to its owner. The owner turns the accumulator
into importance and selects from it; all owners do so in parallel. Then each owner broadcasts its row and column scores,
a few numbers per row. Rows, activations and accumulators never travel.

``passes`` saves memory: it scores that many groups of matrices one after the other, with the accumulators of one group
at a time, and each backward ends at the lowest matrix of its group. With one micro-batch per rank nothing has to be
summed over time and no accumulator exists: matrices are selected from as soon as every owner has one, or one owner
would have two.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from taso_ds.adapters.importance import needs_gradient, tap_expert_gradients, tap_gradient
from taso_ds.adapters.selection import RegionScores
from taso_ds.adapters.targets import MatrixShape, Targets
from taso_ds.console.bar import Bar
from taso_ds.distributed import comm
from taso_ds.errors import UserError
from taso_ds.objectives.batches import Batch
from taso_ds.objectives.loss import LossSum
from taso_ds.scoring.joined_calls import DeliverNamed, JoinedCalls
from taso_ds.scoring.scoring_pass import ScoringPass, ScoringSettings

log = logging.getLogger(__name__)


def split_passes(targets: Targets, passes: int) -> list[Targets]:
    """Cut the matrices, in model order, into at most ``passes`` groups of about the same size."""
    total = targets.numel
    groups: dict[int, list[str]] = {}
    before = 0
    for name, target in targets.items():
        middle = before + target.shape.numel // 2
        groups.setdefault(min(passes - 1, middle * passes // total), []).append(name)
        before += target.shape.numel
    return [targets.some(names) for names in groups.values()]


@contextmanager
def scoring_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and keep the checkpointing of blocks on."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    rates: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) is True:
            # A block checkpoints only in training mode. Then the dropouts that it applies itself must be off too.
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
def _tapped(model: nn.Module, targets: Targets, deliver: DeliverNamed) -> Iterator[None]:
    """Deliver the inputs and output gradients of the targets, in ``scoring_mode``; no weight wants a gradient."""
    with ExitStack() as undo:
        for name, module in targets.linears.items():
            undo.callback(tap_gradient(module, partial(deliver, name)).remove)
        for hooked in tap_expert_gradients(targets.experts, deliver):
            undo.callback(hooked.remove)
        for parameter in model.parameters():
            if parameter.requires_grad:  # it belongs to a task head, whose gradients nobody wants here
                parameter.requires_grad_(False)
                undo.callback(parameter.requires_grad_, True)
        undo.enter_context(scoring_mode(model))
        yield


def score_regions(
    model: nn.Module,
    targets: Targets,
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
        targets: the matrices to score.
        batches: this rank's micro-batches, on this rank's device. Every rank has the same number of them; some may be
            fully masked.
        loss_sum: returns the loss summed over supervised units, and their number.
        settings: how importance is computed and reduced.
        done: the scores of an interrupted call with the same arguments; they are not computed again.
        on_pass: called on every rank after every pass, with all scores so far.

    Raises:
        UserError: the ranks disagree on the result, or a score is not finite; the message names the rank or the matrix.
    """
    known = dict(done or {})
    passes = [group for group in split_passes(targets, settings.passes) if not known.keys() >= group.keys()]
    seeds = {name: settings.seed + number for number, name in enumerate(targets)}
    for number, group in enumerate(passes):
        scorer = ScoringPass(group, settings, seeds)
        if needs_gradient(settings.score):
            title = "scoring" if len(passes) == 1 else f"scoring, pass {number + 1} of {len(passes)}"
            _run_backward(model, scorer, batches, loss_sum=loss_sum, title=title)
        known |= _share(scorer.finish(), group.shapes, scorer.owners, settings.ladder)
        if on_pass is not None:
            on_pass(known)
    scores = {name: known[name] for name in targets}
    _assert_agreement(scores)
    return scores


def _run_backward(
    model: nn.Module, scorer: ScoringPass, batches: Sequence[Batch], *, loss_sum: LossSum, title: str
) -> None:
    """Send every micro-batch's gradients to the scorer, which selects at once when there is only one micro-batch."""
    at_once = len(batches) == 1
    total, unit = (len(scorer.targets), "matrix") if at_once else (len(batches), "batch")
    with Bar(total=total, desc=title, unit=unit) as bar:

        def select(name: str, inputs: Tensor, grad_output: Tensor) -> None:
            scorer.select_from(name, inputs, grad_output)
            bar.update()

        calls = JoinedCalls(scorer.targets, select if at_once else scorer.add)
        with _tapped(model, scorer.targets, calls.add):
            for batch in batches:
                with calls.counting():
                    loss, units = loss_sum(model, batch)
                scorer.count(units)
                if at_once:
                    scorer.sum_counts()
                (loss / max(1, units) if scorer.per_batch else loss).backward()
                calls.finish()
                # Memory peaks at the next batch's loss, so the graph and the buffers of this one go before it.
                del loss
                scorer.free_buffers()
                if not at_once:
                    bar.update()
    if not at_once:
        scorer.sum_counts()


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
