"""Which version of this package wrote a record: ``run.json``, ``progress.json``."""

from collections.abc import Mapping
from pathlib import Path

from taso_ds.errors import UserError

# Of run.json and progress.json. Those of version 1 do not name it; their paths are as given, wherever that was.
SCHEMA = 2


def check_schema(record: Mapping[str, object], file: Path) -> None:
    """Refuse a record that a newer version has written in another way; UserError names ``file``."""
    schema = record.get("schema_version", 1)
    if not isinstance(schema, int) or schema > SCHEMA:
        raise UserError(
            f"{file}: was written by a newer taso_ds (schema_version {schema!r}, this one reads up to {SCHEMA}):"
            " install that version"
        )
