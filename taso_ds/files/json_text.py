"""A strict reader of JSON that a user wrote or another program left: one line says what is wrong, nothing is guessed.

Python's own reader keeps the last of two equal keys, takes NaN for a number, and raises errors of several types on
hostile text. Every file of a user's is read here.
"""

import json
from collections import Counter
from typing import Any

from taso_ds.errors import UserError


def parse_json(text: str, source: str, *, constants: bool = False) -> Any:
    """Return the value a JSON text holds.

    Args:
        source: what to call the text in errors.
        constants: whether to take NaN and Infinity, which Python writes although they are not JSON.

    Raises:
        UserError: not JSON, a key given twice in one object, or a value that no text file or number can hold.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = next(key for key, number in Counter(key for key, _ in pairs).items() if number > 1)
            raise UserError(f"{source}: has the key {twice!r} twice in one object")
        return found

    def constant(name: str) -> float:
        if not constants:
            raise UserError(f"{source}: holds {name}, which is not JSON")
        return float(name)

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UserError:
        raise
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.strip() else ""
        raise UserError(f"{source}: not valid JSON: {line}column {error.colno}: {error.msg}") from error
    except UnicodeEncodeError as error:
        raise UserError(f"{source}: holds half a surrogate pair, which is no character: save it as UTF-8") from error
    except (ValueError, RecursionError) as error:  # thousands of digits, thousands of brackets
        raise UserError(f"{source}: not readable JSON: {error}") from error
    return value
