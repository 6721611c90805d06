"""Models of which PEFT renames what it reads: an export is read as it was trained, or the run is refused."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from families import FAMILIES, build

from taso_ds.adapters.adapter import TasoAdapter
from taso_ds.adapters.selection import CoreRegion
from taso_ds.adapters.targets import find_targets
from taso_ds.methods.lora import Lora, attach_lora, detach_lora, lora_parameters
from taso_ds.methods.peft_names import fuses_experts, not_read_back
from taso_ds.methods.taso import Taso
from taso_ds.models.arguments import ModelArguments
from taso_ds.models.load import BaseModel
from taso_ds.models.spec import BaseSpec

BATCH = {key: value for key, value in tiny_models.token_batch().items() if key != "labels"}
# Dense layers beside experts; dense layers only, as the first ones are; experts that are described in no attribute.
RENAMED = ("deepseek_v3", "deepseek_v32", "longcat_flash")


def family(name: str, **options: Any) -> Any:
    (found,) = (entry for entry in FAMILIES if entry.name == name)
    return build(found, **options).requires_grad_(False)


def save(method: type[Taso] | type[Lora], model: Any, folder: Path) -> None:
    settings: Any = None  # saving needs no numbers of the run
    spec = BaseSpec(ModelArguments(model_name_or_path="base"), "base", model.config, head=False)
    method(settings).save(folder, BaseModel(spec, model))


def save_trained_taso(model: Any, folder: Path) -> Any:
    regions = {}
    for name, shape in find_targets(model).shapes.items():
        rows, cols = torch.arange(shape.out_features // 2), torch.arange(shape.in_features)
        regions[name] = CoreRegion(rows, cols, shape.out_features, shape.in_features)
    adapter = TasoAdapter(regions, structure="intersection", rank=1, scaling=1.0, seed=0, dtype=torch.float32)
    torch.nn.init.normal_(adapter.flat, std=0.2)
    adapter.attach(model)
    save(Taso, model, folder)
    live = model(**BATCH).logits
    adapter.detach(model)
    return live


def save_trained_lora(model: Any, folder: Path) -> Any:
    targets = list(find_targets(model))
    attach_lora(model, targets, rank=2, scaling=1.5, transposed=False)
    trained = lora_parameters(model)
    assert {name.partition(".lora_")[0] for name in trained} == set(targets)
    for parameter in trained.values():
        torch.nn.init.normal_(parameter, std=0.2)
    save(Lora, model, folder)
    live = model(**BATCH).logits
    detach_lora(model, targets)
    return live


@pytest.mark.parametrize("save_trained", [save_trained_taso, save_trained_lora], ids=["taso", "lora"])
@pytest.mark.parametrize("name", RENAMED)
def test_dense_layers_are_not_taken_for_experts(tmp_path: Path, name: str, save_trained: Any) -> None:
    """Whatever the model holds: PEFT decides by its type."""
    from peft import PeftModel

    model = family(name)
    base = model(**BATCH).logits
    live = save_trained(model, tmp_path / "adapter")
    assert torch.equal(model(**BATCH).logits, base)
    assert (live - base).abs().max() > 0.05
    opened = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    torch.testing.assert_close(opened(**BATCH).logits, live, rtol=1e-4, atol=1e-4)


def test_types_whose_experts_were_fused() -> None:
    assert all(fuses_experts(family(name, device="meta")) for name in RENAMED)
    assert not any(map(fuses_experts, (tiny_models.llama(), tiny_models.gpt_oss(), tiny_models.bert())))


@pytest.mark.parametrize("experts", [False, True])
def test_what_peft_does_not_read_back(experts: bool) -> None:
    """PEFT renames ``shared_experts`` of this type as if they were ``shared_expert``."""
    model = family("laguna", device="meta")
    lost = partial(not_read_back, model)
    assert lost(list(find_targets(model, experts=experts))) == [
        f"model.layers.1.mlp.shared_experts.{name}" for name in ("down_proj", "gate_proj", "up_proj")
    ]
    assert lost(list(find_targets(model, [r".*self_attn\.._proj", r".*\.0\.mlp\..*"]))) == []


@pytest.mark.parametrize("name", [*RENAMED, "qwen3_5_moe_text", "gemma3n_text", "bert"])
def test_what_peft_reads_back(name: str) -> None:
    model = family(name, device="meta")
    before = {key: value.shape for key, value in model.named_parameters()}
    assert not_read_back(model, list(find_targets(model))) == []
    assert {key: value.shape for key, value in model.named_parameters()} == before
