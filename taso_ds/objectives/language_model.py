"""A language model learns the completion behind a prompt, token by token.

It is evaluated as its task asks. A choice task takes the option with the highest likelihood. GSM8K generates greedily
and compares the final number. A user's own completions are generated and compared if a metric is asked for.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from taso_ds.data.arguments import DataArguments
from taso_ds.data.collate import collate
from taso_ds.data.decode import AnswerReader, answer_reader
from taso_ds.data.encode import EncodedRow, encode_completions, encode_options, encode_prompt, pad_token_id
from taso_ds.data.task_data import TaskData
from taso_ds.data.tasks import Example
from taso_ds.data.tokenizer import Tokenizer
from taso_ds.errors import UserError
from taso_ds.objectives.batches import Batch
from taso_ds.objectives.choice import log_likelihoods, most_likely, rating
from taso_ds.objectives.chunked_loss import LanguageModelLoss
from taso_ds.objectives.generation import generate_answers
from taso_ds.objectives.inference import evaluation_batches, gathered, inference
from taso_ds.objectives.metrics import compute_metrics, final_number


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """The ``Objective`` of a causal language model.

    Args:
        adapted: names of the matrices that an adapter or scoring hooks into.
        batch_size: rows of one forward in an evaluation.
        max_new_tokens: longest generated answer.
    """

    data: TaskData
    arguments: DataArguments
    tokenizer: Tokenizer
    adapted: Collection[str]
    batch_size: int
    max_new_tokens: int

    @property
    def headline(self) -> str:
        return self.data.task.metrics[0] if self.data.task.metrics else "loss"

    @property
    def num_labels(self) -> int:
        return 0

    def encode(self, examples: Sequence[Example], source: str) -> list[EncodedRow]:
        return encode_completions(
            self.tokenizer,
            examples,
            max_seq_length=self.arguments.max_seq_length,
            append_eos=not self._chooses,  # an option is compared with others, not stopped
            use_chat_template=self.arguments.use_chat_template,
            source=source,
        )

    def collate(self, rows: Sequence[EncodedRow]) -> Batch:
        return collate(rows, pad_id=pad_token_id(self.tokenizer))

    def loss_sum(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        return self._loss(model, batch)

    def check(self, positions: int | None) -> None:
        if not self._chooses:  # options are never empty
            _ = self._rows
        if self._generates:
            _ = self._reader
            longest = max(len(row.input_ids) for row in self._prompts)
            if positions is not None and longest + self.max_new_tokens > positions:
                raise UserError(
                    f"max_new_tokens: {self.max_new_tokens} behind the longest prompt, of {longest} tokens, exceed the"
                    f" model's {positions} positions; lower it or --max_seq_length"
                )

    def rows(self) -> Iterator[EncodedRow]:
        if self._chooses:
            yield from (row for options in self._options for row in options)
        else:
            yield from self._rows
        if self._generates:
            yield from self._prompts

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        with inference(model):
            if self._chooses:
                scores = self._choose(model)
            else:
                scores = self._mean_loss(model)
                if self._generates:
                    scores |= self._generate(model)
        return scores | {"num_examples": len(self.data.evaluation)}

    @property
    def _chooses(self) -> bool:
        return self.data.task.kind == "choice"

    @property
    def _generates(self) -> bool:
        return bool(self.data.task.metrics) and not self._chooses

    def _choose(self, model: nn.Module) -> dict[str, float]:
        task, examples, options = self.data.task, self.data.evaluation, self._options
        likelihoods = log_likelihoods(model, options, batch_size=self.batch_size, collate=self.collate)
        golds = [example.options.index(example.completion) for example in examples]
        units = sum(rows[gold].num_supervised for rows, gold in zip(options, golds, strict=True))
        loss = -math.fsum(values[gold] for values, gold in zip(likelihoods, golds, strict=True)) / units
        predictions = [rating(values) if task.is_regression else most_likely(values) for values in likelihoods]
        return {"loss": loss, **compute_metrics(task.metrics, predictions, [row.target for row in examples])}

    def _mean_loss(self, model: nn.Module) -> dict[str, float]:
        sums: dict[int, tuple[float, int]] = {}
        for ids, batch in evaluation_batches(self._rows, batch_size=self.batch_size, collate=self.collate):
            total, units = self.loss_sum(model, batch)
            if ids:
                sums[ids[0]] = (float(total), units)
        merged = sorted(gathered(sums).items())  # summed in one order, whoever ran the batch
        return {"loss": math.fsum(loss for _, (loss, _) in merged) / sum(units for _, (_, units) in merged)}

    def _generate(self, model: nn.Module) -> dict[str, float]:
        task = self.data.task
        answers = generate_answers(
            model,
            self._prompts,
            self._reader,
            pad_id=pad_token_id(self.tokenizer),
            batch_size=self.batch_size,
            max_new_tokens=self.max_new_tokens,
        )
        golds = [str(example.target) for example in self.data.evaluation]
        compared = final_number if task.kind == "generation" else str
        return compute_metrics(task.metrics, list(map(compared, answers)), list(map(compared, golds)))

    @cached_property
    def _loss(self) -> LanguageModelLoss:
        """One object for scoring, training and evaluation: it looks at the model once."""
        return LanguageModelLoss(self.adapted)

    @cached_property
    def _rows(self) -> list[EncodedRow]:
        return self.encode(self.data.evaluation, self.data.eval_source)

    @cached_property
    def _options(self) -> list[list[EncodedRow]]:
        return encode_options(
            self.tokenizer,
            self.data.evaluation,
            max_seq_length=self.arguments.max_seq_length,
            use_chat_template=self.arguments.use_chat_template,
        )

    @cached_property
    def _prompts(self) -> list[EncodedRow]:
        return [
            encode_prompt(
                self.tokenizer,
                example.prompt,
                max_seq_length=self.arguments.max_seq_length,
                use_chat_template=self.arguments.use_chat_template,
            )
            for example in self.data.evaluation
        ]

    @cached_property
    def _reader(self) -> AnswerReader:
        return answer_reader(self.tokenizer, use_chat_template=self.arguments.use_chat_template)
