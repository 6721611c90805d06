"""Which version of this package wrote a record: ``run.json``, ``progress.json``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from taso_ds.errors import UserError

SCHEMA = 2  # of run.json and progress.json. 1, which they do not name: paths are as given, wherever that was


def check_schema(record: Mapping[str, Any], file: Path) -> None:
    """Refuse a record that a newer version has written in another way; UserError."""
    schema = record.get("schema_version", 1)
    if not isinstance(schema, int) or schema > SCHEMA:
        raise UserError(
            f"{file}: was written by a newer taso_ds (schema_version {schema!r}, this one reads up to {SCHEMA}):"
            " install that version"
        )
