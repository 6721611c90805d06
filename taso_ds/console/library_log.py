"""A file with what libraries say: all that Python code prints, and all that compiled code and child processes write.

The file lies in the temporary folder until the run has a folder. On a full disk only what is said is lost, not the run.
"""

import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from typing_extensions import Buffer

_STDOUT, _STDERR = 1, 2


class LibraryLog:
    """Leads both standard streams into the file, from its making until ``close``; ``out`` and ``err`` stay outside.

    Attributes:
        path: where the file is now.
        is_kept: whether it stays when the process ends.
        out: a stream to where stdout led before.
        err: a stream to where stderr led before.
        stream: a stream into the file.

    Raises:
        OSError: there is no room for a file, or no stdout.
    """

    def __init__(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._streams = sys.stdout, sys.stderr
        self._before = [os.dup(_STDOUT), os.dup(_STDERR)]
        self._file, name = tempfile.mkstemp(prefix="taso-log-", suffix=".txt")
        self.path, self.is_kept = Path(name), False
        self.out = _outside(sys.stdout, _STDOUT, self._before[0])
        self.err = _outside(sys.stderr, _STDERR, self._before[1])
        self._raw = _Unfailing(self._file)
        self.stream: TextIO = io.TextIOWrapper(
            io.BufferedWriter(self._raw), encoding="utf-8", errors="backslashreplace", line_buffering=True
        )
        self._lead_to(self._file)
        sys.stdout = sys.stderr = self.stream

    def move(self, path: Path) -> None:
        """Append the file to ``path``, remove it, and go on there. Where that is impossible, it stays where it is."""
        if self.path == path:
            return
        self.stream.flush()
        try:
            file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o666)
        except OSError:
            return  # whatever made this impossible ends the run with a line of its own, or does no harm
        _Unfailing(file).write(self.path.read_bytes())
        os.dup2(file, self._file)
        os.close(file)
        self._lead_to(self._file)
        self.path.unlink()
        self.path, self.is_kept = path, True

    def last_lines(self, number: int) -> list[str]:
        """Return the last lines of the file; of a line that was written over, what stood there last."""
        self.stream.flush()
        lines = self.path.read_text(encoding="utf-8", errors="backslashreplace").splitlines()
        return [line.rpartition("\r")[2].rstrip() for line in lines[-number:]]

    def close(self) -> None:
        """Let the standard streams lead where they led before, and remove the file unless it is kept."""
        if not self._before:
            return
        self.stream.flush()
        self.out.flush()
        self.err.flush()
        sys.stdout, sys.stderr = self._streams
        for descriptor, before in zip((_STDOUT, _STDERR), self._before, strict=True):
            os.dup2(before, descriptor)
            os.close(before)
        self._before = []
        self._raw.descriptor = _STDERR  # for a library that has kept the stream
        os.close(self._file)
        if not self.is_kept:
            self.path.unlink(missing_ok=True)

    def _lead_to(self, file: int) -> None:
        os.dup2(file, _STDOUT)
        os.dup2(file, _STDERR)


class _Unfailing(io.RawIOBase):
    """Writes to a descriptor, and drops what finds no room there: a library would take that for an error of its own."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def write(self, data: "Buffer", /) -> int:
        with contextlib.suppress(OSError):
            os.write(self.descriptor, data)
        return memoryview(data).nbytes


def _outside(stream: TextIO, descriptor: int, copy: int) -> TextIO:
    """Return a stream that goes on writing to where ``stream`` writes now.

    Args:
        descriptor: the standard one that is about to lead elsewhere.
        copy: a copy of it. A stream that does not write to ``descriptor`` is returned as it is.
    """
    try:
        if stream.fileno() != descriptor:
            return stream
    except OSError:  # no file of the system
        return stream
    return open(copy, "w", buffering=1, encoding=stream.encoding, errors=stream.errors, closefd=False)
