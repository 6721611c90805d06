"""A classification head learns the class or the score of one or two texts. Its output is the answer."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from taso_ds.data.arguments import DataArguments
from taso_ds.data.collate import collate_head
from taso_ds.data.encode import EncodedRow, pad_token_id
from taso_ds.data.encode_texts import encode_texts
from taso_ds.data.task_data import TaskData
from taso_ds.data.tasks import Example
from taso_ds.data.tokenizer import Tokenizer
from taso_ds.errors import UserError
from taso_ds.objectives.batches import Batch
from taso_ds.objectives.inference import evaluation_batches, in_order, inference
from taso_ds.objectives.loss import head_logits, head_loss_sum
from taso_ds.objectives.metrics import compute_metrics


@dataclass(frozen=True, eq=False)
class Classification:
    """The ``Objective`` of a model with a classification head.

    Args:
        batch_size: rows of one forward in an evaluation.
    """

    data: TaskData
    arguments: DataArguments
    tokenizer: Tokenizer
    batch_size: int

    @property
    def headline(self) -> str:
        return self.data.task.metrics[0]

    @property
    def num_labels(self) -> int:
        return self.data.task.num_labels

    def encode(self, examples: Sequence[Example], source: str) -> list[EncodedRow]:
        task = self.data.task
        if not task.num_labels:
            raise UserError(f"task {task.name} has no classification head: train it with a causal language model")
        if self.arguments.use_chat_template:
            raise UserError("use_chat_template is for causal language models: a classification head has no dialogue")
        return encode_texts(
            self.tokenizer,
            examples,
            is_regression=task.is_regression,
            max_seq_length=self.arguments.max_seq_length,
            source=source,
        )

    def collate(self, rows: Sequence[EncodedRow]) -> Batch:
        return collate_head(rows, pad_id=pad_token_id(self.tokenizer), is_regression=self.data.task.is_regression)

    def loss_sum(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        return head_loss_sum(model, batch)

    def check(self, positions: int | None) -> None:
        _ = self._rows

    def rows(self) -> Iterator[EncodedRow]:
        yield from self._rows

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        rows, task = self._rows, self.data.task
        outputs: dict[int, tuple[float, float]] = {}
        with inference(model):
            for ids, batch in evaluation_batches(rows, batch_size=self.batch_size, collate=self.collate):
                logits = head_logits(model, batch)
                for row, values in zip(ids, logits, strict=False):  # a filler batch has one row and no id
                    outputs[row] = self._read(values, rows[row])
        merged = in_order(outputs, len(rows))
        metrics = compute_metrics(task.metrics, [value for value, _ in merged], [row.target for row in rows])
        return {
            "loss": math.fsum(loss for _, loss in merged) / len(rows),
            **metrics,
            "num_examples": len(rows),
        }

    def _read(self, values: Tensor, row: EncodedRow) -> tuple[float, float]:
        """Return what the head's outputs ``values (num_labels,)`` predict, and their loss."""
        assert row.target is not None
        if self.data.task.is_regression:
            return float(values[0]), float((values[0] - row.target) ** 2)
        return int(values.argmax()), float(-values.log_softmax(-1)[int(row.target)])

    @cached_property
    def _rows(self) -> list[EncodedRow]:
        return self.encode(self.data.evaluation, self.data.eval_source)
