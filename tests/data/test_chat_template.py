"""Chat templates that do not parse, raise or ignore what is said: one line that names tokenizer, line and prompt."""

from typing import Any

import pytest
import tiny_models

from taso_ds.data.chat_template import render
from taso_ds.errors import UserError

GOOD = "{% for message in messages %}\n<{{ message.role }}>{{ message.content | trim }}\n{% endfor %}"


def rendered(template: str, prompt: str = "What is that?") -> str:
    tokenizer: Any = tiny_models.byte_tokenizer()
    tokenizer.chat_template, tokenizer.name_or_path = template, "models/tiny"
    return render(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)


def test_a_good_template() -> None:
    assert "<user>What is that?" in rendered(GOOD)
    assert "<user>a\n\nb" in rendered(GOOD, "  a\n\nb \n")
    assert "<user>" in rendered(GOOD, "")


@pytest.mark.parametrize(
    ("template", "words"),
    {
        "{% for message in messages %}\n{{ message.content }": ("line 2", "unexpected '}'"),
        "\n\n{% endfor %}": ("line 3", "endfor"),
        "{% if true %}\nx": ("line 2", "end of template"),
        "\n{{ raise_exception('Only tools, please') }}": ("line 2", "Only tools, please"),
        "{{ messages[0].content }}\n{{ messages[7].content }}": ("line 2", "7"),
        "\n\n{{ messages[0].content + 1 }}": ("line 3", "str"),
        "{{ nothing.at.all }}": ("line 1", "undefined"),
        "{{ messages[0].content | no_such_filter }}": ("line 1", "no_such_filter"),
        "{{ 1 // 0 }}": ("line 1", "zero"),
    }.items(),
)
def test_a_template_that_fails_names_its_line(template: str, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=r"the chat template of models/tiny, line \d") as caught:
        rendered(template)
    for word in (*words, "at the prompt 'What is that?'"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "template",
    ["", "Hello", "{% for message in messages %}<{{ message.role }}>{% endfor %}", "{{ messages | length }}"],
)
def test_a_template_that_ignores_the_prompt_is_refused(template: str) -> None:
    words = "no chat template" if not template else "leaves out the prompt 'What is that?': correct it"
    with pytest.raises(UserError, match=words.replace("?", r"\?")):
        rendered(template)


def test_a_long_prompt_is_named_by_its_start() -> None:
    with pytest.raises(UserError, match=f"'{'x' * 40}…'"):
        rendered("Hello", "x" * 10_000)
