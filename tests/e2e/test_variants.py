"""One short training run per DeepSpeed JSON, from rows to files on two ranks: they all learn the same.

All runs are made by one set of ranks.
"""

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tiny_models
import torch
from forked import ForkServer
from launching import HAS_NVME, NO_NVME, call_main
from peft import PeftModel
from run_files import read_json, read_lines
from sample_rows import write_sentences, write_splits
from transformers import AutoModelForCausalLM

from taso_ds.config import parse_run_config
from taso_ds.distributed import process_group
from taso_ds.distributed.ds_config import read_ds_config, shipped_ds_configs
from taso_ds.interrupts import Interrupts
from taso_ds.runs.finished import evaluate
from taso_ds.runs.finished_arguments import EVALUATE, parse_over_run
from taso_ds.runs.join import join
from taso_ds.runs.train import train

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

STEPS = 2
UNPROVED = "--no_verify_export"
# The last is not shipped as such: one node of two ranks, each with a secondary shard of its own.
VARIANTS = [*(file.name for file in shipped_ds_configs()), "one_node_hpz.json"]
QUANTIZED = {
    "nf4": ["zero3_nf4.json", "--load_in_4bit"],
    "nf4_offload": ["zero3_offload.json", "--load_in_4bit", UNPROVED],
    "nf4_hpz": ["one_node_hpz.json", "--load_in_4bit", UNPROVED],
    "int8": ["zero3.json", "--load_in_8bit", UNPROVED],
}
# Flags of evaluate.py over a run at stage 3, and how near its loss is to the one recorded.
EVALUATED = {
    "zero3.json": ("", 1e-6), "zero3.json in bf16": ("--bf16", 3e-2), "nf4 in bf16": ("--bf16", 3e-2),
    "lora": ("", 1e-6), "lora in bf16": ("--bf16", 3e-2), "full": ("", 1e-6), "head": ("", 1e-6),
    "head in bf16": ("--bf16", 3e-2),
}  # fmt: skip
on_nvme = pytest.mark.skipif(not HAS_NVME, reason=NO_NVME)


def train_and_evaluate(cases: list[list[str]], again: list[list[str]], hub: str) -> list[dict[str, Any]]:
    """Train one run per case, one after another, then evaluate some again; returns their scores.

    Args:
        cases: flags of ``launch/train.py``.
        again: flags of ``launch/evaluate.py``.
        hub: the cache of the Hub.
    """
    from deepspeed.utils import groups

    huggingface_hub.constants.HF_HUB_CACHE = hub
    for flags in cases:
        config = parse_run_config(flags)
        join(config)
        train(config, Interrupts(process_group.give_up, resumes=True))
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # hpZ's, which DeepSpeed makes once in a process
        gc.collect()
    scores = []
    for flags in again:
        config, finished = parse_over_run(flags, verb=EVALUATE)
        scores.append(evaluate(config, finished.run))
        gc.collect()
    return scores


