"""The base and its head: which parameters train in full, whatever is attached."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from taso_ds.adapters.adapter import TasoAdapter
from taso_ds.adapters.selection import CoreRegion
from taso_ds.adapters.targets import find_targets
from taso_ds.distributed import comm
from taso_ds.distributed.zero_config import ZeroConfig
from taso_ds.errors import UserError
from taso_ds.methods.task_head import head_modules
from taso_ds.models.arguments import ModelArguments
from taso_ds.models.load import BaseModel, _said_by_each_rank, load_base_model
from taso_ds.models.source import model_source
from taso_ds.models.spec import BaseSpec, load_config, outside_body, read_spec

pytestmark = pytest.mark.usefixtures("on_cpu")

STAGE_0 = ZeroConfig({"zero_optimization": {"stage": 0}, "bf16": {"enabled": False}})


def load(folder: Path, *, head: bool, bf16: bool = False, num_labels: int | None = None) -> BaseModel:
    arguments = ModelArguments(model_name_or_path=str(folder), bf16=bf16)
    config = load_config(arguments, str(folder))
    if num_labels is not None:
        config.num_labels = num_labels
    return load_base_model(BaseSpec(arguments, str(folder), config, head), seed=0, zero=STAGE_0)


def test_a_language_model_is_frozen_and_has_no_head(llama_folder: Path) -> None:
    base = load(llama_folder, head=False)
    assert base.head_parameters == {}
    assert not any(value.requires_grad for value in base.model.parameters())
    assert base.model.config.use_cache is False
    assert base.model.dtype == torch.float32
    assert load(llama_folder, head=False, bf16=True).model.dtype == torch.bfloat16


def test_the_head_is_what_stands_outside_the_body(bert_folder: Path, llama_folder: Path) -> None:
    base = load(bert_folder, head=True)
    assert list(base.head_parameters) == ["classifier.weight", "classifier.bias"]
    wanted = [name for name, value in base.model.named_parameters() if value.requires_grad]
    assert wanted == list(base.head_parameters)
    assert list(load(llama_folder, head=True, num_labels=3).head_parameters) == ["score.weight"]


def without(folder: Path, lacking: str, to: Path) -> Path:
    """Copy a checkpoint without the tensors whose name holds this."""
    shutil.copytree(folder, to)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if lacking not in name}
    save_file(kept, to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_a_pooler_that_the_checkpoint_lacks_is_part_of_the_head(bert_folder: Path, tmp_path: Path) -> None:
    pooler = ["bert.pooler.dense.weight", "bert.pooler.dense.bias"]
    folder = without(bert_folder, "pooler", tmp_path / "bert")
    base = load(folder, head=True)
    assert list(base.head_parameters) == [*pooler, "classifier.weight", "classifier.bias"]
    assert [name for name, value in base.model.named_parameters() if value.requires_grad] == list(base.head_parameters)
    assert head_modules(base.model, base.head_parameters) == ["bert.pooler", "classifier"]
    # Before anything is loaded the same is known, where there are safetensors files to ask.
    for source, number in ((folder, 4), (bert_folder, 2), (tmp_path / "nowhere", 2)):
        assert len(dataclasses.replace(base.spec, source=str(source)).head_parameters) == number


@pytest.mark.parametrize("lacking", ["layer.1.output.dense.weight", "position_embeddings", "attention.self.query.bias"])
def test_a_body_that_would_stay_random_is_refused(bert_folder: Path, tmp_path: Path, lacking: str) -> None:
    with pytest.raises(UserError, match=rf"lacks bert\..*{lacking}"):
        load(without(bert_folder, lacking, tmp_path / "bert"), head=True)


HEADS = {
    "bert": ["bert.pooler", "classifier"],
    "albert": ["albert.pooler", "classifier"],
    "big_bird": ["bert.pooler", "classifier"],
    "mobilebert": ["classifier", "mobilebert.pooler"],
    "deberta-v2": ["classifier", "pooler"],  # outside the body: always part of the head
    "roberta": ["classifier"],
    "distilbert": ["classifier", "pre_classifier"],
    "modernbert": ["classifier", "head"],
    "modernvbert": ["base_model.model.head", "classifier"],  # its vision tower has a head too
    "llama": ["score"],
    "t5": ["classification_head"],
}


@pytest.mark.parametrize("model_type", HEADS)
def test_peft_trains_and_saves_the_head_and_nothing_else(model_type: str) -> None:
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoConfig, AutoModelForSequenceClassification

    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(model_type))
        pooler = frozenset(name for name, _ in model.named_parameters() if ".pooler." in name)
        head = outside_body(model, new_pooler=pooler)
        modules = head_modules(model, head)
        assert modules == HEADS[model_type]
        target = list(find_targets(model))[:1]
        config = LoraConfig(task_type="SEQ_CLS", r=1, target_modules=target, modules_to_save=list(modules))
        names = get_peft_model_state_dict(get_peft_model(model, config), save_embedding_layers=False)
    saved = {name.removeprefix("base_model.model.") for name in names if ".lora_" not in name}
    assert saved == set(head)


def test_a_head_that_is_part_of_the_body_is_refused() -> None:
    from transformers import PerceiverConfig

    with pytest.raises(UserError, match="PerceiverForSequenceClassification has no head of its own"):
        _ = BaseSpec(ModelArguments(model_name_or_path="some/model"), "some/model", PerceiverConfig(), head=True).meta


def test_an_attached_adapter_is_no_part_of_the_head(bert_folder: Path) -> None:
    base = load(bert_folder, head=True)
    regions = {
        name: CoreRegion(torch.arange(2), torch.arange(2), shape.out_features, shape.in_features)
        for name, shape in find_targets(base.model).shapes.items()
    }
    adapter = TasoAdapter(regions, structure="union", rank=1, scaling=1.0, seed=0, dtype=torch.float32)
    adapter.attach(base.model)
    assert list(base.head_parameters) == ["classifier.weight", "classifier.bias"]


def test_a_new_head_starts_the_same_every_time(llama_folder: Path) -> None:
    one, other = (load(llama_folder, head=True, num_labels=3).head_parameters["score.weight"] for _ in range(2))
    assert torch.equal(one, other)


def test_a_rank_that_cannot_tell_the_others_tells_the_user(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def load() -> None:
        raise UserError("no room left")

    with pytest.raises(UserError, match="no room left"):
        _said_by_each_rank(load)
    assert not caplog.records  # rank 0, whose error is printed as every error is
    monkeypatch.setattr(comm, "rank", lambda: 3)
    with pytest.raises(UserError, match="no room left"):
        _said_by_each_rank(load)
    assert [record.getMessage() for record in caplog.records] == ["rank 3: no room left"]


def test_a_tokenizer_that_is_a_sentencepiece_model_only_loads(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("the sun and the moon\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=280,
        model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    tiny_models.llama().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    tokenizer = read_spec(ModelArguments(), str(tmp_path)).tokenizer
    assert tokenizer.decode(tokenizer.encode("the moon", add_special_tokens=False)) == "the moon"


@pytest.mark.parametrize("read", [model_source, read_spec])
def test_a_gguf_file_that_is_named_as_the_model_or_not_at_all(tmp_path: Path, read: Any) -> None:
    (tmp_path / "tiny.gguf").touch()
    for name in (tmp_path, tmp_path / "tiny.gguf"):
        with pytest.raises(UserError, match=rf"pass --model_name_or_path {tmp_path} --gguf_file tiny\.gguf$"):
            read(ModelArguments(model_name_or_path=str(name)))
