"""Templates of several families in short form: the server's prompt, what is supervised behind it, where it stops."""

import logging
from typing import Any

import pytest
import tiny_models

from taso_ds.data.chat import read_chat
from taso_ds.data.decode import answer_reader
from taso_ds.data.encode import EncodedRow, encode_completions, encode_options, encode_prompt
from taso_ds.data.tasks import Example
from taso_ds.errors import UserError

# Tokens of other families' vocabularies; those of the last line are added ones without being special.
MARKERS = (
    *("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>"),
    *("<end_of_turn>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>", "<|channel|>", "<|message|>"),
    *("<|return|>", "<|start|>"),
)
PLAIN_MARKERS = ("<think>", "</think>", "<extra_end>", "\n\n")


def template(turn: str, server: str = "", *, before: str = "", otherwise: str = "") -> str:
    """Write each turn ``m``, then what a server adds to let the model speak, or ``otherwise``."""
    end = "{% if add_generation_prompt %}" + server + "{% else %}" + otherwise + "{% endif %}"
    return before + "{% for m in messages %}" + turn + "{% endfor %}" + end


def by_role(user: str, assistant: str) -> str:
    return "{% if m.role == 'user' %}" + user + "{% else %}" + assistant + "{% endif %}"


THOUGHTS = (
    "<|im_start|>assistant\n{% set ns = namespace(thoughts='', answer=m.content) %}{% if '</think>' in m.content %}"
    "{% set ns.thoughts = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set ns.answer = m.content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<think>\n{{ ns.thoughts }}\n</think>\n\n{{ ns.answer }}<|im_end|>\n"
)
FAMILIES = {
    "chatml": template("<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n", "<|im_start|>assistant\n"),
    "dated system, trimmed": template(
        "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        before="{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday: 1 May<|eot_id|>",
    ),
    "gemma": template(
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n",
        "<start_of_turn>model\n",
        before="{{ bos_token }}",
    ),
    "blanks around the answer": template(
        by_role("[INST] {{ m.content }} [/INST]", " {{ m.content }} {{ eos_token }}"), before="{{ bos_token }}"
    ),
    "no blank before EOS": template(
        by_role("[INST] {{ m.content }}[/INST]", " {{ m.content }}{{ eos_token }}"), before="{{ bos_token }}"
    ),
    "EOS behind the end of a turn": template(
        "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n", "<|assistant|>\n", otherwise="<|endoftext|>"
    ),
    "empty thoughts": template(
        by_role("<|im_start|>user\n{{ m.content }}<|im_end|>\n", THOUGHTS), "<|im_start|>assistant\n"
    ),
    "channels": template(
        by_role(
            "<|start|>user<|message|>{{ m.content }}<|end|>",
            "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>",
        ),
        "<|start|>assistant",
    ),
    "an end that is not special": template("{{ m.role }}: {{ m.content }}<extra_end>\n", "assistant: "),
}
CUTS_THOUGHTS = template(
    by_role("<|user|>{{ m.content }}", "<|assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}"),
    "<|assistant|><think>\n",
    before="{{ bos_token }}",
)
SUPERVISED = {  # of the completion " Yes."
    "chatml": "Yes.<|im_end|>",
    "dated system, trimmed": "Yes.<|eot_id|>",
    "gemma": "Yes.<end_of_turn>",
    "blanks around the answer": " Yes. </s>",
    "no blank before EOS": " Yes.</s>",
    "EOS behind the end of a turn": "Yes.<|end|>",
    "empty thoughts": "<think>\n\n</think>\n\nYes.<|im_end|>",
    "channels": "<|channel|>final<|message|>Yes.<|return|>",
    "an end that is not special": "Yes.<extra_end>",
}
COMPLETIONS = (
    " Yes.",
    "Yes.",
    "\t Yes.\n\n",
    "two\nlines ",
    "<think>\nHm.\n</think>\n\nYes.",
    "<think>Hm.</think>Yes.",
)


def tokenizer_of(template: str) -> Any:
    tokenizer = tiny_models.byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKERS)})
    tokenizer.add_tokens(list(PLAIN_MARKERS))
    tokenizer.chat_template = template
    return tokenizer


def encoded(tokenizer: Any, completion: str) -> EncodedRow:
    return encode_completions(
        tokenizer, [Example("Is it?", completion)], max_seq_length=512, append_eos=True, use_chat_template=True,
        source="mine",
    )[0]  # fmt: skip


def supervised(row: EncodedRow, tokenizer: Any) -> str:
    return str(tokenizer.decode([label for label in row.labels if label != -100]))


def rendered(tokenizer: Any, *contents: str) -> list[int]:
    """The ids of a conversation, or of the server's prompt where the user alone has spoken."""
    roles = ("user", "assistant")
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=len(messages) == 1, return_dict=False)
    return list(asked)


