"""Models, region files and runs to make mistakes with, whole and damaged; each kind is made when it is first named."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_models
from launching import call_main
from mistakes import GOOD
from safetensors.torch import load_file, save_file
from sample_rows import write_splits

from taso_ds.adapters.region_file import KIND
from taso_ds.files.tensors import read_tensors, write_tensors

GPTQ = {"quant_method": "gptq", "bits": 4}


@pytest.fixture(scope="session")
def damaged_models(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("models")
    _damage_models(llama_folder, models)
    return models


@pytest.fixture(scope="session")
def damaged_runs(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, and beside them runs that have finished, ``regions`` of scoring alone."""
    runs = tmp_path_factory.mktemp("runs")
    good = [*GOOD.format(llama=llama_folder).split(), *write_splits(runs, 8, 8), "--max_steps", "1"]
    for script, name in (("calibrate", "regions"), ("train", "taso")):
        call_main(script, [*good, "--output_dir", runs / name]).succeeded()
    _damage_run(runs / "taso", runs)
    return runs


@pytest.fixture(scope="session")
def region_files(llama_folder: Path, gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The regions of several models, and damaged ones of the first."""
    regions, scratch = tmp_path_factory.mktemp("regions"), tmp_path_factory.mktemp("scored")
    others = {"seed1": tiny_models.llama(seed=1), "wide": tiny_models.llama(num_key_value_heads=4)}
    bases = {"llama": llama_folder, "gpt2": gpt2_folder}
    bases |= {name: tiny_models.save(model, scratch / "models" / name) for name, model in others.items()}
    rows = write_splits(scratch, 8, 8)
    for name, base in bases.items():
        folder = scratch / name
        call_main("calibrate", [*GOOD.format(llama=base).split(), *rows, "--output_dir", folder]).succeeded()
        shutil.copy(folder / "core_regions.safetensors", regions / f"{name}.safetensors")
    _damage_regions(regions)
    return regions


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _damage_models(good: Path, models: Path) -> None:
    names = (
        "no_config", "broken_config", "no_tokenizer", "broken_tokenizer", "truncated", "no_weights", "part", "shapes",
        "quantized", "gptq",
    )  # fmt: skip
    for name in names:
        shutil.copytree(good, models / name)
    shutil.copytree(good, models / "whole")
    shutil.copytree(good, models / "run" / "model")
    (models / "no_config" / "config.json").unlink()
    _truncate(models / "broken_config" / "config.json")
    for file in (models / "no_tokenizer").glob("token*"):
        file.unlink()
    _truncate(models / "broken_tokenizer" / "tokenizer.json")
    _truncate(models / "truncated" / "model.safetensors")
    for name, settings in (("quantized", {"quant_method": "bitsandbytes", "load_in_4bit": True}), ("gptq", GPTQ)):
        file = models / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": settings}))
    tiny_models.save(_odd_llama(), models / "odd")
    (models / "no_weights" / "model.safetensors").unlink()
    matrix = "model.layers.1.mlp.down_proj.weight"
    for name in ("part", "shapes"):
        file = models / name / "model.safetensors"
        tensors = load_file(file)
        whole = tensors.pop(matrix)
        if name == "shapes":
            tensors[matrix] = whole[:-1].contiguous()
        save_file(tensors, file, metadata={"format": "pt"})


def _odd_llama() -> object:
    """A Llama whose MLP matrices have an odd number of weights, which 4 bits each do not fill bytes with."""
    return tiny_models.llama(
        layers=1, hidden_size=9, head_dim=8, intermediate_size=9, num_attention_heads=1, num_key_value_heads=1,
        max_position_embeddings=64,
    )  # fmt: skip


def _damage_regions(regions: Path) -> None:
    good = regions / "llama.safetensors"
    shutil.copy(good, regions / "truncated.safetensors")
    _truncate(regions / "truncated.safetensors")
    (regions / "text.safetensors").write_text("core regions")
    tensors, metadata = read_tensors(good, kind=KIND)
    kept = {name: value for name, value in tensors.items() if not name.endswith("k_proj.row_counts")}
    write_tensors(regions / "part.safetensors", kept, metadata)


def _damage_run(good: Path, runs: Path) -> None:
    for name in ("broken", "empty", "truncated"):
        shutil.copytree(good, runs / name)
    _truncate(runs / "broken" / "run.json")
    (runs / "empty" / "run.json").write_text("{}")
    _truncate(runs / "truncated" / "adapter" / "taso_adapter.safetensors")
