"""Each correction of DeepSpeed is still needed: a test that fails says which of them can go."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from configs import zero_config
from torch import nn

from taso_ds.distributed import deepspeed_fixes, process_group
from taso_ds.distributed import engine as engines
from taso_ds.distributed.zero_config import ZeroConfig
from taso_ds.models.load_sharded import partition_whole

IDS = torch.ones(2, 8, dtype=torch.long)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank; the replaced ``F.linear`` and coordinator of one test are not the next one's."""
    process_group.init()
    engines.quiet_deepspeed()
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)
    monkeypatch.setattr(Coordinator, "_clear_trace_structures", Coordinator._clear_trace_structures)


def config(stage: int, *, bf16: bool = False) -> ZeroConfig:
    section = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    return zero_config({"zero_optimization": section}, micro=2, bf16=bf16)


def engine_of(model: nn.Module, zero: ZeroConfig) -> Any:
    """Return DeepSpeed's own engine, which trains the output layer, without our corrections."""
    import deepspeed

    weights = [value.requires_grad_(True) for name, value in model.named_parameters() if name.startswith("lm_head")]
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=zero.raw)[0]


def frozen(*, bf16: bool = False, partitioned: bool = False) -> Any:
    model = tiny_models.llama().to(torch.bfloat16 if bf16 else torch.float32).requires_grad_(False)
    if partitioned:
        partition_whole(model, config(3))
    return model


FIXES = [value for _, value in inspect.getmembers(deepspeed_fixes, inspect.isfunction)]


@pytest.mark.parametrize("fix", FIXES, ids=lambda fix: fix.__name__)
def test_each_says_when_and_where_and_has_a_test(fix: Any) -> None:
    assert "Seen in: DeepSpeed 0." in fix.__doc__
    assert "Upstream: " in fix.__doc__
    assert f"test_{fix.__name__}_is_needed" in globals()


def test_only_the_modules_that_the_list_names_reach_inside() -> None:
    folder = Path(deepspeed_fixes.__file__).parent
    inside = re.compile(r"^ *from deepspeed\.(runtime|ops|launcher)\b", re.M)
    found = {path.stem for path in folder.glob("*.py") if inside.search(path.read_text(encoding="utf-8"))}
    named = {"sharded", "accelerator", "launcher", "hostfile", "ds_config_check"}
    assert found == named | {"deepspeed_fixes"}
    assert all(f"``{name}``" in str(deepspeed_fixes.__doc__) for name in named)


def test_undo_warm_up_step_is_needed() -> None:
    engine = engine_of(frozen(bf16=True), config(0, bf16=True))
    assert {int(state["step"]) for state in engine.optimizer.optimizer.state.values()} == {1}
    deepspeed_fixes.undo_warm_up_step(engine.optimizer)
    assert not engine.optimizer.optimizer.state


def test_missing_norm_is_needed() -> None:
    engine = engine_of(frozen(), config(0))
    engine.backward(engine(input_ids=IDS, labels=IDS).loss)
    norm = deepspeed_fixes.missing_norm(engine)
    assert norm == pytest.approx(float(engine.module.lm_head.weight.grad.norm()))
    engine.step()
    assert engine.get_global_grad_norm() is None


def test_detach_engine_is_needed() -> None:
    import deepspeed

    model = frozen(partitioned=True)
    inside = model.model.layers[1].mlp.up_proj
    handle = inside.register_forward_hook(lambda *given: given[2].requires_grad_(True))  # where the graph begins
    engine = deepspeed.initialize(model=model, config=config(3).raw)[0]
    model(input_ids=IDS, labels=IDS).loss.backward()
    handle.remove()
    engine.destroy()
    left = [name for module in model.modules() for name in ("pre_bwd_fn", "post_bwd_fn") if name in module.__dict__]
    assert left
    assert model._forward_hooks
    assert model._forward_pre_hooks
    assert inside.weight.ds_status.name == "AVAILABLE"
    deepspeed_fixes.detach_engine(engine)
    assert not any({"pre_bwd_fn", "post_bwd_fn"} & vars(module).keys() for module in model.modules())
    assert not model._forward_hooks
    assert not any(value.numel() for value in model.parameters())


def test_let_linears_drop_weights_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed

    plain = torch.nn.functional.linear
    with monkeypatch.context() as without:
        without.setattr("taso_ds.distributed.sharded.let_linears_drop_weights", lambda init: None)
        engine_of(frozen(partitioned=True), config(3))
    assert torch.nn.functional.linear is plain
    deepspeed_fixes.let_linears_drop_weights(deepspeed.zero.Init(config_dict_or_path=config(3).raw))
    assert torch.nn.functional.linear is not plain


def test_forget_stale_releases_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the output layer is gathered in every backward again; with it the second step has learned."""
    assert backward_gathers(monkeypatch, steps=4) == [1, 1, 1, 1]
    deepspeed_fixes.forget_stale_releases()
    assert backward_gathers(monkeypatch, steps=4) == [1, 1, 0, 0]


def backward_gathers(monkeypatch: pytest.MonkeyPatch, *, steps: int) -> list[int]:
    """Return how many weights each step's backward gathers, after a forward that has no backward."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    name = "_PartitionedParameterCoordinator__all_gather_params_"
    gather, gathered = getattr(Coordinator, name), []

    def counting(self: Any, params: Any, forward: bool, quantize: bool = False) -> None:
        gathered.append(0 if forward else sum(value.ds_status.name == "NOT_AVAILABLE" for value in params))
        gather(self, params, forward, quantize)

    with monkeypatch.context() as patched:
        patched.setattr(Coordinator, name, counting)
        engine, counts = engine_of(frozen(partitioned=True), config(3)), []
        engine(input_ids=IDS, labels=IDS)
        for _ in range(steps):
            gathered.clear()
            engine.backward(engine(input_ids=IDS, labels=IDS).loss)
            engine.step()
            counts.append(sum(gathered))
        engine.destroy()
    return counts
