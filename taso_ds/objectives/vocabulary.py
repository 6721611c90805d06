"""Finds tokens that the base has no embedding for before it is loaded.

A tokenizer may hold more tokens than its base has embeddings: Gemma 3 1B has a token for images that it cannot read.
Only tokens that occur matter: the one to pad with, and those of the rows.
"""

from collections.abc import Iterable, Mapping

from taso_ds.data.encode import EncodedRow, pad_token_id
from taso_ds.errors import UserError
from taso_ds.models.spec import BaseSpec


def check_padding(base: BaseSpec) -> None:
    """Refuse a padding token that the base does not know; every batch may hold it. UserError."""
    pad_id, number = pad_token_id(base.tokenizer), _num_embeddings(base)
    if number is not None and pad_id >= number:
        raise UserError(
            f"{_unknown(base, pad_id, number)}, and it pads with that: set pad_token in tokenizer_config.json to"
            " one that the base knows, such as its eos_token"
        )


def check_tokens(base: BaseSpec, rows: Mapping[str, Iterable[EncodedRow]]) -> None:
    """Refuse rows with tokens that the base does not know.

    Args:
        rows: what the model will see, by where it comes from. They are read only if the tokenizer holds such tokens.

    Raises:
        UserError: a row holds one.
    """
    number = _num_embeddings(base)
    if number is None or max(base.tokenizer.get_vocab().values()) < number:
        return
    for source, encoded in rows.items():
        largest = max((max(row.input_ids) for row in encoded), default=0)
        if largest >= number:
            raise UserError(
                f"{_unknown(base, largest, number)}, and {source} has that token in its rows: use the base's own"
                " tokenizer, or a base that was trained with this one"
            )


def _unknown(base: BaseSpec, token: int, number: int) -> str:
    return (
        f"tokenizer_name: the tokenizer has token {token} ({base.tokenizer.convert_ids_to_tokens(token)}), the base has"
        f" embeddings for {number:,} tokens"
    )


def _num_embeddings(base: BaseSpec) -> int | None:
    """Return how many tokens the base knows; None where it has no table of them (CANINE)."""
    number: int | None = getattr(base.config.get_text_config(decoder=True), "vocab_size", None)
    return number
