"""Scores of a model on a task's evaluation rows, shared out over the ranks, each row counted exactly once.

Batches are formed before they are dealt to ranks, so the numbers do not depend on the world size. Choice tasks take the
option with the highest likelihood, GSM8K generates greedily and compares the final number, a user's own completions are
generated and compared when a metric is asked for, a classification head takes its own word.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from taso_ds.data.collate import collate, collate_head, collate_left, empty_row
from taso_ds.data.decode import AnswerReader, answer_reader
from taso_ds.data.encode import EncodedRow, encode_examples, encode_options, encode_prompt, pad_token_id
from taso_ds.data.tasks import Example, Task
from taso_ds.distributed import comm
from taso_ds.errors import UserError
from taso_ds.objectives.batches import dealt_batches, on_device
from taso_ds.objectives.loss import IGNORED, LossSum, head_logits, supervised_logits
from taso_ds.objectives.metrics import compute_metrics, final_number


@dataclass(frozen=True, eq=False)
class Evaluator:
    """Evaluates one model on one task's rows, as often as wanted.

    Args:
        examples: the rows.
        tokenizer: the model's.
        head: whether the model ends in a classification head.
        loss_sum: the loss of rows that are neither classified nor chosen from options.
        synced: whether ranks must run equally many forwards while generating (ZeRO-3 gathers in each).
    """

    examples: Sequence[Example]
    task: Task
    tokenizer: Any
    head: bool
    loss_sum: LossSum
    source: str
    batch_size: int
    max_seq_length: int
    max_new_tokens: int
    use_chat_template: bool
    synced: bool

    def check(self, positions: int | None) -> None:
        """Encode what can be ill-formed.

        Args:
            positions: how many the model has; None for no limit.

        Raises:
            UserError: a row leaves nothing to score or to continue, or an answer would need more positions.
        """
        if self.head or self.task.kind != "choice":  # options are never empty
            _ = self._encoded
        if self._generates:
            _ = self._reader
            longest = max(len(row.input_ids) for row in self._prompts)
            if positions is not None and longest + self.max_new_tokens > positions:
                raise UserError(
                    f"max_new_tokens: {self.max_new_tokens} behind the longest prompt, of {longest} tokens, exceed the"
                    f" model's {positions} positions; lower it or --max_seq_length"
                )

    def rows(self) -> Iterator[EncodedRow]:
        """Return every row that the model will see, of prompts and options too."""
        if self.task.kind != "choice" or self.head:
            yield from self._encoded
        else:
            yield from (row for options in self._encoded_options for row in options)
        if self._generates:
            yield from self._prompts

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return ``loss`` (mean over the supervised units), the task's metrics and ``num_examples``."""
        with _inference(model):
            if self.head:
                scores = self._classify(model)
            elif self.task.kind == "choice":
                scores = self._choose(model)
            else:
                scores = self._lm_loss(model)
                if self._generates:
                    scores |= self._generate(model)
        return scores | {"num_examples": len(self.examples)}

    @property
    def headline(self) -> str:
        """The figure to quote: the task's first metric, or the loss where there is none."""
        return self.task.metrics[0] if self.task.metrics else "loss"

    @property
    def _generates(self) -> bool:
        return bool(self.task.metrics) and not self.head and self.task.kind != "choice"

    def _classify(self, model: nn.Module) -> dict[str, float]:
        rows = self._encoded
        pad_id = pad_token_id(self.tokenizer)
        outputs: dict[int, tuple[float, float]] = {}
        batches = dealt_batches(
            rows,
            batch_size=self.batch_size,
            collate=lambda chosen: collate_head(chosen, pad_id=pad_id, is_regression=self.task.is_regression),
            filler=empty_row(pad_id),
        )
        for ids, batch in _progress(batches):
            logits = head_logits(model, on_device(batch))
            for row, values in zip(ids, logits, strict=False):  # a filler batch has one row and no id
                target = rows[row].target
                assert target is not None
                if self.task.is_regression:
                    outputs[row] = (float(values[0]), float((values[0] - target) ** 2))
                else:
                    outputs[row] = (int(values.argmax()), float(-values.log_softmax(-1)[int(target)]))
        merged = _merge(outputs, len(rows))
        metrics = compute_metrics(self.task.metrics, [value for value, _ in merged], [row.target for row in rows])
        return {"loss": math.fsum(loss for _, loss in merged) / len(rows), **metrics}

    def _choose(self, model: nn.Module) -> dict[str, float]:
        options = self._encoded_options
        likelihoods = self._likelihoods(model, options)
        golds = [example.options.index(example.completion) for example in self.examples]
        units = sum(rows[gold].num_supervised for rows, gold in zip(options, golds, strict=True))
        loss = -math.fsum(values[gold] for values, gold in zip(likelihoods, golds, strict=True)) / units
        predictions = [_rating(values) if self.task.is_regression else _argmax(values) for values in likelihoods]
        return {"loss": loss, **compute_metrics(self.task.metrics, predictions, [row.target for row in self.examples])}

    @cached_property
    def _encoded(self) -> list[EncodedRow]:
        return encode_examples(
            self.tokenizer,
            self.examples,
            self.task,
            max_seq_length=self.max_seq_length,
            head=self.head,
            use_chat_template=self.use_chat_template,
            source=self.source,
        )

    @cached_property
    def _encoded_options(self) -> list[list[EncodedRow]]:
        return encode_options(
            self.tokenizer,
            self.examples,
            max_seq_length=self.max_seq_length,
            use_chat_template=self.use_chat_template,
        )

    def _likelihoods(self, model: nn.Module, options: Sequence[Sequence[EncodedRow]]) -> list[list[float]]:
        """Return the log-likelihood of every option of every example.

        Options that are one token after the same prompt are read off one forward; others take one each.
        """
        rows: list[EncodedRow] = []
        readings: list[list[tuple[int, int | None]]] = []  # per option: its row, and the token to read there
        for encoded in options:
            if _differ_in_last_token(encoded):
                readings.append([(len(rows), row.input_ids[-1]) for row in encoded])
                rows.append(encoded[0])
            else:
                readings.append([(len(rows) + number, None) for number in range(len(encoded))])
                rows.extend(encoded)
        wanted: dict[int, list[int | None]] = {}
        for reading in readings:
            for row, token in reading:
                wanted.setdefault(row, []).append(token)
        pad_id = pad_token_id(self.tokenizer)
        batches = dealt_batches(
            rows,
            batch_size=self.batch_size,
            collate=lambda chosen: collate(chosen, pad_id=pad_id),
            filler=empty_row(pad_id),
        )
        found: dict[tuple[int, int | None], float] = {}
        for ids, batch in _progress(batches):
            logits, targets = supervised_logits(model, on_device(batch))
            for number, row in enumerate(ids):
                kept = targets[number] != IGNORED
                log_probabilities = logits[number][kept].float().log_softmax(-1)  # (supervised, vocabulary)
                for token in wanted[row]:
                    tokens = targets[number][kept] if token is None else torch.tensor([token], device=targets.device)
                    found[row, token] = float(log_probabilities.gather(1, tokens[:, None]).sum())
        merged = {key: value for part in comm.gather_objects(found) for key, value in part.items()}
        return [[merged[reading] for reading in reading_of_example] for reading_of_example in readings]

    def _lm_loss(self, model: nn.Module) -> dict[str, float]:
        pad_id = pad_token_id(self.tokenizer)
        batches = dealt_batches(
            self._encoded,
            batch_size=self.batch_size,
            collate=lambda chosen: collate(chosen, pad_id=pad_id),
            filler=empty_row(pad_id),
        )
        sums = {}
        for ids, batch in _progress(batches):
            total, units = self.loss_sum(model, on_device(batch))
            if ids:
                sums[ids[0]] = (float(total), units)
        # summed in one order, whoever ran the batch
        merged = sorted((key, value) for part in comm.gather_objects(sums) for key, value in part.items())
        return {"loss": math.fsum(loss for _, (loss, _) in merged) / sum(units for _, (_, units) in merged)}

    @cached_property
    def _prompts(self) -> list[EncodedRow]:
        return [
            encode_prompt(
                self.tokenizer,
                example.prompt,
                max_seq_length=self.max_seq_length,
                use_chat_template=self.use_chat_template,
            )
            for example in self.examples
        ]

    @cached_property
    def _reader(self) -> AnswerReader:
        return answer_reader(self.tokenizer, use_chat_template=self.use_chat_template)

    def _generate(self, model: nn.Module) -> dict[str, float]:
        rows, reader = self._prompts, self._reader
        stops = reader.stops(model.generation_config.eos_token_id)  # type: ignore[union-attr, arg-type]
        pad_id = pad_token_id(self.tokenizer)
        greedy = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "use_cache": True}
        batches = dealt_batches(
            rows,
            batch_size=self.batch_size,
            collate=lambda chosen: collate_left(chosen, pad_id=pad_id),
            filler=empty_row(pad_id),
        )
        answers: dict[int, str] = {}
        with _no_recommendations(model):
            for ids, batch in _progress(batches):
                width = batch["input_ids"].shape[1]
                tokens = model.generate(  # type: ignore[operator]
                    **on_device(batch), **greedy, pad_token_id=pad_id, eos_token_id=stops, synced_gpus=self.synced
                )
                texts = [reader.read(row, stops) for row in tokens[:, width:].tolist()]
                answers.update(zip(ids, texts, strict=False))
        texts, golds = _merge(answers, len(rows)), [str(example.target) for example in self.examples]
        compared = final_number if self.task.kind == "generation" else str
        return compute_metrics(self.task.metrics, list(map(compared, texts)), list(map(compared, golds)))


