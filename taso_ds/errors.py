"""The one exception a user is meant to read: it names the thing at fault and the remedy, in one line."""


class UserError(ValueError):
    """Something the user can fix: a flag, a file, a folder or a row. Launch scripts print it without a traceback."""


def nearest(word: str, known: "list[str] | tuple[str, ...]") -> str:
    """Return `` (nearest: 'x')`` for the closest known name, or an empty string when none is close."""
    import difflib

    match = difflib.get_close_matches(word, list(known), n=1)
    return f" (nearest: {match[0]!r})" if match else ""
