"""The methods by their names for ``--method``. A method loads when it is asked for: flags need the names only."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taso_ds.methods.method import Method


def _taso() -> "type[Method]":
    from taso_ds.methods.taso import Taso

    return Taso


def _lora() -> "type[Method]":
    from taso_ds.methods.lora import Lora

    return Lora


def _full() -> "type[Method]":
    from taso_ds.methods.full import Full

    return Full


METHODS: "dict[str, Callable[[], type[Method]]]" = {"taso": _taso, "lora": _lora, "full": _full}
