"""Every shipped DeepSpeed JSON resolves and trains two real steps, and the stages compute the same.

One process for all of them: most of the time is DeepSpeed's start.
"""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import launching
import pytest
from forked import ForkServer

from taso_ds.distributed.ds_config import read_ds_config, resolve_ds_config, shipped_ds_configs

FOLDER = Path(__file__).resolve().parents[1] / "ds_configs"
FILES = sorted(FOLDER.rglob("*.json"))
CASES = [
    (str(file.relative_to(FOLDER)), bf16, accumulation)
    for file, bf16, accumulation in itertools.product(FILES, (True, False), (1, 4))
    if "nvme" not in file.stem or launching.HAS_NVME  # tests/e2e says so where it is left out
]
MICRO, MAX_GRAD_NORM = 2, 0.5


def test_the_folder_is_what_is_shipped() -> None:
    names = ["zero0", "zero1", "zero2", "zero3", "zero3_hpz", "zero3_nf4", "zero3_nvme", "zero3_offload"]
    assert [file.stem for file in shipped_ds_configs()] == names
    assert shipped_ds_configs() == FILES


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_file_is_short_and_says_its_stage(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= 35
    assert f"zero{json.loads(text)['zero_optimization']['stage']}" in file.stem
    assert f"`{file.name}`" in (FOLDER / "README.md").read_text()


def resolved(name: str, bf16: bool, accumulation: int, nvme_path: str) -> dict[str, Any]:
    return resolve_ds_config(
        read_ds_config(str(FOLDER / name)), micro_batch_size=MICRO, grad_accum_steps=accumulation, world_size=1,
        bf16=bf16, max_grad_norm=MAX_GRAD_NORM, nvme_path=nvme_path, source=name,
    ).raw  # fmt: skip


def train_all(nvme_path: str) -> dict[tuple[str, bool, int], dict[str, Any]]:
    """Give every case to ``deepspeed.initialize`` and return what its engine says and learned."""
    return {case: train(*case, nvme_path=nvme_path) for case in CASES}


def train(name: str, bf16: bool, accumulation: int, *, nvme_path: str) -> dict[str, Any]:
    import deepspeed
    import torch
    from deepspeed.utils import safe_get_full_fp32_param
    from torch import nn

    torch.manual_seed(0)
    base, head = nn.Linear(8, 8), nn.Linear(8, 1, bias=False)
    base.requires_grad_(False)
    model, weight = nn.Sequential(base, head), head.weight
    # A large epsilon makes Adam's step follow the size of the gradient, so that lost bits show in the weight.
    optimizer = torch.optim.AdamW([weight], lr=0.1, eps=1.0)
    config = resolved(name, bf16, accumulation, nvme_path)
    engine: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    batches = torch.randn(2 * accumulation, MICRO, 8, generator=torch.Generator().manual_seed(1))
    for batch in batches:
        engine.backward(engine(batch.bfloat16() if bf16 else batch).float().mean())
        engine.step()
    stage = int(engine.zero_optimization_stage())
    trained = weight if stage == 0 else safe_get_full_fp32_param(weight)
    result = {
        "stage": stage, "bf16": bool(engine.bfloat16_enabled()), "micro": engine.train_micro_batch_size_per_gpu(),
        "accumulation": engine.gradient_accumulation_steps(), "global": engine.train_batch_size(),
        "clipping": engine.gradient_clipping(), "steps": engine.global_steps,
        "weight": trained.detach().float().flatten().tolist(),
    }  # fmt: skip
    engine.destroy()
    return result


@pytest.fixture(scope="module")
def trained(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return fork_server.run_on_ranks(train_all, 1, str(tmp_path_factory.mktemp("nvme")), timeout=600.0)


@pytest.mark.multiprocess
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{'bf16' if case[1] else 'fp32'}-{case[2]}")
def test_deepspeed_trains_with_what_the_run_said(case: tuple[str, bool, int], trained: dict[Any, Any]) -> None:
    name, bf16, accumulation = case
    result = trained[case]
    assert f"zero{result['stage']}" in name
    assert result["bf16"] is bf16
    assert (result["micro"], result["accumulation"]) == (MICRO, accumulation)
    assert result["global"] == MICRO * accumulation
    assert result["clipping"] == MAX_GRAD_NORM
    assert result["steps"] == 2
    assert all(math.isfinite(value) for value in result["weight"])


@pytest.mark.multiprocess
@pytest.mark.parametrize(("bf16", "accumulation"), list(itertools.product((True, False), (1, 4))))
def test_stages_agree(bf16: bool, accumulation: int, trained: dict[Any, Any]) -> None:
    """Gradients add up in fp32 at every stage that can, so the stages learn one and the same weight.

    DeepSpeed's stage 0 has no fp32 sum under bf16, so there it is left out.
    """
    weights = [
        result["weight"]
        for (_, used_bf16, used), result in trained.items()
        if (used_bf16, used) == (bf16, accumulation) and not (bf16 and result["stage"] == 0)
    ]
    assert len(weights) == len({name for name, _, _ in CASES}) - bf16
    for weight in weights[1:]:
        assert weight == pytest.approx(weights[0], rel=1e-6)
