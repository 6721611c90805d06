"""What a model's name becomes: a folder on this node."""

import json
import logging
import shutil
from pathlib import Path

import gguf_llama
import huggingface_hub.constants
import pytest
import tiny_models
import torch
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoModelForCausalLM, AutoTokenizer

from taso_ds.errors import UserError
from taso_ds.models.arguments import ModelArguments
from taso_ds.models.source import model_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache that holds team/tiny, as an earlier download leaves it; no network."""
    repository = tmp_path / "hub" / "models--team--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(llama_folder, repository / "snapshots" / COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return repository / "snapshots" / COMMIT


def test_a_folder_is_itself(llama_folder: Path) -> None:
    assert model_source(ModelArguments(model_name_or_path=str(llama_folder))) == str(llama_folder)


def test_a_hub_id_becomes_the_folder_of_the_cache(hub_cache: Path) -> None:
    found = model_source(ModelArguments(model_name_or_path="team/tiny"))
    assert Path(found) == hub_cache
    assert json.loads((Path(found) / "config.json").read_text())["model_type"] == "llama"


TOKENIZER = {"config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja"}
SHARDS = {"model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
OF_MISTRALS_OWN = {"consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "params.json"}
PICKLES = {"pytorch_model.bin", "original/consolidated.00.pth", "onnx/model.safetensors", "README.md", "figure.png"}


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({*TOKENIZER, *SHARDS, *PICKLES, *OF_MISTRALS_OWN}, {*TOKENIZER, *SHARDS, "params.json"}),
        ({*TOKENIZER, *PICKLES}, {*TOKENIZER, "pytorch_model.bin"}),
        ({*TOKENIZER, *PICKLES, "adapter_model.safetensors"},
         {*TOKENIZER, "pytorch_model.bin", "adapter_model.safetensors"}),
    ],
    ids=["safetensors", "pickles", "pickles beside an adapter"],
)  # fmt: skip
def test_the_hub_is_asked_for_one_copy_of_the_weights(
    files: set[str], wanted: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(
        name: str, *, revision: str, allow_patterns: list[str], ignore_patterns: list[str], tqdm_class: type
    ) -> str:
        for file in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert model_source(ModelArguments(model_name_or_path=f"team/of-{len(files)}-files")) == str(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == wanted


def test_a_model_that_is_nowhere_is_one_line(hub_cache: Path) -> None:
    with pytest.raises(UserError, match=r"cannot load team/other from the Hub \(no such folder is here\)") as caught:
        model_source(ModelArguments(model_name_or_path="team/other"))
    assert "\n" not in str(caught.value)


def test_a_gguf_file_is_dequantized_once_through_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TASO_CACHE", str(tmp_path / "cache"))
    caplog.set_level(logging.INFO, "taso_ds")
    model = tiny_models.llama(intermediate_size=64)
    gguf_llama.write(tmp_path / "tiny.gguf", model)
    arguments = ModelArguments(model_name_or_path=str(tmp_path), gguf_file="tiny.gguf")
    folder = Path(model_source(arguments))
    assert folder.parent == tmp_path / "cache" / "gguf"
    assert [record.getMessage() for record in caplog.records] == [
        f"dequantizing tiny.gguf through transformers into {folder} (once)"
    ]
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert found.dtype == torch.float32
    expected = model.state_dict()
    assert found.state_dict().keys() == expected.keys()
    for name, value in found.state_dict().items():
        if value.dim() == 1:
            assert torch.equal(value, expected[name])
            continue
        step = expected[name].abs().view(-1, 32).amax(1) / 127  # of the 32 weights that share a scale
        error = (value - expected[name]).abs().view(-1, 32).amax(1)
        assert bool((error <= 0.6 * step).all())  # half a step, and the scale in 16 bits
        assert bool(error.any())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("table").input_ids) == "table"
    caplog.clear()
    assert Path(model_source(arguments)) == folder
    assert not caplog.records
