"""A strict reader of YAML that a user wrote: a flat mapping in which every value stands once, as it is written.

Whoever asks for a value knows what its text means. YAML would make 8 of ``010``, 90 of ``1:30``, 1.1 of ``1.10`` and
false of ``no``.
"""

from collections import Counter
from typing import Any

import yaml

from taso_ds.errors import UserError

_NULL = "tag:yaml.org,2002:null"
_DEEPEST = 8  # a list of values stands 2 deep; PyYAML's time grows with the square of the depth


class _Texts(yaml.SafeLoader):
    """Takes every value but ``null`` for the text that stands there."""


_Texts.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in known if tag == _NULL]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str, source: str) -> dict[Any, object]:
    """Return the mapping that a YAML text holds, with texts, lists and None as its values.

    Args:
        source: what to call the text in errors.

    Raises:
        UserError: malformed, not a mapping, a key given twice, or values that are nested or refer to one another.
    """
    try:
        _check_plain(text, source)
        values = yaml.load(text, _Texts)  # a SafeLoader
    except UserError:
        raise
    except (ValueError, LookupError, AttributeError, RecursionError, yaml.YAMLError) as error:
        # The library meets dates, numbers and tags it cannot make sense of with errors of Python's own.
        raise UserError(f"{source}: not readable YAML: {_reason(error)}") from error
    if values is None:
        raise UserError(f"{source} is empty: write one `name: value` a line, or leave it out")
    if not isinstance(values, dict):
        raise UserError(f"{source} is not a mapping of names to values: write one `name: value` a line")
    return values


def _reason(error: Exception) -> str:
    """Return the place in the text, and what is wrong there."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())


def _check_plain(text: str, source: str) -> None:
    """Refuse nested brackets and aliases, which cost more than they say, and a key given twice: YAML keeps the last."""
    depth = 0
    for event in yaml.parse(text):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise UserError(f"{source} nests values {_DEEPEST} deep: write a value or a list of values")
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"{source} holds the alias *{event.anchor}: write the value itself")
    root = yaml.compose(text)
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    keys = Counter(key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode))
    for key, number in keys.items():
        if number > 1:
            raise UserError(f"{source} has the key {key!r} twice")
