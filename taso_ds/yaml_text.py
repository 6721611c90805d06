"""YAML that a user wrote, read strictly: a flat mapping in which every value stands once and costs what it says."""

from collections import Counter
from typing import Any

import yaml

from taso_ds.errors import UserError

_DEEPEST = 8  # a list of values stands 2 deep; PyYAML's time grows with the square of the depth


def parse_yaml(text: str, source: str) -> dict[Any, Any]:
    """Return the mapping a YAML text holds.

    Args:
        source: what to call the text in errors.

    Raises:
        UserError: malformed, not a mapping, a key given twice, or values that are nested or refer to one another.
    """
    try:
        _check_plain(text, source)
        values = yaml.safe_load(text)
    except UserError:
        raise
    except (ValueError, LookupError, AttributeError, RecursionError, yaml.YAMLError) as error:
        # The library meets dates, numbers and tags it cannot make sense of with errors of Python's own.
        raise UserError(f"{source}: not readable YAML: {' '.join(str(error).split())}") from error
    if values is None:
        raise UserError(f"{source} is empty: write one `name: value` a line, or leave it out")
    if not isinstance(values, dict):
        raise UserError(f"{source} is not a mapping of names to values")
    return values


def _check_plain(text: str, source: str) -> None:
    """Refuse what costs more than it says, nested brackets and aliases, and a key given twice: YAML keeps the last."""
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
