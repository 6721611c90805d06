"""The methods by the name that ``--method`` gives them. Each is loaded when it is asked for: flags need the names."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from taso_ds.training.arguments import TrainArguments

if TYPE_CHECKING:
    from taso_ds.methods.arguments import AdapterArguments
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


ADAPTER, MODEL = "adapter", "model"  # the folder of a run that holds what it trained

METHODS: "dict[str, Callable[[], type[Method]]]" = {"taso": _taso, "lora": _lora, "full": _full}


def make_method(adapter: "AdapterArguments", *, core_fraction: float, training: TrainArguments, seed: int) -> "Method":
    """Return the method that the flags name, with the run's numbers."""
    from taso_ds.methods.method import MethodSettings

    settings = MethodSettings(
        structure=adapter.structure,
        rank=adapter.rank,
        scaling=adapter.scaling,
        rho=adapter.rho,
        core_fraction=core_fraction,
        seed=seed,
        training=training,
    )
    return METHODS[adapter.method]()(settings)
