"""A bar on the console that shows how far a long piece of work is. Only the process that speaks for all shows it."""

from typing import Any

from tqdm import tqdm

from taso_ds.console import screen as console
from taso_ds.errors import speaks_for_all


class Bar(tqdm):
    """A bar of tqdm. A library that asks for a class of bars may be given this one."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options.setdefault("file", console.err())
        options.setdefault("disable", not speaks_for_all())
        super().__init__(*args, **options)
