"""A mixture of experts from rows to files, its experts adapted: proved with peft, evaluated again, merged."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from launching import Finished, call_main
from run_files import read_json
from safetensors.torch import load_file
from sample_rows import write_splits

from taso_ds.adapters.region_file import load_region_file

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

# Two layers with attention of 32·32, 32·16, 32·16, 32·32 and 4 experts of a (96, 32) and a (32, 48).
NUM_TARGETS = 2 * (4 + 4 * 2)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moe")
    tiny_models.save(tiny_models.mixtral(), path / "base")
    write_splits(path, 12, 4)
    return path


def call(path: Path, name: str, *flags: str) -> Finished:
    common: list[str | Path] = [
        *("--model_name_or_path", path / "base", "--task", "completion", "--max_seq_length", "64"),
        *("--train_file", path / "train.jsonl", "--eval_file", path / "eval.jsonl", "--calibration_samples", "8"),
        *("--learning_rate", "1e-2", "--max_steps", "4", "--ds_config", "zero0.json", "--alpha", "2"),
    ]
    return call_main("train", [*common, "--output_dir", path / name, *flags]).succeeded()


@pytest.fixture(scope="module")
def run(path: Path) -> Path:
    call(path, "run", "--no_bf16", "--adapt_experts")
    return path / "run"


def test_experts_have_regions_and_the_adapter_is_proved(run: Path) -> None:
    regions = load_region_file(run / "core_regions.safetensors").scores
    assert len(regions) == NUM_TARGETS
    assert sum(".experts." in name for name in regions) == 2 * 4 * 2
    results = read_json(run / "results.json")
    assert results["after"]["loss"] < results["before"]["loss"]
    assert results["export"]["error"] < 1e-5
    assert results["export"]["effect"] > 0.05
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert len(config["target_parameters"]) == 2 * 2


@pytest.mark.slow
def test_the_proof_tells_an_expert_that_is_not_in_the_file(run: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    changed = Path(shutil.copytree(run, tmp_path / "run"))
    file = changed / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "experts.base_layer.lora_B" in name)
    tensors[name][:, 1::4] += 0.5  # the columns of expert 1
    save_file(tensors, file, metadata={"format": "pt"})
    finished = call_main("export", ["--run", changed])
    assert finished.code == 2
    assert "differs from the live model" in finished.errors[0]


def test_evaluate_repeats_the_recorded_numbers(run: Path) -> None:
    finished = call_main("evaluate", ["--run", run]).succeeded()
    scores = json.loads(finished.lines[-1])
    assert scores["loss"] == pytest.approx(read_json(run / "results.json")["after"]["loss"], rel=1e-5)


def test_merges_into_a_plain_mixture(run: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    copied = Path(shutil.copytree(run, tmp_path / "run"))
    call_main("export", ["--run", copied, "--merge"]).succeeded()
    merged = AutoModelForCausalLM.from_pretrained(copied / "model", dtype=torch.float32).eval()
    base = AutoModelForCausalLM.from_pretrained(run.parent / "base", dtype=torch.float32).eval()
    ids = tiny_models.token_batch()["input_ids"]
    before = base(ids).logits
    adapted = PeftModel.from_pretrained(base, run / "adapter").eval()(ids).logits
    torch.testing.assert_close(merged(ids).logits, adapted, rtol=1e-4, atol=1e-4)
    assert float((before - adapted).norm() / before.norm()) > 0.05


@pytest.mark.slow
def test_bf16_is_proved_too(path: Path) -> None:
    call(path, "bf16", "--bf16", "--adapt_experts")
    proof = read_json(path / "bf16" / "results.json")["export"]
    assert proof["error"] < proof["tolerance"] < proof["effect"]


def test_experts_are_named_with_the_flag_that_takes_them_in(path: Path) -> None:
    told = call(path, "told", "--no_bf16", "--dry_run").out
    assert "experts: 36,864 of " in told
    assert "(--adapt_experts takes in those in fused parameters): model.layers.*.mlp.experts.down_proj" in told
    assert "targets: 8 matrices" in told
    told = call(path, "told", "--no_bf16", "--dry_run", "--adapt_experts").out
    assert "experts: " not in told
    assert f"targets: {NUM_TARGETS} matrices" in told
    # union at p = 0.1, rank 1: out + in and the core rows and columns. Attention: (32, 32) twice with 64 + 3 + 3,
    # (16, 32) twice with 48 + 1 + 3. An expert: (96, 32) with 128 + 9 + 3 and (32, 48) with 80 + 3 + 4.
    number = 2 * (2 * 70 + 2 * 52 + 4 * (140 + 87))
    assert f"parameters: {number:,} trainable of " in told
