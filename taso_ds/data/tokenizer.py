"""What this package asks of a tokenizer; those of transformers have it."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Tokenizer(Protocol):
    """A tokenizer of transformers, whose special tokens no type checker can see otherwise."""

    @property
    def name_or_path(self) -> str: ...

    @property
    def chat_template(self) -> object:
        """The source of one template, or several by name; nothing where there is none."""

    @property
    def eos_token(self) -> str | None: ...

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def eos_token_id(self) -> int | None: ...

    @property
    def pad_token_id(self) -> int | None: ...

    @property
    def unk_token_id(self) -> int | None: ...

    @property
    def all_special_ids(self) -> list[int]: ...

    @property
    def added_tokens_decoder(self) -> Mapping[int, object]: ...

    def __call__(self, text: str | list[str], text_pair: str | None = None, **options: object) -> Mapping[str, Any]:
        """Return ``input_ids`` and more: of one text a list, of several a list of lists."""

    def convert_ids_to_tokens(self, ids: int) -> str: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, add_generation_prompt: bool, tokenize: bool
    ) -> str: ...
