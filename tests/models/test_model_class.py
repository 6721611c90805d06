"""Which class a base is loaded as, over all types of configuration, and one readable line where there is none."""

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

from taso_ds.errors import UserError
from taso_ds.models.arguments import ModelArguments
from taso_ds.models.model_class import choice_in_words, model_class, wants_head

CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
LABELS = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES


def config_of(model_type: str, *architectures: str) -> Any:
    config = AutoConfig.for_model(model_type)
    config.architectures = list(architectures) or None
    return config


def arguments(head: str = "auto") -> ModelArguments:
    return ModelArguments(model_name_or_path="some/model", head=head)


@pytest.mark.parametrize(
    ("model_type", "architecture", "head"),
    [
        ("llama", "LlamaForCausalLM", False),
        ("gpt2", "GPT2LMHeadModel", False),
        ("gemma3", "Gemma3ForConditionalGeneration", False),
        ("bert-generation", "BertGenerationDecoder", False),
        ("reformer", "ReformerModelWithLMHead", False),
        ("llama", "LlamaForSequenceClassification", True),
        ("bert", "BertForMaskedLM", True),
        ("bart", "BartForSequenceClassification", True),
        ("bart", "BartForCausalLM", False),
    ],
)
def test_the_named_class_decides(model_type: str, architecture: str, head: bool) -> None:
    config = config_of(model_type, architecture)
    assert wants_head(arguments(), config) is head
    assert (choice_in_words(arguments(), config) is None) is (architecture != "BertForMaskedLM")


@pytest.mark.parametrize(
    ("model_type", "architecture", "words"),
    [
        ("llama", "LlamaModel", ("classification", "names LlamaModel", "--head lm")),
        ("llama", None, ("classification", "names no architectures", "--head lm")),
        ("bert", "BertModel", ("classification", "names BertModel")),
        ("modernbert", None, ("classification", "names no architectures")),
        ("gemma4_text", "Gemma4TextModel", ("head: lm", "names Gemma4TextModel", "no classification head")),
    ],
)
def test_a_class_without_any_head_is_decided_aloud(
    model_type: str, architecture: str | None, words: tuple[str, ...]
) -> None:
    config = config_of(model_type, *filter(None, [architecture]))
    line = choice_in_words(arguments(), config)
    assert line is not None
    assert all(word in line for word in words), line
    assert wants_head(arguments(), config) is ("classification," in line)
    assert ("--head lm" in line) is (model_type == "llama")  # an encoder sees what it would predict
    assert choice_in_words(arguments("classification" if wants_head(arguments(), config) else "lm"), config) is None


def test_a_flag_decides_before_the_configuration() -> None:
    assert wants_head(arguments("classification"), config_of("llama", "LlamaForCausalLM"))
    assert not wants_head(arguments("lm"), config_of("llama", "LlamaModel"))


@pytest.mark.parametrize(
    ("model_type", "architecture", "head", "words"),
    [
        ("t5", "T5ForConditionalGeneration", "auto", ("an encoder-decoder", "--head classification")),
        ("bart", "BartForConditionalGeneration", "lm", ("an encoder-decoder", "--head classification")),
        ("whisper", "WhisperForConditionalGeneration", "auto", ("an encoder-decoder",)),
        ("llava", "LlavaForConditionalGeneration", "auto", ("LlavaForConditionalGeneration", "on text")),
        ("qwen2_audio", "Qwen2AudioForConditionalGeneration", "auto", ("on text",)),
        ("vit", "ViTForImageClassification", "auto", ("ViTForImageClassification", "on text")),
        ("wav2vec2", "Wav2Vec2ForCTC", "classification", ("on text",)),
        ("modernbert", "ModernBertForMaskedLM", "lm", ("a causal language model", "--head classification")),
        ("gemma4_text", "Gemma4ForCausalLM", "classification", ("a classification head", "--head lm")),
    ],
)
def test_a_class_that_is_not_there_is_one_line(
    model_type: str, architecture: str, head: str, words: tuple[str, ...]
) -> None:
    with pytest.raises(UserError, match=r"^model_name_or_path: some/model ") as caught:
        wants_head(arguments(head), config_of(model_type, architecture))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("names", ["IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM"])
def test_every_model_of_other_senses_is_loaded_by_its_class_or_refused(names: str) -> None:
    for model_type, architecture in getattr(modeling_auto, f"MODEL_FOR_{names}_MAPPING_NAMES").items():
        try:
            config = config_of(model_type, architecture)
        except (ValueError, KeyError):  # has no default configuration
            continue
        if model_type in CAUSAL and not config.is_encoder_decoder:
            assert not wants_head(arguments(), config), architecture
        else:
            with pytest.raises(UserError) as caught:
                wants_head(arguments(), config)
            assert len(str(caught.value)) < 250


def test_every_text_model_is_loaded_as_the_class_its_checkpoints_name() -> None:
    for head, table in ((False, CAUSAL), (True, LABELS)):
        for architecture in table.values():
            # Only names are compared: building 300 configurations takes longer than the rest of these tests.
            theirs = {model_class(head=head).__name__: "theirs"}
            config: Any = SimpleNamespace(architectures=[architecture], auto_map=theirs)
            assert wants_head(arguments(), config) is head, architecture


def test_code_that_comes_with_a_checkpoint_has_the_class() -> None:
    config: Any = SimpleNamespace(architectures=["OurForCausalLM"], auto_map={"AutoModelForCausalLM": "ours.Model"})
    assert not wants_head(arguments(), config)
