"""One group of matrices on its way from gradients to row and column scores, over all ranks.

A matrix is scored on its owner. Its gradient and its weight travel there. Selecting is the long part; all owners do it
at the same time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from taso_ds.adapters.fused_experts import ExpertMatrix
from taso_ds.adapters.importance import needs_gradient, needs_weight, score_matrix
from taso_ds.adapters.selection import RegionScores, score_rows_and_cols
from taso_ds.adapters.targets import MatrixShape, Target, Targets
from taso_ds.distributed import comm, zero
from taso_ds.errors import UserError
from taso_ds.models.quantized_linear import weight_of
from taso_ds.scoring.gradient_sum import GradientSum


@dataclass(frozen=True)
class ScoringSettings:
    """How importance is computed and reduced.

    Attributes:
        score: a name of ``adapters.choices.SCORES``.
        reduction: a name of ``adapters.choices.REDUCTIONS``.
        ladder: the element fractions for which core elements are counted.
        seed: of the score ``random``.
        passes: how many groups of matrices are scored one after the other.
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
    """Give each matrix an owner rank: the largest matrix first, always to the rank that owns least."""
    owned = [0] * world_size
    owners = {}
    for name, shape in sorted(shapes.items(), key=lambda item: -item[1].numel):
        owners[name] = min(range(world_size), key=owned.__getitem__)
        owned[owners[name]] += shape.numel
    return {name: owners[name] for name in shapes}


class ScoringPass:
    """One group of matrices on its way from gradients to row and column scores."""

    def __init__(self, targets: Targets, settings: ScoringSettings, seeds: Mapping[str, int]) -> None:
        self.targets = targets
        self.owners = assign_owners(targets.shapes, comm.world_size())
        self.per_batch = settings.reduction == "per_batch_abs"
        self._settings, self._seeds = settings, seeds
        self._gradients = GradientSum(targets.shapes, self.owners, absolute=self.per_batch, offload=settings.offload)
        self._units = torch.zeros(1, dtype=torch.float64, device=comm.device())
        # The matrices that wait at their owners, one at each, with the weight as it is stored. All ranks know them.
        self._waiting: dict[str, Tensor | None] = {}
        self._taken: set[str] = set()
        self._scores: dict[str, RegionScores] = {}
        self._not_finite: list[str] = []

    def count(self, units: int) -> None:
        """Count a micro-batch: its supervised units, or with ``per_batch_abs`` 1 if it has any."""
        self._units += float(units > 0) if self.per_batch else units

    def sum_counts(self) -> None:
        """Add up the counts of all ranks. A collective, called before anything is selected."""
        comm.sum_everywhere(self._units)

    def add(self, name: str, inputs: Tensor, grad_output: Tensor) -> None:
        """Add one micro-batch's gradient of one matrix to its owner's sum. A collective.

        Args:
            inputs: ``(tokens, in_features)``.
            grad_output: ``(tokens, out_features)``.
        """
        self._gradients.add(name, inputs, grad_output)

    def select_from(self, name: str, inputs: Tensor, grad_output: Tensor) -> None:
        """Select from a matrix's only gradient, as ``add`` gets it. A collective."""
        assert name not in self._taken, name
        self._make_room(name)
        self.add(name, inputs, grad_output)
        self._take_weight(name)

    def free_buffers(self) -> None:
        """Free everything but the sums, between two micro-batches."""
        self._gradients.free_buffers()

    def finish(self) -> dict[str, RegionScores]:
        """Select from the matrices that are left, and return this rank's scores. A collective.

        Raises:
            UserError: on every rank, when the importance of a matrix is not finite.
        """
        for name in _by_turns([name for name in self.targets if name not in self._taken], self.owners):
            self._make_room(name)
            self._take_weight(name)
        self._select_waiting()
        not_finite = [name for names in comm.gather_objects(self._not_finite) for name in names]
        if not_finite:
            raise UserError(
                f"scoring: the importance of {not_finite[0]} is not finite; check the base and the calibration rows"
            )
        return self._scores

    def _make_room(self, name: str) -> None:
        """Select from what waits when the owner's turn comes again, so that all owners work at the same time."""
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
        score, target, original = self._settings.score, self.targets[name], self._settings.original_weight
        shape = target.shape
        weight = weight_of(target.matrix, stored) if stored is not None else None
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
    """Return the names in turns: the first of every owner, then the second of every owner, and so on."""
    turns = zip_longest(*([name for name in names if owners[name] == owner] for owner in sorted(set(owners.values()))))
    return [name for turn in turns for name in turn if name is not None]


def _stored_on(target: Target, owner: int) -> Tensor | None:
    index = target.matrix.index if isinstance(target.matrix, ExpertMatrix) else None
    return zero.gathered_on(target.parameter, owner, index=index)
