"""Writing files whole or not at all, with errors a user can act on."""

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from taso_ds.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name to write to. The file becomes ``path`` when all is written, and is removed otherwise.

    It gets the permissions that the user's umask gives new files: safetensors makes its own readable by the owner only.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    if os.path.isdir(path):  # False, too, where nobody may look
        raise UserError(f"cannot write {path}: it is a folder; name a file")
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            temporary.unlink(missing_ok=True)  # what a killed run left
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to write to. It becomes ``path`` when all is written, and is removed otherwise.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with writing(path):
        try:
            temporary.mkdir()
            yield temporary
            open_to_umask(temporary)
            shutil.rmtree(path, ignore_errors=True)
            os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the refusal of a disk or a file system while ``path`` is written into a ``UserError``."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path} ({reason}): make room there, or choose another folder") from error


def open_to_umask(folder: Path) -> None:
    """Give every file below a folder the permissions to read and write that the folder itself got from the umask."""
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def write_json(path: Path, value: object) -> None:
    """Write JSON, whole or not at all; UserError when it cannot be written."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_flushed(path: Path, text: str) -> None:
    """Write a text under its own name and wait until it is on the disk; OSError when it cannot be written."""
    path.write_text(text, encoding="utf-8")
    flush(path)


def flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, read in blocks."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()
