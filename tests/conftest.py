"""What all tests share: tiny models on disk, fixed seeds, no network, and a way to launch several ranks."""

import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # tiny tensors: more threads only wait for one another
ROOT = Path(__file__).resolve().parents[1]

RunRanks = Callable[..., str]


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its own output layer."""
    return tiny_models.save(tiny_models.llama(), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tied_llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose output layer is its embedding."""
    return tiny_models.save(tiny_models.llama(tied=True), tmp_path_factory.mktemp("tied_llama"))


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(tiny_models.gpt2(), tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(tiny_models.bert(), tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """A real pretrained model: in $TASO_TEST_MODELS, or shared/models beside the checkout; skips without it."""
    beside = ROOT.parent / "shared" / "models"
    folder = Path(os.environ.get("TASO_TEST_MODELS", beside)) / "stories260k"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"no real model: set TASO_TEST_MODELS to a folder with stories260k, or put it into {beside}")
    return folder


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def run_ranks() -> RunRanks:
    """Return ``run_ranks(script, n, args)``: run a script on n gloo ranks of this machine; returns what it printed."""

    def run(script: Path, n: int, args: Sequence[str | Path] = (), *, timeout: float = 300.0) -> str:
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}"]
        command += ["--master_addr=127.0.0.1", f"--master_port={_free_port()}", str(script), *map(str, args)]
        environment = os.environ | {
            "DS_ACCELERATOR": "cpu",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        }
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher ends its ranks
            output, _ = process.communicate(timeout=60)
            pytest.fail(f"{script.name} on {n} ranks took more than {timeout:.0f} s:\n{output[-12000:]}")
        if process.returncode:
            pytest.fail(f"{script.name} on {n} ranks failed with {process.returncode}:\n{output[-12000:]}")
        return output

    return run
