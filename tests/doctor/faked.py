"""Machines that are not as they should be, for the moment of a test."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def soft_limit(which: int, value: int) -> Iterator[None]:
    """Lower a limit of this process."""
    before, hard = resource.getrlimit(which)
    resource.setrlimit(which, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(which, (before, hard))


def script(path: Path, text: str) -> Path:
    """Write a command."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path
