"""One short training run per DeepSpeed JSON, from rows to files on two ranks: they all learn the same.

All runs share one launch: most of its time is the start.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import variants_worker
from launching import HAS_NVME, NO_NVME, run_ranks
from sample_rows import write_rows

from taso_ds.distributed.ds_config import read_ds_config, shipped_ds_configs

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

STEPS = 2
# The last is not shipped as such: one node of two ranks, each with a secondary shard of its own.
VARIANTS = [*(file.name for file in shipped_ds_configs()), "one_node_hpz.json"]
on_nvme = pytest.mark.skipif(not HAS_NVME, reason=NO_NVME)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of every variant; the MLP is as small as DeepSpeed writes to a disk: 1 MB on each rank."""
    path: Path = tmp_path_factory.mktemp("variants")
    base = tiny_models.save(tiny_models.llama(layers=1, intermediate_size=16384), path / "base")
    write_rows(path / "train.jsonl", 12)
    write_rows(path / "eval.jsonl", 4)
    raw = read_ds_config("zero3_hpz.json")
    raw["zero_optimization"]["zero_hpz_partition_size"] = 2
    (path / "one_node_hpz.json").write_text(json.dumps(raw))
    flags = [
        *("--model_name_or_path", base, "--task", "completion", "--no_bf16", "--max_seq_length", "64"),
        *("--train_file", path / "train.jsonl", "--eval_file", path / "eval.jsonl", "--calibration_samples", "8"),
        *("--learning_rate", "1e-2", "--max_steps", STEPS, "--per_device_train_batch_size", "2"),
        *("--nvme_path", path / "disk", "--no_verify_export"),
    ]
    # What a download leaves: the base as team/base in a Hub cache of this test.
    hub = path / "hub" / "models--team--base"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("0" * 40)
    shutil.copytree(base, hub / "snapshots" / ("0" * 40))
    more = {
        "hub": ["--ds_config", "zero3.json", "--model_name_or_path", "team/base"],
        "nf4": ["--ds_config", "zero3_nf4.json", "--load_in_4bit"],
    }
    cases = [[*map(str, flags), *extra, "--output_dir", str(path / "runs" / name)] for name, extra in more.items()]
    for name in VARIANTS:
        if "nvme" in name and not HAS_NVME:
            continue
        ds_config = path / name if (path / name).is_file() else name
        cases.append([str(flag) for flag in (*flags, "--ds_config", ds_config, "--output_dir", path / "runs" / name)])
    (path / "cases.json").write_text(json.dumps(cases))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_CACHE", str(hub.parent))
        run_ranks(variants_worker.__file__, 2, [path / "cases.json"], timeout=500.0)
    return path / "runs"


def learned(run: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((run / "results.json").read_text())
    found = {key: [line[key] for line in lines] for key in ("loss", "grad_norm")}
    return found | {when: results[when]["loss"] for when in ("before", "after")}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[on_nvme] * ("nvme" in name)) for name in VARIANTS])
def test_every_variant_learns_what_stage_1_learns(runs: Path, name: str) -> None:
    expected, found = learned(runs / "zero1.json"), learned(runs / name)
    assert len(expected["loss"]) == STEPS
    assert expected["after"] < expected["before"]
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-5), key


def test_a_base_from_the_hub_is_the_same_base(runs: Path) -> None:
    assert learned(runs / "hub") == learned(runs / "zero3.json")


def test_an_nf4_base_learns_nearly_the_same(runs: Path) -> None:
    expected, found = learned(runs / "zero1.json"), learned(runs / "nf4")
    assert found["after"] < found["before"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=0.1)
    assert found["loss"] != pytest.approx(expected["loss"], rel=1e-5)


@on_nvme
def test_the_base_was_on_the_disk(runs: Path) -> None:
    """Three MLP matrices of 2 MB in fp32, half of each on each rank, and nothing else as large."""
    written = sorted((runs.parent / "disk").rglob("*.swp"))
    assert [file.parent.name for file in written] == ["rank0"] * 3 + ["rank1"] * 3
    assert all(file.stat().st_size == 1 << 20 for file in written)
