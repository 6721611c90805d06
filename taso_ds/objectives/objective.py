"""What a model is trained for: one object that makes rows of examples, batches of rows, then a loss and scores.

Scoring, training and evaluation know a task through this protocol alone. A new objective is one file beside
``language_model`` and ``classification``.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

from torch import Tensor, nn

from taso_ds.data.arguments import DataArguments
from taso_ds.data.encode import EncodedRow
from taso_ds.data.task_data import TaskData
from taso_ds.data.tasks import Example
from taso_ds.data.tokenizer import Tokenizer
from taso_ds.objectives.batches import Batch
from taso_ds.objectives.classification import Classification
from taso_ds.objectives.language_model import LanguageModel


class Objective(Protocol):
    """An objective on one task's rows. One object serves a whole run, and looks at the model at most once."""

    @property
    def headline(self) -> str:
        """The score to quote, a key of what ``evaluate`` returns."""

    @property
    def num_labels(self) -> int:
        """Outputs of the model's classification head; 0 for a model without one."""

    def encode(self, examples: Sequence[Example], source: str) -> list[EncodedRow]:
        """Return the rows to train on.

        Args:
            source: where the examples come from, in words.

        Raises:
            UserError: a row (named by ``source`` and its number) leaves nothing to learn.
        """

    def collate(self, rows: Sequence[EncodedRow]) -> Batch:
        """Return rows as one batch on the CPU.

        A batch of no rows takes part in every collective and counts nothing.
        """

    def loss_sum(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """Return the fp32 loss summed over the batch's supervised units, and their number.

        Args:
            model: the model, or an engine around it.
            batch: what ``collate`` returned, on the device. A row has ``EncodedRow.num_supervised`` units.
        """

    def check(self, positions: int | None) -> None:
        """Look for evaluation rows that are ill-formed.

        Args:
            positions: how many the model has; None for no limit.

        Raises:
            UserError: a row leaves nothing to score or to continue, or an answer would need more positions.
        """

    def rows(self) -> Iterator[EncodedRow]:
        """Yield every row that the model sees in an evaluation: prompts and options too."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return ``loss`` (mean over the supervised units), the task's metrics and ``num_examples``. A collective.

        The evaluation rows are shared out over the ranks, and each counts exactly once.
        """


def make_objective(
    data: TaskData,
    arguments: DataArguments,
    tokenizer: Tokenizer,
    *,
    head: bool,
    adapted: Collection[str],
    batch_size: int,
    max_new_tokens: int,
) -> Objective:
    """Return the objective of a model with a classification head, or of a language model.

    Args:
        head: whether the model ends in a classification head.
        adapted: names of the matrices that an adapter or scoring hooks into.
        batch_size: rows of one forward in an evaluation.
        max_new_tokens: longest generated answer.
    """
    if head:
        return Classification(data, arguments, tokenizer, batch_size=batch_size)
    return LanguageModel(
        data, arguments, tokenizer, adapted=adapted, batch_size=batch_size, max_new_tokens=max_new_tokens
    )