families = pytest.mark.parametrize("family", FAMILIES)


@families
def test_the_templates_own_end_of_turn_is_supervised_and_nothing_behind_it(family: str) -> None:
    tokenizer = tokenizer_of(FAMILIES[family])
    assert supervised(encoded(tokenizer, " Yes."), tokenizer) == SUPERVISED[family]


@families
@pytest.mark.parametrize("completion", COMPLETIONS)
def test_a_row_is_the_servers_prompt_and_the_beginning_of_the_conversation(family: str, completion: str) -> None:
    tokenizer = tokenizer_of(FAMILIES[family])
    row, prompt = encoded(tokenizer, completion), rendered(tokenizer, "Is it?")
    whole = rendered(tokenizer, "Is it?", completion.removeprefix(" "))
    assert encode_prompt(tokenizer, "Is it?", max_seq_length=512, use_chat_template=True).input_ids == prompt
    assert row.input_ids == whole[: len(row.input_ids)]
    assert row.labels == [-100] * len(prompt) + row.input_ids[len(prompt) :]
    assert row.input_ids[-1] == read_chat(tokenizer).end_id
    assert tokenizer.decode(whole[len(row.input_ids) :], skip_special_tokens=True).strip() == ""  # nothing is missing


@families
def test_an_end_that_the_completion_brings_is_not_doubled(family: str) -> None:
    tokenizer = tokenizer_of(FAMILIES[family])
    end = tokenizer.convert_ids_to_tokens(read_chat(tokenizer).end_id)
    assert encoded(tokenizer, f"Yes.{end}") == encoded(tokenizer, "Yes.")


def test_thoughts_that_a_template_cuts_or_begins_stay_as_they_are_written() -> None:
    tokenizer = tokenizer_of(CUTS_THOUGHTS)
    prompt = "<s><|user|>Is it?<|assistant|><think>\n"
    for completion in ("Hm.\n</think>\nYes.", "<think>\nHm.\n</think>\nYes."):  # the prompt begins the thoughts
        row = encoded(tokenizer, completion)
        assert tokenizer.decode(row.input_ids) == f"{prompt}Hm.\n</think>\nYes.</s>"
        assert supervised(row, tokenizer) == "Hm.\n</think>\nYes.</s>"


@pytest.mark.parametrize("behind", ["", "\n\n", ". "])
def test_a_template_without_an_end_of_turn_is_ended_by_eos_and_says_so(
    behind: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = tokenizer_of(template("{{ m.role }}: {{ m.content }}" + behind, "assistant: "))
    with caplog.at_level(logging.INFO):
        assert supervised(encoded(tokenizer, "Yes."), tokenizer) == "Yes.</s>"
    assert caplog.messages == ["the chat template ends no turn with a token of its own: rows end with </s>"]
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        encoded(tokenizer, "Yes.")


@families
def test_an_option_has_no_end(family: str) -> None:
    tokenizer = tokenizer_of(FAMILIES[family])
    asked = Example("Is it?", " Yes.", (" Yes.",))
    ((row,),) = encode_options(tokenizer, [asked], max_seq_length=512, use_chat_template=True)
    end = tokenizer.convert_ids_to_tokens(read_chat(tokenizer).end_id)
    assert supervised(row, tokenizer) == SUPERVISED[family].removesuffix(end).removesuffix(" ")


def test_an_empty_completion_is_empty_whatever_the_template_adds() -> None:
    with pytest.raises(UserError, match=r"^mine, row 1: the completion is empty"):
        encoded(tokenizer_of(FAMILIES["empty thoughts"]), " ")


def test_a_template_that_leaves_the_answer_out_is_refused() -> None:
    with pytest.raises(UserError, match="leaves out what the assistant says"):
        encoded(tokenizer_of(template(by_role("{{ m.content }}", ""))), "Yes.")


@families
def test_what_was_trained_is_read_back(family: str) -> None:
    tokenizer = tokenizer_of(FAMILIES[family])
    reader = answer_reader(tokenizer, use_chat_template=True)
    row = encoded(tokenizer, "two words")
    answer = [label for label in row.labels if label != -100]
    stops = reader.stops(tokenizer.eos_token_id)
    assert answer[-1] in stops
    assert reader.read([*answer, *tokenizer("and on").input_ids], stops).strip() == "two words"
    assert reader.read(answer[:-1], stops).strip() == "two words"  # cut by max_new_tokens


def test_stops_are_the_models_own_and_the_end_of_a_row() -> None:
    reader = answer_reader(tiny_models.byte_tokenizer(), use_chat_template=False)
    assert reader.stops(None) == [2]
    assert reader.stops(2) == [2]
    assert reader.stops([7, 5]) == [2, 5, 7]
