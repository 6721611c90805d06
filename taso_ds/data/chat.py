r"""Chat templates: the prompt that a server renders, and the answer behind it up to the token that ends the turn.

The template knows how a turn ends. The tokenizer need not know: Gemma's has an EOS that no conversation holds. So the
answer is read off the whole conversation: it is what stands behind the server's prompt.

    prompt    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n          not supervised
    opening   (nothing; a blank in Llama 2, an empty <think> block in Qwen 3)   supervised: the model has to say it
    content   Hello<|im_end|>                                                  supervised, up to the end of the turn
    rest      \n                                                               left out
"""

from dataclasses import dataclass
from itertools import takewhile

from taso_ds.data.chat_template import render, without_blanks
from taso_ds.data.tokenizer import Tokenizer
from taso_ds.errors import UserError

_QUESTION, _ANSWER = "probe question", "probe answer"


@dataclass(frozen=True)
class Chat:
    r"""How a tokenizer's template writes the assistant's turn.

    Attributes:
        supplied: what the server's prompt says in the model's place, and the conversation does not ("<think>\n").
        opening: what the conversation holds between the server's prompt and the content.
        closing: what it holds between the content and the end of the turn, with that end; empty where there is none.
        tail: all that it holds behind the content of a last turn.
        end_id: the token that ends a turn; the tokenizer's EOS where the template ends no turn.
    """

    tokenizer: Tokenizer
    supplied: str
    opening: str
    closing: str
    tail: str
    end_id: int | None

    def texts(self, prompt: str, completion: str) -> tuple[str, str]:
        """Return the prompt as a server renders it, and what the model should say to it before the end of its turn.

        The template makes the answer of the completion. Where it drops a part of the completion (the thoughts of past
        turns), the completion stays as written.
        """
        content = completion.removeprefix(" ")  # the blank divides it from a bare prompt
        if self.end_id is not None:
            content = content.removesuffix(self.tokenizer.convert_ids_to_tokens(self.end_id))
        unsaid = content.removeprefix(self.supplied if content.startswith(self.supplied) else self.supplied.strip())
        served, whole = chat_prompt(self.tokenizer, prompt), _conversation(self.tokenizer, prompt, content)
        if whole.startswith(served) and whole.endswith(self.tail):
            said = whole[len(served) : len(whole) - len(self.tail)]
            if without_blanks(said).endswith(without_blanks(unsaid)):
                return served, said
        return served, unsaid


def read_chat(tokenizer: Tokenizer) -> Chat:
    """Find out how the tokenizer's template writes a turn, from a conversation with a known answer.

    Raises:
        UserError: there is no template, or it leaves out what the assistant says.
    """
    served, whole = chat_prompt(tokenizer, _QUESTION), _conversation(tokenizer, _QUESTION, _ANSWER)
    before, found, tail = whole.rpartition(_ANSWER)
    if not found:
        raise UserError("the chat template leaves out what the assistant says: there is nothing to learn from it")
    end = _first_marker(tokenizer, tail)
    if end is None:
        closing, end_id = "", tokenizer.eos_token_id
    else:
        text = tokenizer.convert_ids_to_tokens(end)
        closing, end_id = tail[: tail.index(text) + len(text)], end
    return Chat(
        tokenizer,
        supplied=served[_shared_start(served, whole) :],
        opening=before.removeprefix(served) if before.startswith(served) else "",
        closing=closing,
        tail=tail,
        end_id=end_id,
    )


def chat_prompt(tokenizer: Tokenizer, prompt: str) -> str:
    """Return the text that a server makes of one user's message."""
    return render(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)


def _conversation(tokenizer: Tokenizer, prompt: str, content: str) -> str:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": content}]
    return render(tokenizer, messages, add_generation_prompt=False)


def _first_marker(tokenizer: Tokenizer, text: str) -> int | None:
    """Return the first token that is more than text: a special one, or one that was added to the vocabulary."""
    markers = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} - {tokenizer.unk_token_id}
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        if token in markers and tokenizer.convert_ids_to_tokens(token).strip():  # Gemma has added line ends
            return int(token)
    return None


def _shared_start(first: str, second: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
