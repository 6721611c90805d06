"""One run in a folder at a time: a lock that opens when its owner is gone, whatever ended it.

It is a record lock on ``.lock``. The kernel drops it with the process, NFS carries it to other nodes through its lock
manager, and no child inherits it, neither by fork nor by exec. The content of the file is for people only: it names the
owner, who removes it at the end. A killed owner leaves the file behind, which means nothing.
"""

import datetime
import errno
import fcntl
import json
import logging
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from taso_ds.errors import UserError
from taso_ds.files.atomic import writing

log = logging.getLogger(__name__)

LOCK = ".lock"
_BYTE = 1 << 20  # the one that is locked: on SMB nobody else could read a locked text
_LOCKED_ELSEWHERE = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux: type, whence, start, length, process


class InUse(UserError):
    """Another process has the folder."""


@contextmanager
def locked(folder: Path, *, new: bool = False) -> Iterator[Path]:
    """Hold the lock of a folder, which is created, and removed again if it stays empty.

    The process must not open ``.lock`` meanwhile: closing it again would give up the lock.

    Args:
        new: whether the folder must not exist yet.

    Raises:
        InUse: another process holds it, or was faster in creating the folder.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir(exist_ok=not new)
        except FileExistsError as error:
            raise InUse(f"run folder {folder}: another run has just created it") from error
    try:
        descriptor = _acquire(folder)
        try:
            yield folder
        finally:
            (folder / LOCK).unlink(missing_ok=True)  # while it is locked: it cannot be that of a successor
            os.close(descriptor)
    finally:
        with suppress(OSError):  # not empty, as it should be
            for path in created:
                path.rmdir()


def holder(folder: Path) -> str | None:
    """Return in words which other process holds the lock of a folder; None for none. Changes nothing."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, _BYTE, 1, 0)
        kind, *_ = struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
        return None if kind == fcntl.F_UNLCK else _owner(descriptor)
    except OSError:  # no locks here
        return None
    finally:
        os.close(descriptor)


def refuse(folder: Path, owner: str) -> InUse:
    """Return the error that names who has the folder."""
    return InUse(f"run folder {folder} is in use by {owner}; wait for its end, or choose another --output_dir")


def _acquire(folder: Path) -> int:
    """Return the descriptor that holds the lock; where a file system knows none, one that does not."""
    path = folder / LOCK
    while True:
        with writing(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _BYTE)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                owner = _owner(descriptor)
                os.close(descriptor)
                if error.errno in _LOCKED_ELSEWHERE:
                    raise refuse(folder, owner) from error
                raise UserError(f"cannot lock {path} ({error.strerror}): choose another --output_dir") from error
            log.warning(
                "run folder: the file system of %s knows no locks (%s): nothing keeps a second run out of it",
                folder,
                error.strerror,
            )
        if _is_at(path, descriptor):
            with suppress(OSError):  # a full disk: the lock holds all the same, namelessly
                _name_owner(descriptor)
            return descriptor
        os.close(descriptor)  # its owner has removed the file between opening and locking


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False


def _name_owner(descriptor: int) -> None:
    started = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    text = json.dumps({"host": socket.gethostname(), "process": os.getpid(), "started": started}) + "\n"
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)
    os.fsync(descriptor)  # so that other nodes can read it


def _owner(descriptor: int) -> str:
    """Return in words who has written the file."""
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {owner['process']} on {owner['host']} since {owner['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"  # which has not come to writing its name, or may not be read
