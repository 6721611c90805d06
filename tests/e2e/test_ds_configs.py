"""One short training run per DeepSpeed JSON, from rows to files on two ranks: they all learn the same."""

import json
from pathlib import Path
from typing import Any

import launching
import pytest
import tiny_models
from sample_rows import write_rows

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

STEPS = 2


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose MLP matrices are 1 MB on each of two ranks, the least that DeepSpeed puts on a disk."""
    return tiny_models.save(tiny_models.llama(intermediate_size=16384), tmp_path_factory.mktemp("wide"))


def train(name: str, base: Path, path: Path, *flags: str) -> dict[str, Any]:
    """Train two steps on two ranks and return what was recorded."""
    write_rows(path / "train.jsonl", 12)
    write_rows(path / "eval.jsonl", 4)
    run = path / name
    given = [
        *("--model_name_or_path", base, "--task", "completion", "--no_bf16", "--max_seq_length", "64"),
        *("--train_file", path / "train.jsonl", "--eval_file", path / "eval.jsonl", "--calibration_samples", "8"),
        *("--learning_rate", "1e-2", "--max_steps", str(STEPS), "--per_device_train_batch_size", "2"),
        *("--output_dir", run, "--ds_config", name, *flags),
    ]
    finished = launching.start("train", given, cwd=path, launcher="torchrun", ranks=2).succeeded()
    assert finished.errors == []
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((run / "results.json").read_text())
    assert results["export"]["error"] <= results["export"]["tolerance"]
    return {
        "loss": [line["loss"] for line in lines],
        "grad_norm": [line["grad_norm"] for line in lines],
        "before": results["before"]["loss"],
        "after": results["after"]["loss"],
    }


@pytest.fixture(scope="module")
def plain(wide_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train("zero1.json", wide_folder, tmp_path_factory.mktemp("plain"))


def assert_same(found: dict[str, Any], plain: dict[str, Any]) -> None:
    assert len(plain["loss"]) == STEPS
    assert plain["after"] < plain["before"]
    for key, value in plain.items():
        assert found[key] == pytest.approx(value, rel=1e-5), key


@pytest.mark.parametrize("name", ["zero2.json", "zero3.json", "zero3_offload.json"])
def test_variant_learns_the_same(name: str, wide_folder: Path, plain: dict[str, Any], tmp_path: Path) -> None:
    assert_same(train(name, wide_folder, tmp_path), plain)


def test_secondary_shards_learn_the_same(wide_folder: Path, plain: dict[str, Any], tmp_path: Path) -> None:
    """One node of two ranks, each with a secondary shard of its own."""
    raw = json.loads((Path(__file__).parents[2] / "ds_configs" / "zero3_hpz.json").read_text())
    raw["zero_optimization"]["zero_hpz_partition_size"] = 2
    (tmp_path / "hpz.json").write_text(json.dumps(raw))
    assert_same(train("hpz.json", wide_folder, tmp_path), plain)


def test_nvme_learns_the_same(wide_folder: Path, plain: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("no libaio: install libaio-dev")
    disk = tmp_path / "disk"
    assert_same(train("zero3_nvme.json", wide_folder, tmp_path, "--nvme_path", str(disk)), plain)
