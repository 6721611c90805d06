"""What is written of a fully fine-tuned model, and what cannot be merged."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file

from taso_ds.adapters.adapter import TasoAdapter
from taso_ds.adapters.selection import CoreRegion
from taso_ds.errors import UserError
from taso_ds.methods.disk_tensors import DiskTensors
from taso_ds.methods.full import Full
from taso_ds.methods.merge import describe_merged, merge_adapter
from taso_ds.models.load import BaseModel


def test_a_full_model_keeps_the_buffers_its_checkpoint_has(tmp_path: Path) -> None:
    model = tiny_models.llama()
    # As a router's correction in DeepSeek-V3 and GLM-4: no parameter, but part of the checkpoint.
    model.model.register_buffer("correction", torch.full((3,), 3.0))
    model.model.register_buffer("table", torch.ones(3), persistent=False)
    settings: Any = None  # saving needs none
    spec: Any = SimpleNamespace(head=False, tokenizer=SimpleNamespace(save_pretrained=lambda path: None))
    Full(settings).save(tmp_path / "model", BaseModel(spec, model))
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert stored.keys() == model.state_dict().keys()
    assert stored["model.correction"].tolist() == [3.0, 3.0, 3.0]


def test_one_weight_does_not_take_up_two_deltas(tmp_path: Path) -> None:
    """Zamba's attention blocks are modules of their own around the same weights, and adapted one by one."""
    model = tiny_models.llama()
    first, second = (layer.self_attn.q_proj for layer in model.model.layers)
    second.weight = first.weight
    names = [f"model.layers.{number}.self_attn.q_proj" for number in range(2)]
    region = CoreRegion(torch.tensor([0]), torch.tensor([0]), 32, 32)
    adapter = TasoAdapter(
        dict.fromkeys(names, region), structure="union", rank=1, scaling=1.0, seed=0, dtype=torch.float32
    )
    deltas = {name: partial(adapter.delta_weight, name) for name in names}
    with DiskTensors(tmp_path) as disk, pytest.raises(UserError, match=f"merge: .*{names[0]} and as {names[1]}"):
        merge_adapter(model, deltas, disk)


def test_a_merge_that_rounds_the_training_away_says_so() -> None:
    in_bf16 = describe_merged(8.5e-3, 7.8e-3, dtype=torch.bfloat16)
    assert in_bf16 == (
        "merged: logits differ from the adapter's by 8.5e-03, the adapter moves them by 7.8e-03; bfloat16 rounds much"
        " of that away, --no_bf16 merges in float32"
    )
    assert "rounds" not in describe_merged(8.5e-3, 7.8e-2, dtype=torch.bfloat16)
    assert "rounds" not in describe_merged(0.0, 0.0, dtype=torch.float32)
