"""The base and its head: which parameters train in full, whatever is attached."""

from pathlib import Path

import pytest
import tiny_models
import torch

from taso_ds.adapters.adapter import TasoAdapter
from taso_ds.adapters.selection import CoreRegion
from taso_ds.adapters.targets import find_targets, matrix_shape
from taso_ds.config import ModelArguments
from taso_ds.distributed import comm
from taso_ds.errors import UserError
from taso_ds.training.base_model import BaseModel, _said_by_each_rank, load_base_model, load_config, wants_head

STAGE_0 = {"zero_optimization": {"stage": 0}, "bf16": {"enabled": False}}


def load(folder: Path, *, head: bool, bf16: bool = False, num_labels: int | None = None) -> BaseModel:
    arguments = ModelArguments(model_name_or_path=str(folder), bf16=bf16)
    config = load_config(arguments, str(folder))
    if num_labels is not None:
        config.num_labels = num_labels
    return load_base_model(arguments, str(folder), config, head=head, seed=0, ds_config=STAGE_0)


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm, "device", lambda: torch.device("cpu"))


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


def test_an_attached_adapter_is_no_part_of_the_head(bert_folder: Path) -> None:
    base = load(bert_folder, head=True)
    regions = {
        name: CoreRegion(torch.arange(2), torch.arange(2), shape.out_features, shape.in_features)
        for name, module in find_targets(base.model).items()
        if (shape := matrix_shape(module)) is not None
    }
    adapter = TasoAdapter(regions, structure="union", rank=1, scaling=1.0, seed=0, dtype=torch.float32)
    adapter.attach(base.model)
    assert list(base.head_parameters) == ["classifier.weight", "classifier.bias"]


def test_a_new_head_starts_the_same_every_time(llama_folder: Path) -> None:
    one, other = (load(llama_folder, head=True, num_labels=3).head_parameters["score.weight"] for _ in range(2))
    assert torch.equal(one, other)


def test_a_model_without_an_output_layer_wants_a_head() -> None:
    bert, llama = tiny_models.bert().config, tiny_models.llama().config
    llama.architectures, bert.architectures = ["LlamaForCausalLM"], ["BertModel"]
    assert [wants_head(ModelArguments(), config) for config in (llama, bert)] == [False, True]
    assert wants_head(ModelArguments(head="classification"), llama)
    assert not wants_head(ModelArguments(head="lm"), bert)


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
