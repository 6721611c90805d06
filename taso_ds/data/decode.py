"""Reads the text of an answer off generated token ids."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from taso_ds.data.chat import read_chat
from taso_ds.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class AnswerReader:
    """Where an answer ends, and which part of its text comes from the template and not from the data.

    Attributes:
        end_id: the token that training rows end with.
        opening: text that the chat template puts before every answer.
    """

    tokenizer: Tokenizer
    end_id: int | None
    opening: str = ""

    def stops(self, configured: int | Iterable[int] | None) -> list[int]:
        """Return the ids to stop at: those that the model's own configuration names, and the end of a training row."""
        listed = [configured] if isinstance(configured, int) else configured or ()
        return sorted({*listed, *([] if self.end_id is None else [self.end_id])})

    def read(self, ids: Sequence[int], stops: Sequence[int]) -> str:
        """Return the text before the first stop."""
        end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
        text: str = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return text.removeprefix(self.opening)


def answer_reader(tokenizer: Tokenizer, *, use_chat_template: bool) -> AnswerReader:
    """Return the reader for the answers of a model whose training rows were encoded in the same way."""
    if not use_chat_template:
        return AnswerReader(tokenizer, tokenizer.eos_token_id)
    chat = read_chat(tokenizer)
    opening = tokenizer(chat.opening, add_special_tokens=False)["input_ids"]
    return AnswerReader(tokenizer, chat.end_id, tokenizer.decode(opening, skip_special_tokens=True))
