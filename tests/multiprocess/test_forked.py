"""What tests rely on: ranks return what rank 0 returned or say where they failed, and planted faults have places."""

import re

import pytest
import torch
from faulty import find
from forked import ForkServer
from launching import ROOT

from taso_ds.distributed import comm

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(120)]


def total_of(number: int) -> tuple[int, float]:
    total = torch.tensor(float(number + comm.rank()))
    comm.sum_everywhere(total)
    return comm.world_size(), total.item()


def fail_on(rank: int) -> None:
    if comm.rank() == rank:
        raise ZeroDivisionError("of this rank")
    comm.gather_objects(None)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_value_of_rank_0_comes_back(fork_server: ForkServer, ranks: int) -> None:
    assert fork_server.run_on_ranks(total_of, ranks, 5) == (ranks, [5.0, 11.0][ranks - 1])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_says_so_and_ends_all(fork_server: ForkServer, rank: int) -> None:
    with pytest.raises(AssertionError, match="ZeroDivisionError: of this rank"):
        fork_server.run_on_ranks(fail_on, 2, rank, timeout=60.0)


def test_every_place_of_a_fault_is_there() -> None:
    files = [file for room in ("tests", "benchmarks") for file in sorted((ROOT / room).rglob("*.py"))]
    places = {place for file in files for place in re.findall(r'"((?:os|taso_ds)[\w.]*:[\w.]+)"', file.read_text())}
    assert len(places) > 15
    for place in sorted(places):
        owner, name = find(place)
        assert hasattr(owner, name), place