@pytest.fixture(scope="module")
def runs(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of every variant; the MLP is as small as DeepSpeed writes to a disk: 1 MB on each rank."""
    path: Path = tmp_path_factory.mktemp("variants")
    base = tiny_models.save(tiny_models.llama(layers=1, intermediate_size=16384), path / "base")
    write_splits(path, 12, 4)
    raw = read_ds_config("zero3_hpz.json")
    raw["zero_optimization"]["zero_hpz_partition_size"] = 2
    (path / "one_node_hpz.json").write_text(json.dumps(raw))
    flags = [
        *("--model_name_or_path", base, "--task", "completion", "--no_bf16", "--max_seq_length", "64"),
        *("--train_file", path / "train.jsonl", "--eval_file", path / "eval.jsonl", "--calibration_samples", "8"),
        *("--learning_rate", "1e-2", "--max_steps", STEPS, "--per_device_train_batch_size", "2"),
        *("--nvme_path", path / "disk"),
    ]
    # What a download leaves: the base as team/base in a Hub cache of this test.
    hub = path / "hub" / "models--team--base"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("0" * 40)
    shutil.copytree(base, hub / "snapshots" / ("0" * 40))
    more = {"hub": ["--ds_config", "zero3.json", "--model_name_or_path", "team/base", UNPROVED]}
    more |= {name: ["--ds_config", name, UNPROVED] for name in VARIANTS if HAS_NVME or "nvme" not in name}
    more |= {name: ["--ds_config", *extra] for name, extra in QUANTIZED.items()}
    more |= {name: ["--ds_config", "zero3.json", UNPROVED, "--method", name] for name in ("lora", "full")}
    more["full"] += ["--learning_rate", "1e-3"]
    train, held_out = (str(write_sentences(path / f"{name}.jsonl", 8)) for name in ("sentences", "held-out"))
    encoder = ["--model_name_or_path", str(tiny_models.save(tiny_models.bert(), path / "bert")), "--task", "sst2"]
    encoder += ["--train_file", train, "--eval_file", held_out]
    more["head"] = [*encoder, "--ds_config", "zero3.json", UNPROVED]
    cases = []
    for name, extra in more.items():
        own = [str(path / flag) if (path / flag).is_file() else flag for flag in extra]
        cases.append([*map(str, flags), *own, "--output_dir", str(path / "runs" / name)])
    again = [["--run", str(path / "runs" / name.split()[0]), *extra.split()] for name, (extra, _) in EVALUATED.items()]
    scores = fork_server.run_on_ranks(train_and_evaluate, 2, cases, again, str(hub.parent), timeout=500.0)
    (path / "evaluated.json").write_text(json.dumps(scores))
    return path / "runs"


def learned(run: Path) -> dict[str, Any]:
    lines, results = read_lines(run / "metrics.jsonl"), read_json(run / "results.json")
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


@pytest.mark.parametrize("name", EVALUATED)
def test_a_partitioned_run_is_evaluated_again(runs: Path, name: str) -> None:
    found = json.loads((runs.parent / "evaluated.json").read_text())[[*EVALUATED].index(name)]
    results = json.loads((runs / name.split()[0] / "results.json").read_text())
    assert found["loss"] == pytest.approx(results["after"]["loss"], rel=EVALUATED[name][1])
    assert abs(results["before"]["loss"] - found["loss"]) > 5 * abs(results["after"]["loss"] - found["loss"])


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantized_base_learns_nearly_the_same(runs: Path, name: str) -> None:
    expected, found = learned(runs / "zero1.json"), learned(runs / name)
    assert found["after"] < found["before"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=0.1)
    assert found["loss"] != pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["nf4_offload", "nf4_hpz"])
def test_a_quantized_base_learns_the_same_wherever_it_is(runs: Path, name: str) -> None:
    expected, found = learned(runs / "nf4"), learned(runs / name)
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-5), key


def test_the_export_is_proved_on_the_base_quantized_alike(runs: Path) -> None:
    proof = json.loads((runs / "nf4" / "results.json").read_text())["export"]
    assert proof["error"] <= proof["tolerance"] < 1e-2
    assert proof["effect"] > 10 * proof["tolerance"]


@pytest.mark.slow
def test_an_8_bit_export_is_proved_on_the_base_quantized_alike(runs: Path) -> None:
    finished = call_main("export", ["--run", runs / "int8"]).succeeded()
    assert any(line.startswith("opened with peft") for line in finished.lines)


def logits(folder: Path, *, adapter: Path | None = None) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.arange(3, 40)[None]).logits
    return found


def test_merging_a_quantized_run_adds_the_adapter_to_the_base_as_it_was(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "nf4", tmp_path / "run")
    finished = call_main("export", ["--run", run, "--merge"]).succeeded()
    assert any("the base as it was before the run quantized it" in line for line in finished.lines)
    base = runs.parent / "base"
    assert "quantization_config" not in json.loads((run / "model" / "config.json").read_text())
    expected, before = logits(base, adapter=run / "adapter"), logits(base)
    torch.testing.assert_close(logits(run / "model"), expected, rtol=1e-4, atol=1e-4)
    assert float((before - expected).norm() / before.norm()) > 0.01


@on_nvme
def test_the_base_was_on_the_disk(runs: Path) -> None:
    """Three MLP matrices of 2 MB in fp32, half of each on each rank, and nothing else as large."""
    written = sorted((runs.parent / "disk").rglob("*.swp"))
    assert [file.parent.name for file in written] == ["rank0"] * 3 + ["rank1"] * 3
    assert all(file.stat().st_size == 1 << 20 for file in written)