def _differ_in_last_token(rows: Sequence[EncodedRow]) -> bool:
    prompt = rows[0].input_ids[:-1]
    return all(row.num_supervised == 1 and row.input_ids[:-1] == prompt for row in rows)


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _rating(values: Sequence[float]) -> float:
    """Return the likelihood-weighted mean of the options' positions: the rating of a decoder that answers 0 to 5."""
    weights = Tensor(values).softmax(0)
    return float((weights * torch.arange(len(values))).sum())


def _merge(found: Mapping[int, Any], number: int) -> list[Any]:
    parts = comm.gather_objects(dict(found))
    merged = {key: value for part in parts for key, value in part.items()}
    assert sum(map(len, parts)) == len(merged) == number, "a row was counted twice or not at all"
    return [merged[row] for row in range(number)]


def _progress(batches: Sequence[tuple[list[int], dict[str, Tensor]]]) -> Any:
    return tqdm(batches, desc="evaluating", unit="batch", disable=not comm.is_main(), leave=False)


@contextmanager
def _no_recommendations(model: Any) -> Iterator[None]:
    """Let ``generate`` do what it is told and no more.

    It takes whatever it is not told from the model's folder: beams, several answers, penalties.
    """
    from transformers import GenerationConfig

    recommended, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = recommended


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
