"""Partitioning a model that is whole: what has been partitioned is free before the next parameter is taken."""

import weakref

import pytest
from torch import nn

from taso_ds.distributed.sharded import Fill
from taso_ds.distributed.zero_config import ZeroConfig
from taso_ds.models import load_sharded


def test_one_parameter_at_a_time_is_there_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[weakref.ref[nn.Parameter]] = []
    alive: list[int] = []

    class Halving:
        def __init__(self, zero: ZeroConfig) -> None:
            pass

        def partition(self, parameter: nn.Parameter, fill: Fill) -> nn.Parameter:
            alive.append(sum(one() is not None for one in taken))
            taken.append(weakref.ref(parameter))
            return nn.Parameter(parameter.detach().flatten()[: parameter.numel() // 2].clone())

    monkeypatch.setattr(load_sharded, "Partitioner", Halving)
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(5)))
    load_sharded.partition_whole(model, ZeroConfig({}))
    assert [parameter.numel() for parameter in model.parameters()] == [8] * 5
    assert alive == [0] * 5
