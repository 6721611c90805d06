"""Rows of text pass the text model only: no tower of another sense and no projector is adapted, in any architecture."""

from typing import Any

import pytest
import tiny_models
import torch
from torch import nn

from taso_ds.adapters.adapter import TasoAdapter
from taso_ds.adapters.experts import find_experts
from taso_ds.adapters.peft_format import peft_config
from taso_ds.adapters.selection import CoreRegion
from taso_ds.adapters.targets import find_targets
from taso_ds.adapters.towers import inside, left_out_in_words, textless_parts
from taso_ds.errors import UserError

# What stands beside the text model, of every kind of configuration that comes with another sense by default.
LANGUAGE_MODELS = {
    "gemma3": ["model.vision_tower", "model.multi_modal_projector"],
    "got_ocr2": ["model.vision_tower", "model.multi_modal_projector"],
    "moss_transcribe_diarize": ["model.audio_tower", "model.multi_modal_projector"],
    "fuyu": ["model.vision_embed_tokens"],
    "git": ["git.image_encoder"],
    "phi4_multimodal": [
        "model.embed_tokens_extend.image_embed.img_processor",
        "model.embed_tokens_extend.audio_embed.encoder",
    ],
    "gemma3_text": [],
    "llama4": [],
    "blt": [],
    "opt": [],
}
CLASSIFIERS = {
    "gemma3": ["model.vision_tower", "model.multi_modal_projector"],
    "qwen3_5": ["model.visual"],
    "modernvbert": ["model.vision_model", "model.connector"],
    "t5gemma2": ["model.encoder.vision_tower"],  # its text model says that it takes images too
    "bart": [],
    "t5gemma": [],
}


def on_meta(model_type: str, *, head: bool) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    auto: Any = AutoModelForSequenceClassification if head else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(AutoConfig.for_model(model_type))


@pytest.mark.parametrize(
    ("model_type", "head", "parts"),
    [(name, False, parts) for name, parts in LANGUAGE_MODELS.items()]
    + [(name, True, parts) for name, parts in CLASSIFIERS.items()],
)
def test_what_text_never_passes_is_no_target_and_no_expert(model_type: str, head: bool, parts: list[str]) -> None:
    model = on_meta(model_type, head=head)
    assert textless_parts(model) == parts
    line = left_out_in_words(model)
    assert (line is None) is (not parts)
    assert all(part in str(line) for part in parts)
    for name in (*find_targets(model), *find_experts(model).sizes):
        assert not inside(name, parts), name
        assert not any(word in name for word in ("vision", "visual.", "image", "audio")), name


def test_a_gemma_4_that_sees_and_hears() -> None:
    from transformers import Gemma4AudioConfig, Gemma4Config, Gemma4ForConditionalGeneration, Gemma4VisionConfig

    config = Gemma4Config(vision_config=Gemma4VisionConfig().to_dict(), audio_config=Gemma4AudioConfig().to_dict())
    with torch.device("meta"):
        model = Gemma4ForConditionalGeneration(config)
    assert sorted(textless_parts(model)) == [
        f"model.{name}" for name in ("audio_tower", "embed_audio", "embed_vision", "vision_tower")
    ]
    assert all(name.startswith("model.language_model.layers.") for name in find_targets(model))


def test_the_parts_are_counted() -> None:
    model = on_meta("gemma3", head=False)
    number = sum(
        value.numel() for name, value in model.named_parameters() if "vision_tower" in name or "projector" in name
    )
    assert f" {number:,} of {model.num_parameters():,} parameters" in str(left_out_in_words(model))


def test_a_name_or_pattern_never_reaches_a_tower() -> None:
    model = on_meta("gemma3", head=False)
    assert all("language_model" in name for name in find_targets(model, ["q_proj", r".*\.[vk]_proj"]))
    with pytest.raises(UserError, match="'fc1' matches no linear"):
        find_targets(model, ["fc1"])


def test_a_tower_of_a_models_own_code_is_known_by_its_input() -> None:
    class Tower(nn.Module):
        main_input_name = "pixel_values"

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(2, 2)])

    model = nn.ModuleDict({"vision": Tower(), "layers": nn.ModuleList([nn.Linear(2, 2)])})
    assert list(find_targets(model)) == ["layers.0"]


def test_peft_opens_what_is_adapted_and_nothing_of_the_tower() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = tiny_models.gemma3()
    regions = {
        name: CoreRegion(torch.arange(1), torch.arange(1), shape.out_features, shape.in_features)
        for name, shape in find_targets(model).shapes.items()
    }
    config = peft_config(
        TasoAdapter(regions, structure="union", rank=1, scaling=1.0, seed=0, dtype=torch.float32),
        base_model_name_or_path="", task_type="CAUSAL_LM", module_names=[name for name, _ in model.named_modules()],
        fan_in_fan_out=False, modules_to_save=[],
    )  # fmt: skip
    inject_adapter_in_model(LoraConfig(r=2, target_modules=config["target_modules"]), model)
    opened = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert opened == list(regions)
