"""What is written of a fully fine-tuned model."""

from pathlib import Path
from types import SimpleNamespace

import tiny_models
import torch
from safetensors.torch import load_file

from taso_ds.training.export import save_full
from taso_ds.training.run_folder import RunFolder


def test_a_full_model_keeps_the_buffers_its_checkpoint_has(tmp_path: Path) -> None:
    model = tiny_models.llama()
    # As a router's correction in DeepSeek-V3 and GLM-4: no parameter, but part of the checkpoint.
    model.model.register_buffer("correction", torch.full((3,), 3.0))
    model.model.register_buffer("table", torch.ones(3), persistent=False)
    save_full(RunFolder(tmp_path), model, SimpleNamespace(save_pretrained=lambda path: None))
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert stored.keys() == model.state_dict().keys()
    assert stored["model.correction"].tolist() == [3.0, 3.0, 3.0]
