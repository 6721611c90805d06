"""Every key of a DeepSpeed JSON with values people slip into: what is not refused at once must run an engine.

The engine scores a batch and takes two steps, for some values are met only there.
"""

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from configs import zero_config

from taso_ds.distributed import ds_config_keys as keys
from taso_ds.distributed import engine as engines
from taso_ds.distributed import process_group
from taso_ds.distributed.ds_config_check import check_device, check_ds_config
from taso_ds.distributed.ds_config_values import Kind, Table
from taso_ds.distributed.zero_config import ZeroConfig
from taso_ds.errors import UserError

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3000)]

WRONG_OR_RIGHT: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 0.5, 2.5, 1e9, 10**18, 10**30, 1e400, "", "0", "auto", "x", "true", "cpu",
    "fp32", [], ["x"], ["("], [1], {}, {"x": 1}, {"enabled": True},
)  # fmt: skip
STAGES = (0, 1, 2, 3)
Path_ = tuple[str, ...]


def paths(table: Table, above: Path_ = ()) -> Iterator[Path_]:
    for key, kind in table.items():
        yield (*above, key)
        if not isinstance(kind, Kind):
            yield from paths(kind, (*above, key))


def all_paths() -> list[Path_]:
    """Return every key at every depth, by the way to it."""
    zero = ("zero_optimization",)
    below = [
        *paths(keys.BF16, ("bf16",)),
        *paths(keys.DATA_TYPES, ("data_types",)),
        *paths(keys.ZERO, zero),
        *paths(keys.OFFLOAD_OPTIMIZER, (*zero, "offload_optimizer")),
        *paths(keys.OFFLOAD_PARAM, (*zero, "offload_param")),
        *((*zero, "leaf_module", name) for name in ("classes", "names", "name_suffixes")),
    ]
    whole = [(key,) for key in keys.TOP_LEVEL if key not in keys.PASSED_ON]
    return [*paths(keys.PASSED_ON), *whole, *below]


def document(path: Path_, value: Any, stage: int) -> dict[str, Any]:
    """Return a JSON with this value there, and its section switched on."""
    raw: dict[str, Any] = {"zero_optimization": {"stage": stage}}
    place = raw
    for key in path[:-1]:
        place = place.setdefault(key, {})
    if path[0] in ("comms_logger", "csv_monitor", "flops_profiler") and len(path) == 2:
        place["enabled"] = True
    if path[1:2] in (("offload_optimizer",), ("offload_param",)) and len(path) == 3:
        place["device"] = "cpu"
    place[path[-1]] = value
    return raw


def run_engine(zero: ZeroConfig, *, bf16: bool) -> None:
    """Score a batch, then take two steps with one trained matrix."""
    model = tiny_models.llama(layers=1).to(torch.bfloat16 if bf16 else torch.float32)
    model.requires_grad_(False)
    trained = model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    ids = torch.ones(2, 4, dtype=torch.long)
    with engines.scoring_engine(model, zero) as scored:
        scored(input_ids=ids, labels=ids).loss.backward()
    trained.grad = None
    engine: Any = engines.training_engine(model, torch.optim.AdamW([trained], lr=1e-3), zero)
    for _ in range(2):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engines.step(engine)
    engine.destroy()


def outcome(path: Path_, value: Any, stage: int) -> str:
    bf16 = stage % 2 == 1
    try:
        zero = zero_config(document(path, value, stage), micro=2, bf16=bf16, nvme_path="/disk")
        check_ds_config(zero, "ds.json")
        check_device(zero, "ds.json")
    except UserError as error:
        return "refused" if "\n" not in str(error) else f"not one line: {error}"
    try:
        run_engine(zero, bf16=bf16)
    except Exception as error:
        return f"{'.'.join(path)} {json.dumps(value)} at stage {stage}: {type(error).__name__}: {error}"
    return "ran"


@pytest.fixture
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank, met already, in a folder that monitors may write into."""
    monkeypatch.chdir(tmp_path)
    process_group.init()  # with its rank variables, which scripts that run in this process later need
    engines.quiet_deepspeed()


def check(cases: list[tuple[Path_, Any, int]]) -> None:
    outcomes = [outcome(*case) for case in cases]
    assert [one for one in outcomes if one not in ("refused", "ran")] == []
    assert {"refused", "ran"} <= set(outcomes)


@pytest.mark.usefixtures("_alone")
def test_some_values() -> None:
    cases = list(itertools.product(all_paths(), WRONG_OR_RIGHT, STAGES))
    check(random.Random(0).sample(cases, 120))


@pytest.mark.slow
@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("stage", STAGES)
def test_every_key_with_every_value(stage: int) -> None:
    check(list(itertools.product(all_paths(), WRONG_OR_RIGHT, (stage,))))
