"""How a script ends if not well: the one exception that a user is meant to read, and those that are about the run."""

import os
from pathlib import Path


class UserError(ValueError):
    """Something the user can fix: a flag, a file, a folder or a row. Launch scripts print it without a traceback."""


class LibraryError(UserError):
    """A part of a library does not work on this machine; its own words are shown with the line."""


class Interrupted(BaseException):
    """The run was asked to stop, by a signal say, and is saved. Started again, it goes on.

    It is no ``Exception``, or a library that tries to import another one could swallow it.

    Attributes:
        code: exit code of the process. 75 is EX_TEMPFAIL of sysexits.h: not an error, start me again.
    """

    def __init__(self, reason: str, code: int = 75) -> None:
        super().__init__(reason)
        self.code = code


class Unforeseen(Exception):
    """Carries an error that nobody foresaw, its cause, out of a run.

    Attributes:
        folder: where the traceback may lie; None for nowhere in particular.
    """

    def __init__(self, folder: Path | None) -> None:
        super().__init__(folder)
        self.folder = folder


def speaks_for_all() -> bool:
    """Say whether this process tells the user: rank 0, or any whose rank no launcher can have given."""
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    return not (rank.isdecimal() and size.isdecimal() and 0 < int(rank) < int(size))


def nearest(word: str, known: "list[str] | tuple[str, ...]") -> str:
    """Return `` (nearest: 'x')`` for the closest known name, or an empty string when none is close.

    A name that begins with the word is closer than any other.
    """
    import difflib

    longer = [name for name in known if len(word) > 2 and name.startswith(word)]
    match = longer or difflib.get_close_matches(word, list(known), n=1)
    return f" (nearest: {match[0]!r})" if match else ""


def dangling(path: "str | os.PathLike[str]") -> str | None:
    """Say where a link leads whose end does not exist; None for any other path."""
    if os.path.islink(path) and not os.path.exists(path):
        return f"a link to {os.readlink(path)}, which does not exist"
    return None


def reason(error: Exception) -> str:
    """Return why a file cannot be read, without Python's error numbers and quotes; for a link, where it leads."""
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 text (byte {error.object[error.start]:#x} at {error.start}): save it as UTF-8"
    if not isinstance(error, OSError):
        return str(error)
    return dangling(str(error.filename)) or error.strerror or str(error)


def no_permission(error: BaseException) -> UserError | None:
    """Return the error for the user if a file is not open to them; None for any other error.

    The first look at any flag's path, in any library, may raise it.
    """
    if not isinstance(error, PermissionError) or error.filename is None:
        return None
    refusal = UserError(
        f"cannot reach {error.filename} ({error.strerror}): name another path, or have it and its folders opened to you"
    )
    refusal.__cause__ = error  # for --debug
    return refusal
