"""What a finished run left, by the name of its method: an adapter for its base, or a whole model."""

import dataclasses
from pathlib import Path

from taso_ds.errors import UserError
from taso_ds.methods.method import SavedAdapter, folder_name
from taso_ds.methods.table import METHODS
from taso_ds.models.arguments import ModelArguments

# The flags that say which base to load. A run that made a model of its own has decided all of them.
BASE_FLAGS = ("model_name_or_path", "model_revision", "gguf_file", "tokenizer_name")


def saved_folder(method: str, run: Path) -> Path:
    """Return the folder that holds what a run trained.

    Raises:
        UserError: there is none, because no training has finished in that run.
    """
    folder = run / folder_name(METHODS[method]())
    if not folder.is_dir():
        raise UserError(
            f"run: {folder} does not exist: no training has finished in {run}; start its command again to go on"
        )
    return folder


def base_of(method: str, recorded: ModelArguments, run: Path) -> ModelArguments:
    """Return what to load: the base of the run's adapter, or the model that the run made.

    Args:
        method: the name of the run's method.
        recorded: what the run loaded.
        run: its folder.
    """
    folder = saved_folder(method, run)
    if not METHODS[method]().trains_base:
        return recorded
    return dataclasses.replace(
        recorded, model_name_or_path=str(folder), model_revision="main", gguf_file=None, tokenizer_name=None
    )


def read_adapter(method: str, run: Path) -> SavedAdapter | None:
    """Read a run's adapter; None where the run made a model.

    Raises:
        UserError: its files are missing or damaged.
    """
    return METHODS[method]().open(saved_folder(method, run))
