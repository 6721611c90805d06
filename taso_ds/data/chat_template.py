"""Runs chat templates. A template is a program that came with the tokenizer; its faults are told in one line."""

from collections.abc import Sequence

from taso_ds.data.tokenizer import Tokenizer
from taso_ds.errors import UserError

_FILE = "<template>"  # what jinja calls a template that is no file


def render(tokenizer: Tokenizer, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool) -> str:
    """Return the text that the tokenizer's chat template makes of a conversation.

    Args:
        messages: each with a "role" and a "content"; the first is the user's.
        add_generation_prompt: whether the text ends where the assistant is to go on.

    Raises:
        UserError: there is no template, it does not parse or raises, or it leaves out what the user says.
    """
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template: drop use_chat_template or use an instruction model")
    asked = messages[0]["content"]
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=add_generation_prompt, tokenize=False
        )
    except Exception as error:  # of jinja, or whatever the template's expressions run into
        raise UserError(f"{_title(tokenizer)}, line {_line(error)}: {error} (at the prompt {_start(asked)})") from error
    if without_blanks(asked) not in without_blanks(text):
        raise UserError(f"{_title(tokenizer)} leaves out the prompt {_start(asked)}: correct it, or drop the flag")
    return text


def _title(tokenizer: Tokenizer) -> str:
    return f"use_chat_template: the chat template of {tokenizer.name_or_path or 'the tokenizer'}"


def _line(error: Exception) -> int | str:
    """Return the line of the template at which an error arose, or at which the template does not parse."""
    line: int | str = getattr(error, "lineno", None) or "unknown"
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == _FILE:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _start(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}…")


def without_blanks(text: str) -> str:
    """Return a text without its white space, which templates trim and add as they like."""
    return "".join(text.split())
