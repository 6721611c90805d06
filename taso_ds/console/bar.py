"""How far something is that takes long: a bar on the console, of the one process that speaks for all."""

from typing import Any

from tqdm import tqdm

from taso_ds.console import screen as console
from taso_ds.errors import speaks_for_all


class Bar(tqdm):
    """A bar of tqdm; libraries that take a class for theirs may take this one."""

    def __init__(self, *args: Any, **options: Any) -> None:
        defaults: dict[str, Any] = {"file": console.err(), "disable": not speaks_for_all()}
        super().__init__(*args, **defaults | options)
