"""What scoring takes beyond a plain backward: fp32 sums of parameters / ranks, and no more than two matrices beside."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launching import environment, finish, free_port

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(600)]
WORKER = Path(__file__).with_name("scoring_memory_worker.py")
RANKS = (2, 4)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, float]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for ranks in RANKS:
        out = tmp_path_factory.mktemp("memory") / f"{ranks}.json"
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
        process = subprocess.Popen(
            [*command, f"--master_port={free_port()}", str(WORKER), str(out)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
        )  # fmt: skip
        finish(process).succeeded()
        found[ranks] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("ranks", RANKS)
def test_extra_memory_is_the_formulas(measured: dict[int, list[dict[str, float]]], ranks: int) -> None:
    for model in measured[ranks]:
        sums, matrix = 4 * model["elements"] / ranks, 4 * model["largest"]
        extra = model["scoring"] - model["plain"]
        assert 0.9 * sums <= extra <= sums + 2 * matrix, model


@pytest.mark.parametrize("ranks", RANKS)
def test_passes_divide_the_sums(measured: dict[int, list[dict[str, float]]], ranks: int) -> None:
    for model in measured[ranks]:
        sums, matrix = 4 * model["elements"] / ranks, 4 * model["largest"]
        assert model["four passes"] - model["plain"] <= sums / 4 + 2 * matrix, model


@pytest.mark.parametrize("ranks", RANKS)
def test_a_single_batch_needs_no_sums(measured: dict[int, list[dict[str, float]]], ranks: int) -> None:
    for model in measured[ranks]:
        assert model["sums"] == pytest.approx(4 * model["elements"] / ranks, rel=0.1), model
        assert model["sums of a single batch"] == 4 * model["largest"], model


def test_extra_memory_grows_as_parameters_over_ranks(measured: dict[int, list[dict[str, float]]]) -> None:
    extra = {ranks: [model["scoring"] - model["plain"] for model in measured[ranks]] for ranks in RANKS}
    elements = [model["elements"] for model in measured[RANKS[0]]]
    for values in extra.values():
        assert values[2] / values[1] == pytest.approx(elements[2] / elements[1], rel=0.25)
    assert extra[2][2] / extra[4][2] == pytest.approx(2.0, rel=0.25)
