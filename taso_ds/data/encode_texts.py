"""Makes token ids of a classification head's examples: one or two texts, and their class or score."""

from collections.abc import Sequence

from taso_ds.data.encode import Cut, EncodedRow, take_rows
from taso_ds.data.tasks import Example
from taso_ds.data.tokenizer import Tokenizer
from taso_ds.errors import UserError


def encode_texts(
    tokenizer: Tokenizer, examples: Sequence[Example], *, is_regression: bool, max_seq_length: int, source: str
) -> list[EncodedRow]:
    """Encode the texts of every example. Of two texts, the longer one is cut first.

    Args:
        is_regression: whether the target is a score, and not a class.
        max_seq_length: longest row, in tokens.
        source: where the examples come from, in words.

    Raises:
        UserError: a row has no texts. The message names ``source`` and the number of the row, counted from 1.
    """
    rows = (_encode(tokenizer, example, is_regression, max_seq_length) for example in examples)
    return take_rows(rows, examples, max_seq_length=max_seq_length, source=source)


def _encode(tokenizer: Tokenizer, example: Example, is_regression: bool, max_seq_length: int) -> Cut:
    target = float(example.target) if is_regression else int(example.target)
    texts = example.texts
    if len(texts) not in (1, 2) or not any(text.strip() for text in texts):
        raise UserError("a classification head reads one or two texts, but the row has none")
    encoding = tokenizer(*texts, verbose=False)
    is_cut = len(encoding["input_ids"]) > max_seq_length
    if is_cut:
        encoding = tokenizer(*texts, truncation=True, max_length=max_seq_length)
    types = encoding.get("token_type_ids")
    return Cut(EncodedRow(list(encoding["input_ids"]), [], target, None if types is None else list(types)), is_cut)
