"""Answers that a language model generates greedily, as text."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor, nn

from taso_ds.data.collate import collate_left
from taso_ds.data.decode import AnswerReader
from taso_ds.data.encode import EncodedRow
from taso_ds.distributed import comm, zero
from taso_ds.objectives.inference import evaluation_batches, in_order

if TYPE_CHECKING:
    from transformers import GenerationConfig


@runtime_checkable
class Generator(Protocol):
    """What is used of a model that generates: a part of transformers' ``GenerationMixin``."""

    generation_config: "GenerationConfig"

    def generate(self, **options: object) -> Tensor: ...


def generate_answers(
    model: nn.Module,
    prompts: Sequence[EncodedRow],
    reader: AnswerReader,
    *,
    pad_id: int,
    batch_size: int,
    max_new_tokens: int,
) -> list[str]:
    """Return what the model says to every prompt, up to the end of its answer. A collective.

    Args:
        pad_id: the token to pad prompts and answers with.
        batch_size: prompts that are continued at once.
        max_new_tokens: longest answer.
    """
    assert isinstance(model, Generator)
    stops = reader.stops(model.generation_config.eos_token_id)
    greedy = {"max_new_tokens": max_new_tokens, "do_sample": False, "use_cache": True}
    # ZeRO-3 gathers in every forward, so the ranks must run equally many.
    synced = comm.world_size() > 1 and any(map(zero.is_partitioned, model.parameters()))
    batches = evaluation_batches(prompts, batch_size=batch_size, collate=lambda rows: collate_left(rows, pad_id=pad_id))
    answers: dict[int, str] = {}
    with _no_recommendations(model):
        for ids, batch in batches:
            width = batch["input_ids"].shape[1]
            tokens = model.generate(**batch, **greedy, pad_token_id=pad_id, eos_token_id=stops, synced_gpus=synced)
            texts = [reader.read(row, stops) for row in tokens[:, width:].tolist()]
            answers.update(zip(ids, texts, strict=False))  # a filler batch has one row and no id
    return in_order(answers, len(prompts))


@contextmanager
def _no_recommendations(model: Generator) -> Iterator[None]:
    """Let ``generate`` do what it is told and no more.

    What it is not told it would take from the model's folder: beams, several answers, penalties.
    """
    from transformers import GenerationConfig

    recommended, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = recommended
