"""The table of docs/models.md from the rows that ``support.py`` found."""

CELLS = {}


def render(rows):  # type: ignore[no-untyped-def]
    return ""
