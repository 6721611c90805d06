"""What all tests share: tiny models on disk, fixed seeds and no network."""

import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from forked import ForkServer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # tiny tensors: more threads only wait for one another
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Starts ranks within a second, for it has imported everything."""
    with ForkServer() as server:
        yield server


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process computes on the CPU, whatever the machine has."""
    from taso_ds.distributed import comm

    monkeypatch.setattr(comm, "device", lambda: torch.device("cpu"))


def folder_of(make: Callable[[], Any]) -> Any:
    """Return a fixture: the folder of a tiny model, written once."""

    @pytest.fixture(scope="session")
    def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tiny_models.save(make(), tmp_path_factory.mktemp("model"))

    return folder


llama_folder = folder_of(tiny_models.llama)  # with its own output layer
tied_llama_folder = folder_of(partial(tiny_models.llama, tied=True))  # its output layer is its embedding
gpt2_folder = folder_of(tiny_models.gpt2)
bert_folder = folder_of(tiny_models.bert)


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """A real pretrained model: in $TASO_TEST_MODELS, or shared/models beside the checkout; skips without it."""
    beside = ROOT.parent / "shared" / "models"
    folder = Path(os.environ.get("TASO_TEST_MODELS", beside)) / "stories260k"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"no real model: set TASO_TEST_MODELS to a folder with stories260k, or put it into {beside}")
    return folder
