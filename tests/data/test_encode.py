"""Token ids by hand: the boundary of prompt and completion, what is supervised, what is cut."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from taso_ds.data.encode import (
    EncodedRow,
    encode_completions,
    encode_options,
    encode_prompt,
    pad_token_id,
)
from taso_ds.data.encode_texts import encode_texts
from taso_ds.data.tasks import Example
from taso_ds.errors import UserError

Make = Callable[..., Any]

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")  # ids 0 to 3
CHARACTERS = "abcdefghijklmnopqrstuvwxyz .:?\nABC0123456789"  # ids from 4 on: a = 4, b = 5, ...
MERGED = ("xy", "zz")  # the ids after the characters
BOS, EOS, XY = 1, 2, len(SPECIAL) + len(CHARACTERS)
MASK = -100


def char_ids(text: str) -> list[int]:
    """The ids of a text, written out from the table above (no merges)."""
    return [len(SPECIAL) + CHARACTERS.index(character) for character in text]


@pytest.fixture
def make_tokenizer() -> Make:
    """Return a builder of a character tokenizer that also merges "xy" and "zz"."""

    def make(*, before: str = "<s>", behind: str = "", types: bool = False, **special: Any) -> Any:
        names = [*SPECIAL, *CHARACTERS, *MERGED]
        vocab = {name: index for index, name in enumerate(names)}
        tokenizer = Tokenizer(models.BPE(vocab, [("x", "y"), ("z", "z")], unk_token="<unk>"))
        single = [*before.split(), "$A", *behind.split()]
        pair = [*single, "$B:1", *(f"{name}:1" for name in behind.split())]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
        tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | special
        inputs = ["input_ids", "token_type_ids", "attention_mask"] if types else ["input_ids", "attention_mask"]
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            model_input_names=inputs,
            **{name: token for name, token in tokens.items() if token is not None},
        )

    return make


def encode_completion(tokenizer: Any, prompt: str, completion: str, **settings: Any) -> EncodedRow:
    return encode_completions(tokenizer, [Example(prompt, completion)], source="mine", **settings)[0]


def options(**changes: Any) -> dict[str, Any]:
    return {"max_seq_length": 64, "append_eos": False} | changes


def test_prompt_is_masked_and_completion_supervised(make_tokenizer: Make) -> None:
    row = encode_completion(make_tokenizer(), "ab:", " c", **options())
    assert row == EncodedRow([BOS, *char_ids("ab: c")], [MASK] * 4 + char_ids(" c"))
    assert row.num_supervised == 2


def test_eos_is_appended_once_when_asked(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    assert encode_completion(tokenizer, "a", "b", **options(append_eos=True)).labels[-2:] == [*char_ids("b"), EOS]
    assert encode_completion(tokenizer, "a", "b</s>", **options(append_eos=True)).labels[-2:] == [*char_ids("b"), EOS]
    assert encode_completion(tokenizer, "a", "b", **options()).labels[-1:] == char_ids("b")


def test_a_merge_across_the_boundary_does_not_change_the_prompt(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    assert tokenizer("axy").input_ids == [BOS, *char_ids("a"), XY]  # so the text as a whole would lose the prompt's x
    row = encode_completion(tokenizer, "ax", "yb", **options())
    assert row == EncodedRow([BOS, *char_ids("axyb")], [MASK] * 3 + char_ids("yb"))
    inside = encode_completion(tokenizer, "a", "xy", **options())
    assert inside.labels == [MASK, MASK, XY]


def test_special_tokens_behind_a_text_do_not_end_the_prompt(make_tokenizer: Make) -> None:
    row = encode_completion(make_tokenizer(behind="</s>"), "a", "b", **options())
    assert row.input_ids == [BOS, *char_ids("ab")]
    assert encode_completion(make_tokenizer(before=""), "a", "b", **options()).input_ids == char_ids("ab")


def test_an_empty_prompt(make_tokenizer: Make) -> None:
    row = encode_completion(make_tokenizer(), "", "ab", **options())
    assert (row.labels, row.num_supervised) == ([MASK, *char_ids("ab")], 2)
    # Without BOS the first token has nothing before it: it is labelled, but predicted by nothing.
    row = encode_completion(make_tokenizer(before=""), "", "ab", **options())
    assert (row.labels, row.num_supervised) == (char_ids("ab"), 1)
    with pytest.raises(UserError, match="no token of the completion is left to supervise"):
        encode_completion(make_tokenizer(before=""), "", "a", **options())


def test_the_prompt_is_cut_on_the_left_behind_bos(make_tokenizer: Make) -> None:
    row = encode_completion(make_tokenizer(), "abcdef", " gh", **options(max_seq_length=6))
    assert row == EncodedRow([BOS, *char_ids("ef gh")], [MASK] * 3 + char_ids(" gh"))
    bare = encode_completion(make_tokenizer(before=""), "abcdef", " gh", **options(max_seq_length=6))
    assert bare.input_ids == char_ids("def gh")


def test_only_a_completion_too_long_alone_is_cut(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    fits = encode_completion(tokenizer, "abc", "defg", **options(max_seq_length=5))
    assert fits.input_ids == [BOS, *char_ids("defg")]
    cut = encode_completion(tokenizer, "abc", "defgh", **options(max_seq_length=5, append_eos=True))
    assert cut.input_ids == [BOS, *char_ids("defg")]  # no EOS: the text does not end here
    with pytest.raises(UserError, match="max_seq_length must be at least 2"):
        encode_completion(tokenizer, "abc", "d", **options(max_seq_length=1))


@pytest.mark.parametrize("length", range(2, 12))
def test_no_length_is_exceeded(make_tokenizer: Make, length: int) -> None:
    for before in ("<s>", "", "<s> <s>"):  # none, one or two special tokens before a text
        tokenizer = make_tokenizer(before=before)
        row = encode_completion(tokenizer, "abcdef", "ghi", **options(max_seq_length=length, append_eos=True))
        whole = len(before.split()) + 6 + 3 + 1
        assert len(row.input_ids) == len(row.labels) == min(whole, length)
        assert row.labels[0] == MASK
        assert len(encode_prompt(tokenizer, "abcdef", max_seq_length=length).input_ids) == min(whole - 4, length)


def test_chat_template(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        encode_completion(tokenizer, "a", " b", **options(use_chat_template=True))
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}.{% endfor %}"
        "{% if add_generation_prompt %}bot:{% endif %}"
    )
    row = encode_completion(tokenizer, "a", " b", **options(use_chat_template=True))
    # One BOS, the template's own; the completion follows without its blank.
    assert row.input_ids == [BOS, *char_ids("user:a.bot:b")]
    assert row.labels == [MASK] * 12 + char_ids("b")
    assert encode_prompt(tokenizer, "a", max_seq_length=64, use_chat_template=True).input_ids == row.input_ids[:-1]
    cut = encode_completion(tokenizer, "a", " b", **options(use_chat_template=True, max_seq_length=4))
    assert cut.input_ids == [BOS, *char_ids("t:b")]


def test_prompt_alone(make_tokenizer: Make) -> None:
    row = encode_prompt(make_tokenizer(behind="</s>"), "abc", max_seq_length=3)
    assert row == EncodedRow([BOS, *char_ids("bc")], [MASK] * 3)
    assert row.num_supervised == 0
    with pytest.raises(UserError, match="the prompt is empty"):
        encode_prompt(make_tokenizer(before=""), "", max_seq_length=3)


# Rows of a task ------------------------------------------------------------------------------------------


def encode(tokenizer: Any, *examples: Example, **changes: Any) -> list[EncodedRow]:
    settings = {"source": "mine.jsonl"} | options(append_eos=True) | changes
    return encode_completions(tokenizer, examples, **settings)


def encode_for_head(tokenizer: Any, *examples: Example, **changes: Any) -> list[EncodedRow]:
    settings: dict[str, Any] = {"max_seq_length": 64, "is_regression": False, "source": "mine.jsonl"} | changes
    return encode_texts(tokenizer, examples, **settings)


def test_a_tokenizer_without_an_eos_is_refused(make_tokenizer: Make) -> None:
    with pytest.raises(UserError, match=r"^the tokenizer has no EOS token.* eos_token in tokenizer_config\.json"):
        encode(make_tokenizer(eos_token=None), Example("a", " b"))


def test_rows_equal_those_encoded_one_by_one(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    examples = [Example(prompt, completion) for prompt in ("", "ax", "abc d") for completion in ("yb", " c", "zz")]
    rows = encode(tokenizer, *examples)
    single = options(append_eos=True)
    assert rows == [encode_completion(tokenizer, each.prompt, each.completion, **single) for each in examples]
    assert encode(tokenizer) == []


def test_options_are_encoded_behind_their_prompt_without_an_end(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    examples = [Example("a", " b", (" b", " xy")), Example("ax", "yb", ("yb", " c", "zz"))]
    rows = encode_options(tokenizer, examples, max_seq_length=64)
    assert rows == [
        [encode_completion(tokenizer, one.prompt, option, **options()) for option in one.options] for one in examples
    ]


def test_the_row_at_fault_is_named(make_tokenizer: Make) -> None:
    good, empty = Example("a", " b"), Example("a", "  ")
    with pytest.raises(UserError, match=r"^mine\.jsonl, row 2: the completion is empty"):
        encode(make_tokenizer(), good, empty)
    with pytest.raises(UserError, match=r"^mine\.jsonl, row 7: the completion is empty"):
        encode(make_tokenizer(), good, replace(empty, place=7))
    with pytest.raises(UserError, match=r"^mine\.jsonl, row 1: .*one or two texts, but the row has none"):
        encode_for_head(make_tokenizer(), Example("a", " b", target=1))


def test_cuts_are_counted_in_one_warning(make_tokenizer: Make, caplog: pytest.LogCaptureFixture) -> None:
    examples = [Example("abcdef", "gh"), Example("a", "b"), Example("a", "bcdefgh"), Example("abcdef", "g")]
    with caplog.at_level(logging.WARNING):
        encode(make_tokenizer(), *examples, append_eos=False, max_seq_length=6)
    # "abcdefgh", "abcdefg" and, to keep one token before "bcdef", BOS + "a": three prompts; "bcdefgh": one completion.
    (record,) = caplog.records
    text = "mine.jsonl: of 4 rows, 3 had their prompt and 1 their completion cut to fit max_seq_length 6"
    assert record.getMessage() == text
    caplog.clear()
    encode(make_tokenizer(), *examples, append_eos=False)
    assert not caplog.records


# Classification heads ------------------------------------------------------------------------------------


def test_pair_keeps_token_types(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(behind="</s>", types=True)
    (row,) = encode_for_head(tokenizer, Example("", "", target=1, texts=("ab", "c")))
    ids = [BOS, *char_ids("ab"), EOS, *char_ids("c"), EOS]
    assert row == EncodedRow(ids, [], 1, token_type_ids=[0, 0, 0, 0, 1, 1])
    assert row.num_supervised == 1
    (single,) = encode_for_head(make_tokenizer(), Example("", "", target=0.5, texts=("ab",)), is_regression=True)
    assert single == EncodedRow([BOS, *char_ids("ab")], [], 0.5)


def test_of_a_pair_the_longer_text_is_cut(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(behind="</s>", types=True)
    (row,) = encode_for_head(tokenizer, Example("", "", target=1, texts=("abcdefgh", "c")), max_seq_length=7)
    assert row.input_ids == [BOS, *char_ids("abc"), EOS, *char_ids("c"), EOS]
    assert row.token_type_ids == [0, 0, 0, 0, 0, 1, 1]


def test_head_rows_carry_targets(make_tokenizer: Make, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer()
    (row,) = encode_for_head(tokenizer, Example("", "", target=1, texts=("a", "b")))
    assert (row.target, row.labels) == (1, [])
    score = Example("", "", target=2.5, texts=("abcdef", "b"))
    (row,) = encode_for_head(tokenizer, score, is_regression=True, max_seq_length=4)
    assert (row.target, len(row.input_ids)) == (2.5, 4)
    assert "of 1 rows, 1 had their prompt" in caplog.text


def test_pad_token(make_tokenizer: Make) -> None:
    names: dict[str, Any] = {"pad_token": None, "eos_token": None, "unk_token": None}
    assert pad_token_id(make_tokenizer()) == 0
    assert pad_token_id(make_tokenizer(pad_token="</s>")) == EOS
    assert pad_token_id(make_tokenizer(pad_token=None)) == EOS
    assert pad_token_id(make_tokenizer(**names | {"unk_token": "<unk>"})) == 3
    assert pad_token_id(make_tokenizer(**names)) == 0
