"""Makes token ids of a language model's examples: what it reads, which tokens are supervised, and what is cut.

Only the completion is supervised; the other labels are -100. The boundary between prompt and completion must not depend
on the completion. Otherwise the options of one question would be scored after different prompts. So if a tokenizer
merges across the boundary, the completion is tokenized alone.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from taso_ds.data.chat import chat_prompt, read_chat
from taso_ds.data.tasks import Example
from taso_ds.data.tokenizer import Tokenizer
from taso_ds.errors import UserError

log = logging.getLogger(__name__)

IGNORED = -100  # the label torch's cross entropy leaves out


@dataclass(frozen=True)
class EncodedRow:
    """Token ids of one row.

    Attributes:
        input_ids: what the model reads.
        labels: as long as ``input_ids``, -100 where not supervised; empty for a classification head.
        target: class index or score for a classification head.
        token_type_ids: which of two texts a token belongs to, for encoders that want it (BERT).
    """

    input_ids: list[int]
    labels: list[int]
    target: int | float | None = None
    token_type_ids: list[int] | None = None

    @property
    def num_supervised(self) -> int:
        """Tokens that count in the shifted causal loss (nothing predicts the first one); 1 for a head's row."""
        if not self.labels:
            return int(self.target is not None)
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class Cut:
    """One encoded row and whether its prompt (or pair of texts) or its completion had to be shortened."""

    row: EncodedRow
    prompt: bool = False
    completion: bool = False


def encode_completions(
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    *,
    max_seq_length: int,
    append_eos: bool,
    use_chat_template: bool = False,
    source: str,
) -> list[EncodedRow]:
    """Encode the prompt and the gold completion of every example.

    The prompt is cut on the left, behind a BOS. Only a completion that alone exceeds ``max_seq_length - 1`` tokens is
    cut, on the right.

    Args:
        max_seq_length: longest row, in tokens.
        append_eos: whether a completion ends with the EOS, or with the end of a turn.
        use_chat_template: whether the tokenizer's template wraps prompts and completions.
        source: where the examples come from, in words.

    Raises:
        UserError: the tokenizer lacks what is asked of it, or a row leaves nothing to learn. The message names
            ``source`` and the number of the row, counted from 1.
    """
    rows = _completions(
        tokenizer,
        [(example.prompt, example.completion) for example in examples],
        max_seq_length=max_seq_length,
        append_eos=append_eos,
        use_chat_template=use_chat_template,
    )
    return take_rows(rows, examples, max_seq_length=max_seq_length, source=source)


def encode_options(
    tokenizer: Tokenizer, examples: Sequence[Example], *, max_seq_length: int, use_chat_template: bool = False
) -> list[list[EncodedRow]]:
    """Encode every option of every example, as a completion of its prompt that has no end.

    Args:
        max_seq_length: longest row, in tokens.
    """
    rows = _completions(
        tokenizer,
        [(example.prompt, option) for example in examples for option in example.options],
        max_seq_length=max_seq_length,
        append_eos=False,
        use_chat_template=use_chat_template,
    )
    return [[next(rows).row for _ in example.options] for example in examples]


def encode_prompt(
    tokenizer: Tokenizer, prompt: str, *, max_seq_length: int, use_chat_template: bool = False
) -> EncodedRow:
    """Encode a prompt alone, to generate from; all labels are -100. It is cut on the left, behind a BOS.

    Args:
        max_seq_length: longest prompt, in tokens.

    Raises:
        UserError: there is no token to continue.
    """
    text = chat_prompt(tokenizer, prompt) if use_chat_template else prompt
    lead = [] if use_chat_template else _lead(tokenizer, text)
    ids = _fit_left(tokenizer, lead + _ids(tokenizer, [text])[0], len(lead), max_seq_length)
    if not ids:
        raise UserError("the prompt is empty and the tokenizer sets no BOS: there is nothing to continue")
    return EncodedRow(ids, [IGNORED] * len(ids))


