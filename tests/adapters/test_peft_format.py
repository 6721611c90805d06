"""The adapter on disk: the compact file gives the same adapter back, and PEFT alone computes what the live one does."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from trained_adapters import select_core_region, trained_adapter

from taso_ds.adapters.adapter import TasoAdapter
from taso_ds.adapters.peft_format import (
    COMPACT_FILE,
    KIND,
    PEFT_CONFIG_FILE,
    PEFT_FILE,
    load_adapter,
    peft_config,
    peft_tensors,
    save_adapter,
)
from taso_ds.adapters.structure import STRUCTURES
from taso_ds.errors import UserError
from taso_ds.files.tensors import read_tensors, write_tensors

BATCH = {key: value for key, value in tiny_models.token_batch().items() if key != "labels"}


def module_names(model: Any) -> list[str]:
    return [name for name, _ in model.named_modules()]


def save(
    folder: Path, model: Any, adapter: TasoAdapter, *, head: dict[str, Tensor] | None = None, **changes: Any
) -> None:
    options: dict[str, Any] = {
        "base_model_name_or_path": "base", "task_type": "CAUSAL_LM", "module_names": module_names(model),
        "fan_in_fan_out": False, "modules_to_save": [],
    }  # fmt: skip
    config = peft_config(adapter, **(options | changes))
    save_adapter(folder, adapter, adapter.flat.detach(), config=config, head=head or {})


def opened_by_peft(model: Any, folder: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder).eval()


# The compact file -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("structure", list(STRUCTURES))
def test_the_compact_file_gives_the_same_adapter_back(tmp_path: Path, structure: str, dtype: torch.dtype) -> None:
    model = tiny_models.llama()
    adapter = trained_adapter(model, structure=structure, rank=2, scaling=0.25, dtype=dtype)
    save(tmp_path / "a", model, adapter)
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [PEFT_CONFIG_FILE, PEFT_FILE, COMPACT_FILE]
    again, head = load_adapter(tmp_path / "a")
    assert head == {}
    assert (again.structure, again.rank, again.scaling) == (structure, 2, 0.25)
    assert list(again.regions) == list(adapter.regions)
    assert again.flat.dtype == dtype
    assert torch.equal(again.flat, adapter.flat)
    for name in adapter.regions:
        assert torch.equal(again.delta_weight(name), adapter.delta_weight(name))
    model.to(dtype)
    adapter.attach(model)
    live = model(**BATCH).logits
    adapter.detach(model)
    again.attach(model)
    assert torch.equal(model(**BATCH).logits, live)


def test_the_compact_file_holds_the_kept_entries_only(tmp_path: Path) -> None:
    model = tiny_models.llama()
    adapter = trained_adapter(model)
    save(tmp_path, model, adapter)
    tensors = load_file(tmp_path / COMPACT_FILE)
    values = [tensor.numel() for name, tensor in tensors.items() if name.endswith(".values")]
    assert sum(values) == adapter.flat.numel() < adapter.num_dense


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3),
    structure=st.sampled_from(list(STRUCTURES)), rank=st.integers(1, 3), scaling=st.floats(1e-3, 1e3),
    p=st.floats(0.01, 1.0), dtype=st.sampled_from((torch.float32, torch.bfloat16)),
)  # fmt: skip
def test_the_compact_file_of_any_regions_brings_the_adapter_back(
    tmp_path: Path,
    shapes: list[tuple[int, int]],
    structure: str,
    rank: int,
    scaling: float,
    p: float,
    dtype: torch.dtype,
) -> None:
    regions = {
        f"block.{number}": select_core_region(torch.rand(shape), element_fraction=0.3, core_fraction=p)
        for number, shape in enumerate(shapes)
    }
    adapter = TasoAdapter(regions, structure=structure, rank=rank, scaling=scaling, seed=0, dtype=dtype)
    with torch.no_grad():
        adapter.flat.add_(torch.rand(adapter.flat.shape) + 0.1)
    save_adapter(tmp_path, adapter, adapter.flat.detach(), config={}, head={})
    again, head = load_adapter(tmp_path)
    assert not head
    assert torch.equal(again.flat, adapter.flat)
    assert (again.structure, again.rank, again.scaling) == (structure, rank, scaling)
    for name in regions:
        assert torch.equal(again.delta_weight(name), adapter.delta_weight(name))


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 0}, {"rank": 1.5}, {"rank": 10**9}, {"scaling": "one"}, {"dtype": "nn"}, {"dtype": 3}, {"shapes": {}},
        {"shapes": 3}, {"shapes": {"model.layers.0.self_attn.q_proj": [32]}}, {"shapes": {"x": [4, 4]}},
        {"shapes": {"model.layers.0.self_attn.q_proj": [10**12, 32]}},
        {"shapes": {"model.layers.0.self_attn.q_proj": [1, 1]}},
    ],
)  # fmt: skip
def test_metadata_that_makes_no_sense_is_refused(tmp_path: Path, wrong: dict[str, object]) -> None:
    model = tiny_models.llama(layers=1)
    save(tmp_path, model, trained_adapter(model))
    tensors, metadata = read_tensors(tmp_path / COMPACT_FILE, kind=KIND)
    write_tensors(tmp_path / COMPACT_FILE, tensors, metadata | wrong)
    with pytest.raises(UserError, match="incomplete or inconsistent"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("wrong", [[-1, 2], [2, 2], [3, 1], [1, 10**6], [], [[1]], [0.5]])
def test_indices_that_no_selection_gives_are_refused(tmp_path: Path, wrong: list[object]) -> None:
    model = tiny_models.llama(layers=1)
    save(tmp_path, model, trained_adapter(model))
    tensors, metadata = read_tensors(tmp_path / COMPACT_FILE, kind=KIND)
    for name in ("rows", "cols"):
        changed = tensors | {f"model.layers.0.self_attn.q_proj.{name}": torch.tensor(wrong)}
        write_tensors(tmp_path / COMPACT_FILE, changed, metadata)
        with pytest.raises(UserError, match=r"inconsistent \(indices "):
            load_adapter(tmp_path)


def test_a_damaged_compact_file_is_refused(tmp_path: Path) -> None:
    from safetensors import safe_open

    model = tiny_models.llama(layers=1)
    save(tmp_path, model, trained_adapter(model))
    file = tmp_path / COMPACT_FILE
    with safe_open(file, framework="pt") as opened:
        metadata = {key: json.loads(value) for key, value in opened.metadata().items()}
    tensors, content = load_file(file), file.read_bytes()
    name = "model.layers.0.self_attn.q_proj"

    file.write_bytes(content[:-10])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_adapter(tmp_path)
    write_tensors(file, {key: value for key, value in tensors.items() if key != f"{name}.rows"}, metadata)
    with pytest.raises(UserError, match="incomplete or inconsistent"):
        load_adapter(tmp_path)
    write_tensors(file, {**tensors, f"{name}.values": tensors[f"{name}.values"][:-1]}, metadata)
    with pytest.raises(UserError, match=r"values for \d+ positions"):
        load_adapter(tmp_path)
    write_tensors(file, tensors, {**metadata, "structure": "onion"})
    with pytest.raises(UserError, match="unknown structure 'onion'"):
        load_adapter(tmp_path)
    write_tensors(file, tensors, {**metadata, "kind": "taso_core_regions"})
    with pytest.raises(UserError, match="not a taso_adapter file"):
        load_adapter(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match="no such file"):
        load_adapter(tmp_path)


# PEFT's files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("structure", "rank", "r"), [("union", 1, 2), ("union", 2, 4), ("intersection", 2, 2)])
def test_peft_computes_what_the_live_adapter_does(tmp_path: Path, structure: str, rank: int, r: int) -> None:
    """With alpha ≠ rank: scaling 1.5 stands in B, and lora_alpha = r, because servers ignore anything finer."""
    model = tiny_models.llama(tied=True)
    base = model(**BATCH).logits
    adapter = trained_adapter(model, structure=structure, rank=rank, scaling=1.5)
    save(tmp_path, model, adapter)
    config = json.loads((tmp_path / PEFT_CONFIG_FILE).read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (r, r, "LORA")
    tensors = load_file(tmp_path / PEFT_FILE)
    assert len(tensors) == 2 * len(adapter.regions)
    for name in adapter.regions:
        a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in ("A", "B"))
        assert a.shape[0] == b.shape[1] == r
        torch.testing.assert_close(b @ a, adapter.delta_weight(name), rtol=1e-5, atol=1e-7)
    adapter.attach(model)
    live = model(**BATCH).logits
    adapter.detach(model)
    assert (live - base).abs().max() > 0.1
    torch.testing.assert_close(opened_by_peft(model, tmp_path)(**BATCH).logits, live, rtol=1e-4, atol=1e-5)


def test_short_names_where_they_say_exactly_what_is_adapted() -> None:
    model = tiny_models.llama()

    def names(targets: list[str] | None) -> list[str]:
        config = peft_config(
            trained_adapter(model, targets), base_model_name_or_path="base", task_type="CAUSAL_LM",
            module_names=module_names(model), fan_in_fan_out=False, modules_to_save=[],
        )  # fmt: skip
        found: list[str] = config["target_modules"]
        return found

    assert names(None) == sorted(tiny_models.LLAMA_LINEARS)
    assert names(["v_proj", "q_proj"]) == ["q_proj", "v_proj"]
    # q_proj of one block of two: the short name would adapt both.
    assert names(["model.layers.1.self_attn.q_proj"]) == ["model.layers.1.self_attn.q_proj"]


def test_linears_whose_name_a_block_has_too_are_found_by_peft(tmp_path: Path) -> None:
    """As Gemma 3n's: a list of linears beside the list of blocks, so both hold a ``0``."""
    model = tiny_models.llama()
    model.model.extra = torch.nn.ModuleList([torch.nn.Linear(32, 32)])
    adapter = trained_adapter(model, ["extra.0", "q_proj"])
    save(tmp_path, model, adapter)
    opened = opened_by_peft(model, tmp_path)
    adapted = {name.split(".lora_")[0] for name, _ in opened.named_parameters() if ".lora_" in name}
    assert adapted == {f"base_model.model.{name}" for name in adapter.regions}


