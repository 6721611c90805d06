"""What runs leave, as tests read it."""

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def saved_tensors(run: Path) -> dict[str, bytes]:
    """The bytes of what was trained."""
    folder = next(path for path in (run / "adapter", run / "model") if path.is_dir())
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