def pad_token_id(tokenizer: Tokenizer) -> int:
    """Return an id to pad with: the tokenizer's own where it has one. Every id would do, since no result shows it."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    return next((token for token in candidates if token is not None), 0)


def take_rows(
    rows: Iterable[Cut], examples: Sequence[Example], *, max_seq_length: int, source: str
) -> list[EncodedRow]:
    """Return the rows of the examples; one warning counts those that were cut.

    Args:
        rows: one for each example, encoded as they are asked for.
        max_seq_length: what they were cut to, in tokens.
        source: where the examples come from, in words.

    Raises:
        UserError: a row cannot be encoded. The message names ``source`` and the row.
    """
    cuts: list[Cut] = []
    try:
        for row in rows:
            cuts.append(row)
    except UserError as error:
        raise UserError(f"{source}, row {examples[len(cuts)].place or len(cuts) + 1}: {error}") from error
    num_prompts = sum(cut.prompt for cut in cuts)
    num_completions = sum(cut.completion for cut in cuts)
    if num_prompts or num_completions:
        log.warning(
            "%s: of %d rows, %d had their prompt and %d their completion cut to fit max_seq_length %d",
            source,
            len(cuts),
            num_prompts,
            num_completions,
            max_seq_length,
        )
    return [cut.row for cut in cuts]


def _completions(
    tokenizer: Tokenizer,
    pairs: Sequence[tuple[str, str]],
    *,
    max_seq_length: int,
    append_eos: bool,
    use_chat_template: bool,
) -> Iterator[Cut]:
    """Check what concerns all rows, tokenize all texts in two calls, and return the rows one by one."""
    if max_seq_length < 2:
        raise UserError(f"max_seq_length must be at least 2 (one token to read, one to predict), got {max_seq_length}")
    texts, closing, end = pairs, "", tokenizer.eos_token_id
    if use_chat_template:
        chat = read_chat(tokenizer)
        texts, closing, end = [chat.texts(*pair) for pair in pairs], chat.closing, chat.end_id
        if append_eos and not closing:
            log.info("the chat template ends no turn with a token of its own: rows end with %s", tokenizer.eos_token)
    if append_eos and end is None:
        raise UserError(
            "the tokenizer has no EOS token, so a model cannot learn to stop: set eos_token in tokenizer_config.json"
        )
    prompts = [prompt for prompt, _ in texts]
    answers = [answer + closing if append_eos else answer for _, answer in texts]
    # A template holds its own special tokens.
    lead = [] if use_chat_template else _lead(tokenizer, next(filter(None, prompts), ""))
    prompt_ids = _ids(tokenizer, prompts)
    full_ids = _ids(tokenizer, [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])

    def row(index: int) -> Cut:
        if not pairs[index][1].strip():
            raise UserError("the completion is empty: there is nothing to learn; remove the row or fill it in")
        prompt, full = prompt_ids[index], full_ids[index]
        stable = full[: len(prompt)] == prompt
        answer = full[len(prompt) :] if stable else _ids(tokenizer, [answers[index]])[0]
        if append_eos and end is not None and answer[-1:] != [end]:
            answer = [*answer, end]
        return _supervise(tokenizer, lead + prompt, answer, len(lead), max_seq_length)

    return (row(index) for index in range(len(pairs)))


def _supervise(tokenizer: Tokenizer, prompt: list[int], answer: list[int], num_lead: int, max_seq_length: int) -> Cut:
    """Cut prompt and answer to length and mask the prompt."""
    kept_answer = answer[: max_seq_length - 1]
    kept_prompt = _fit_left(tokenizer, prompt, num_lead, max_seq_length - len(kept_answer))
    row = EncodedRow(kept_prompt + kept_answer, [IGNORED] * len(kept_prompt) + kept_answer)
    if row.num_supervised == 0:
        raise UserError(
            "no token of the completion is left to supervise: the first token of a sequence is predicted from "
            "nothing; give the row a prompt"
        )
    return Cut(row, len(kept_prompt) < len(prompt), len(kept_answer) < len(answer))


def _ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Tokenize bare texts. ``verbose`` is off: it would warn about the model's maximal length before our cut."""
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _lead(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the special tokens that the tokenizer puts before a text: a BOS, several (GLM) or none.

    Those that it puts behind a text (an EOS, a SEP) are left out: they must not stand between prompt and completion.
    """
    bare, special = _ids(tokenizer, [text])[0], list(tokenizer(text, verbose=False)["input_ids"])
    if not bare:  # an empty prompt: only the name of the token tells whether it stands before or behind
        return special[:1] if special[:1] == [tokenizer.bos_token_id] else []
    for start in range(len(special) - len(bare) + 1):
        if special[start : start + len(bare)] == bare:
            return special[:start]
    return []


def _fit_left(tokenizer: Tokenizer, ids: list[int], num_lead: int, room: int) -> list[int]:
    """Cut ids on the left to ``room`` tokens, keeping the special tokens before them (a template's BOS too)."""
    if len(ids) <= room:
        return ids
    if not num_lead and ids[0] == tokenizer.bos_token_id:
        num_lead = 1
    num_lead = min(num_lead, room)
    return ids[:num_lead] + ids[len(ids) - (room - num_lead) :]