def test_peft_adapts_one_block_only_when_one_was_adapted(tmp_path: Path) -> None:
    model = tiny_models.llama()
    adapter = trained_adapter(model, ["model.layers.1.self_attn.q_proj"])
    save(tmp_path, model, adapter)
    adapter.attach(model)
    live = model(**BATCH).logits
    adapter.detach(model)
    opened = opened_by_peft(model, tmp_path)
    adapted = {name.split(".lora_")[0] for name, _ in opened.named_parameters() if ".lora_" in name}
    assert adapted == {"base_model.model.model.layers.1.self_attn.q_proj"}
    torch.testing.assert_close(opened(**BATCH).logits, live, rtol=1e-4, atol=1e-5)


def test_an_adapter_that_was_never_trained_is_refused(tmp_path: Path) -> None:
    model = tiny_models.llama()
    regions = trained_adapter(model).regions
    fresh = TasoAdapter(regions, structure="union", rank=1, scaling=1.0, seed=0, dtype=torch.float32)  # B = 0
    with pytest.raises(FloatingPointError, match="every lora_B of the adapter is zero"):
        save(tmp_path / "a", model, fresh)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_refused(tmp_path: Path, bad: float) -> None:
    model = tiny_models.llama()
    adapter = trained_adapter(model)
    with torch.no_grad():
        adapter.flat[5] = bad
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        save(tmp_path / "a", model, adapter)
    assert not (tmp_path / "a").exists()


