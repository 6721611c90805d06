"""What a finished run is opened from again, by method: an adapter for its base, or a model of its own."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from taso_ds.adapters.adapter import TasoAdapter
from taso_ds.adapters.peft_format import load_adapter
from taso_ds.distributed import comm
from taso_ds.errors import UserError
from taso_ds.methods.lora import read_lora
from taso_ds.models.arguments import ModelArguments
from taso_ds.runs.folder import ADAPTER, MODEL

Deltas = Mapping[str, Callable[[], Tensor]]  # what gives the ΔW of a matrix, (out_features, in_features), in fp32


class SavedAdapter(Protocol):
    """An adapter as its files hold it."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """The adapted matrices by name: ``(out_features, in_features)``."""

    @property
    def head(self) -> Mapping[str, Tensor]:
        """The trained task head by parameter name."""

    def attach(self, model: nn.Module) -> None:
        """Make a loaded base, which may be partitioned, compute with the adapter, in the base's dtype."""

    def detach(self, model: nn.Module) -> Deltas:
        """Undo ``attach``; returns what the adapter adds to each matrix."""


@dataclass(frozen=True, eq=False)
class SavedTaso:
    """TASO's adapter, built again from its compact file."""

    adapter: TasoAdapter
    head: Mapping[str, Tensor]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {name: (region.out_features, region.in_features) for name, region in self.adapter.regions.items()}

    def attach(self, model: nn.Module) -> None:
        dtype: Any = model.dtype
        self.adapter.to(comm.device(), dtype).attach(model)

    def detach(self, model: nn.Module) -> Deltas:
        self.adapter.detach(model)
        return {name: partial(self.adapter.delta_weight, name) for name in self.adapter.regions}


_READERS: dict[str, Callable[[Path], SavedAdapter]] = {
    "taso": lambda folder: SavedTaso(*load_adapter(folder)),
    "lora": read_lora,
}
# What says which base to load, all of which a run that made a model of its own has decided.
BASE_FLAGS = ("model_name_or_path", "model_revision", "gguf_file", "tokenizer_name")


def is_model(method: str) -> bool:
    """Say whether this method leaves a plain model, not an adapter to one."""
    return method not in _READERS


def saved_folder(method: str, run: Path) -> Path:
    """Return the folder that holds what a run trained; UserError when there is none."""
    folder = run / (MODEL if is_model(method) else ADAPTER)
    if not folder.is_dir():
        raise UserError(
            f"run: {folder} does not exist: no training has finished in {run}; start its command again to go on"
        )
    return folder


def base_of(method: str, recorded: ModelArguments, run: Path) -> ModelArguments:
    """Return what to load: the base of the run's adapter, or the model that the run made."""
    folder = saved_folder(method, run)
    if not is_model(method):
        return recorded
    return dataclasses.replace(
        recorded, model_name_or_path=str(folder), model_revision="main", gguf_file=None, tokenizer_name=None
    )


def read_adapter(method: str, run: Path) -> SavedAdapter | None:
    """Read a run's adapter, None where the run made a model; UserError when its files are missing or damaged."""
    return None if is_model(method) else _READERS[method](saved_folder(method, run))