def test_gpt2_tells_peft_that_its_weights_are_transposed(tmp_path: Path) -> None:
    model = tiny_models.gpt2()
    adapter = trained_adapter(model, rank=2, scaling=0.5)
    save(tmp_path, model, adapter, fan_in_fan_out=True)
    config = json.loads((tmp_path / PEFT_CONFIG_FILE).read_text())
    assert config["fan_in_fan_out"] is True
    assert config["target_modules"] == ["c_attn", "c_fc", "c_proj"]
    adapter.attach(model)
    live = model(**BATCH).logits
    adapter.detach(model)
    opened = opened_by_peft(model, tmp_path)
    torch.testing.assert_close(opened(**BATCH).logits, live, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(opened.merge_and_unload()(**BATCH).logits, live, rtol=1e-4, atol=1e-4)


def test_a_bert_brings_its_head(tmp_path: Path) -> None:
    """The trained classifier travels in the same file and replaces the one of the base that PEFT starts from."""
    model = tiny_models.bert(seed=0)
    adapter = trained_adapter(model)
    with torch.no_grad():  # the head was trained
        model.classifier.weight.add_(1.0)
        model.classifier.bias.sub_(0.5)
    head = {f"classifier.{name}": value.detach().clone() for name, value in model.classifier.named_parameters()}
    save(tmp_path, model, adapter, head=head, task_type="SEQ_CLS", modules_to_save=["classifier"])
    config = json.loads((tmp_path / PEFT_CONFIG_FILE).read_text())
    assert config["modules_to_save"] == ["classifier"]
    # "dense" would select the pooler's too, which is no target: so the whole paths.
    assert config["target_modules"] == sorted(adapter.regions)
    adapter.attach(model)
    live = model(**BATCH).logits
    base = tiny_models.bert(seed=0)  # its classifier is untouched
    torch.testing.assert_close(opened_by_peft(base, tmp_path)(**BATCH).logits, live, rtol=1e-4, atol=1e-5)
    again, read_head = load_adapter(tmp_path)
    assert torch.equal(again.flat, adapter.flat)
    assert set(read_head) == set(head)
    assert all(torch.equal(read_head[name], value) for name, value in head.items())


def test_the_scaling_is_rounded_once_in_bf16() -> None:
    adapter = trained_adapter(tiny_models.llama(layers=1), scaling=0.3, dtype=torch.bfloat16)
    tensors = peft_tensors(adapter, adapter.flat.detach())
    for name, pair in adapter.factors(adapter().detach()).items():
        b = tensors[f"base_model.model.{name}.lora_B.weight"]
        assert b.dtype == torch.bfloat16
        # Half a unit in the last of 8 bits.
        torch.testing.assert_close(b.float(), 0.3 * pair.B.float(), rtol=2.0**-8, atol=0)
