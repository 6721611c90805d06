"""Runs of every method are opened again: evaluated, proved and merged, in either dtype, and refused where they differ.

All in this process. The proof's process is a call here as well; ``test_train`` starts real ones.
"""

import io
import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from launching import Finished, call_main
from mistakes import assert_one_line, unchanged
from safetensors.torch import load_file, save_file
from sample_rows import write_rows, write_sentences
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

from taso_ds.methods import fresh_process, prove

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

METHODS = ("taso", "lora", "full")
SAVED = {"taso": "adapter", "lora": "adapter", "full": "model"}
COMMON = (
    "--max_seq_length 64 --ds_config zero0.json --max_steps 3 --calibration_samples 4 --core_fraction 0.25 --alpha 3"
    " --learning_rate 2e-2 --global_batch_size 4 --no_verify_export"
)


@pytest.fixture(scope="module")
def runs(llama_folder: Path, bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of finished runs, as <method>-<dtype> of a language model and <method>-head of an encoder."""
    path: Path = tmp_path_factory.mktemp("runs")
    data = tmp_path_factory.mktemp("rows")
    rows = [write_rows(data / f"{split}.jsonl", 8) for split in ("train", "eval")]
    sentences = [write_sentences(data / f"{split}_sentences.jsonl", 8) for split in ("train", "eval")]
    kinds = {
        "fp32": (llama_folder, "completion", rows, "--no_bf16"),
        "bf16": (llama_folder, "completion", rows, "--bf16"),
        "head": (bert_folder, "sst2", sentences, "--no_bf16"),
    }
    for kind, (base, task, (train, evaluation), dtype) in kinds.items():
        for method in METHODS:
            flags = f"{COMMON} {dtype} --method {method} --model_name_or_path {base} --task {task}"
            flags += f" --train_file {train} --eval_file {evaluation} --output_dir {path / f'{method}-{kind}'}"
            flags += " --learning_rate 2e-3" if method == "full" else ""
            call_main("train", flags.split()).succeeded()
    return path


@pytest.fixture
def _proved_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prove in this process, which saves the start of another."""

    def run(command: Sequence[str], **_options: Any) -> Any:
        out = io.StringIO()
        with redirect_stdout(out):
            fresh_process.main(command[-1])
        return subprocess.CompletedProcess(command, 0, out.getvalue(), "")

    monkeypatch.setattr(prove, "subprocess", SimpleNamespace(run=run))


@pytest.fixture
def copied(runs: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Return a copy of a run, which a test may change."""
    return lambda name: shutil.copytree(runs / name, tmp_path / "run")


def evaluated(run: Path, *flags: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(call_main("evaluate", ["--run", run, *flags]).succeeded().lines[-1])
    return found


def after(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "results.json").read_text())["after"]
    return found


def said(finished: Finished, *words: str) -> bool:
    return any(all(word in line for word in words) for line in finished.lines)


# Evaluate -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fp32", "bf16", "head"])
@pytest.mark.parametrize("method", METHODS)
def test_evaluate_repeats_the_recorded_numbers(method: str, kind: str, runs: Path) -> None:
    run = runs / f"{method}-{kind}"
    with unchanged(run):
        found = evaluated(run)
    assert {key: found[key] for key in after(run)} == pytest.approx(after(run), rel=1e-6)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "head"])
@pytest.mark.parametrize("method", METHODS)
def test_evaluate_in_the_other_dtype(method: str, kind: str, runs: Path) -> None:
    """Logits in bf16 have 8 bits: their loss is that of fp32 to some percent, and not that of the base."""
    run = runs / f"{method}-{kind}"
    found = evaluated(run, "--no_bf16" if kind == "bf16" else "--bf16")
    assert found["loss"] == pytest.approx(after(run)["loss"], rel=3e-2)
    base = json.loads((run / "results.json").read_text())["before"]["loss"]
    assert abs(found["loss"] - base) > 5 * abs(found["loss"] - after(run)["loss"])


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("name", ["taso-fp32", "taso-bf16", "lora-fp32", "lora-bf16", "taso-head", "lora-head"])
def test_evaluate_on_a_quantized_base_in_the_other_dtype(name: str, bits: str, runs: Path) -> None:
    found = evaluated(runs / name, f"--load_in_{bits}", "--no_bf16" if name.endswith("bf16") else "--bf16")
    assert found["loss"] == pytest.approx(after(runs / name)["loss"], rel=0.2)


@pytest.mark.parametrize("method", METHODS)
def test_evaluate_on_other_ranks_stages_and_rows(method: str, runs: Path, tmp_path: Path) -> None:
    """A run of global batches of 4 opens where 3 rows make a micro-batch, and on rows it did not see."""
    run = runs / f"{method}-fp32"
    rows = write_rows(tmp_path / "others.jsonl", 5)
    found = evaluated(run, "--ds_config", "zero3.json", "--eval_file", str(rows), "--per_device_eval_batch_size", "3")
    assert found["num_examples"] == 5
    plain = evaluated(run, "--eval_file", str(rows))
    assert found["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert found["loss"] != after(run)["loss"]


@pytest.mark.parametrize("method", METHODS)
def test_a_host_need_not_hold_what_training_would_need(
    method: str, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between what loading takes and what scoring and training would."""
    run = runs / f"{method}-fp32"
    monkeypatch.setattr("taso_ds.planning.host_check.available_host_bytes", lambda: 2.5e5)
    evaluated(run)
    flags = json.loads((run / "run.json").read_text())["config"]
    again = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    assert_one_line(call_main("train", [*again, "--output_dir", "elsewhere"]), "host memory: ")


# Prove ----------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_proved_here")
@pytest.mark.parametrize("flag", ["", "--bf16", "--no_bf16"])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "head"])
@pytest.mark.parametrize("method", METHODS)
def test_export_proves_in_either_dtype(method: str, kind: str, flag: str, runs: Path) -> None:
    run = runs / f"{method}-{kind}"
    finished = call_main("export", ["--run", run, *flag.split()]).succeeded()
    assert finished.lines[-1] == f"EXPORT {run / SAVED[method]}"
    assert said(finished, "opened with transformers" if method == "full" else "opened with peft", "logits differ by")


@pytest.mark.usefixtures("_proved_here")
def test_a_training_proves_its_model(runs: Path, tmp_path: Path) -> None:
    """What was trained is still in memory then, not read back from the files."""
    config = json.loads((runs / "full-fp32" / "run.json").read_text())["config"]
    flags = [f"--{name}={value}" for name, value in config.items() if value is not None]
    call_main("train", [*flags, "--output_dir", tmp_path / "run"]).succeeded()
    found = json.loads((tmp_path / "run" / "results.json").read_text())["export"]
    assert found["effect"] is None
    assert found["error"] <= found["tolerance"] < 1e-3


@pytest.mark.usefixtures("_proved_here")
@pytest.mark.parametrize("method", ["lora", "full"])
def test_export_tells_what_transformers_and_peft_do_not_take_up(method: str, copied: Any) -> None:
    run = copied(f"{method}-fp32")
    file = run / ("adapter/adapter_model.safetensors" if method == "lora" else "model/model.safetensors")
    save_file(load_file(file) | {"base_model.model.extra": torch.ones(2)}, file, metadata={"kind": '"peft_lora"'})
    words = "has a trained extra" if method == "lora" else "did not take up base_model.model.extra"
    assert_one_line(call_main("export", ["--run", run]), words)


@pytest.mark.usefixtures("_proved_here")
def test_export_tells_settings_that_peft_reads_and_the_run_had_not(copied: Any) -> None:
    file = copied("lora-fp32") / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"alpha_pattern": {"q_proj": 50}}))
    assert_one_line(call_main("export", ["--run", file.parents[1]]), "differs from the live model")


# Merge ----------------------------------------------------------------------------------------------------------------


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.arange(3, 40)[None]).logits
    return found


@pytest.mark.parametrize("flag", ["", "--bf16", "--no_bf16"])
@pytest.mark.parametrize("name", ["taso-fp32", "taso-bf16", "taso-head", "lora-fp32", "lora-bf16", "lora-head"])
def test_merge_makes_a_plain_model(name: str, flag: str, copied: Any) -> None:
    """In the dtype that was asked for, computing what peft computes."""
    from peft import PeftModel

    run = copied(name)
    finished = call_main("export", ["--run", run, "--merge", *flag.split()]).succeeded()
    assert finished.lines[-1] == f"EXPORT {run / 'model'}"
    assert said(finished, "merged: logits differ from the adapter's by", "the adapter moves them by")
    assert not said(finished, "rounds much of that away")
    config = json.loads((run / "run.json").read_text())["config"]
    model_class: Any = AutoModelForSequenceClassification if "head" in name else AutoModelForCausalLM
    base = model_class.from_pretrained(config["model_name_or_path"], dtype=torch.float32)
    before, names = logits(base), set(base.state_dict())
    merged, loaded = model_class.from_pretrained(run / "model", output_loading_info=True)
    assert set(merged.state_dict()) == names
    assert not any(loaded[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    dtype = flag or ("--bf16" if config["bf16"] else "--no_bf16")
    assert merged.dtype == (torch.bfloat16 if dtype == "--bf16" else torch.float32)
    expected = logits(PeftModel.from_pretrained(base, run / "adapter"))
    error = float((logits(merged.float()) - expected).norm() / expected.norm())
    rounded = "bf16" in (name.split("-")[1], dtype.strip("-"))
    assert error < (3e-2 if rounded else 1e-5)
    assert error < 0.3 * float((before - expected).norm() / expected.norm())


def test_merge_a_lora_of_transposed_weights(gpt2_folder: Path, runs: Path, tmp_path: Path) -> None:
    config = json.loads((runs / "lora-fp32" / "run.json").read_text())["config"]
    flags = f"{COMMON} --no_bf16 --method lora --rank 2 --model_name_or_path {gpt2_folder} --task completion"
    flags += f" --train_file {config['train_file']} --eval_file {config['eval_file']} --output_dir {tmp_path / 'run'}"
    call_main("train", flags.split()).succeeded()
    run = tmp_path / "run"
    assert evaluated(run)["loss"] == pytest.approx(after(run)["loss"], rel=1e-6)
    call_main("export", ["--run", run, "--merge"]).succeeded()  # which compares the logits itself


def test_a_full_model_needs_no_merge(runs: Path) -> None:
    with unchanged(runs / "full-fp32"):
        finished = call_main("export", ["--run", runs / "full-fp32", "--merge"])
    assert_one_line(finished, "merge", "model is a plain model already")


# Refused --------------------------------------------------------------------------------------------------------------


def _cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


DAMAGE: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "no adapter": ("lora", lambda run: shutil.rmtree(run / "adapter"), ("adapter does not exist", "no training has")),
    "no model": ("full", lambda run: shutil.rmtree(run / "model"), ("model does not exist", "start its command again")),
    "no TASO": ("taso", lambda run: shutil.rmtree(run / "adapter"), ("adapter does not exist", "no training has")),
    "no weights": ("lora", lambda run: (run / "adapter" / "adapter_model.safetensors").unlink(),
                   ("adapter_model.safetensors: no such file",)),
    "no settings": ("lora", lambda run: (run / "adapter" / "adapter_config.json").unlink(),
                    ("adapter: incomplete", "adapter_config.json")),
    "cut short": ("lora", lambda run: _cut_short(run / "adapter" / "adapter_model.safetensors"),
                  ("adapter_model.safetensors", "not a readable safetensors file")),
    "settings cut short": ("lora", lambda run: _cut_short(run / "adapter" / "adapter_config.json"),
                           ("adapter_config.json",)),
    "model cut short": ("full", lambda run: _cut_short(run / "model" / "model.safetensors"), ("damaged, copy it",)),
    "no configuration of the model": ("full", lambda run: (run / "model" / "config.json").unlink(), ("model",)),
}  # fmt: skip


def _change_tensors(change: Any) -> Any:
    def damage(run: Path) -> None:
        file = run / "adapter" / "adapter_model.safetensors"
        tensors = load_file(file)
        change(tensors, next(name for name in tensors if name.endswith("q_proj.lora_A.weight")))
        save_file(tensors, file, metadata={"kind": '"peft_lora"'})

    return damage


def _change_settings(**values: Any) -> Any:
    def damage(run: Path) -> None:
        file = run / "adapter" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return damage


for _name, _change, _words in (
    ("half a pair", lambda tensors, name: tensors.pop(name), ("no lora_A for", "q_proj")),
    ("the other half", lambda tensors, name: tensors.pop(name.replace("lora_A", "lora_B")), ("q_proj.lora_B",)),
    ("other rank", lambda tensors, name: tensors.update({name: tensors[name].repeat(2, 1)}), ("at rank 1",)),
    ("no matrix", lambda tensors, name: tensors.update({name: tensors[name][0].clone()}), ("at rank 1",)),
    ("integers", lambda tensors, name: tensors.update({name: tensors[name].int()}), ("floating-point",)),
):
    DAMAGE[_name] = ("lora", _change_tensors(_change), ("adapter: incomplete or inconsistent", *_words))
for _name, _key, _value in (
    ("no rank", "r", None), ("rank of text", "r", "1"), ("rank of truth", "r", True), ("no alpha", "lora_alpha", []),
    ("rank 0", "r", 0),
):  # fmt: skip
    DAMAGE[_name] = ("lora", _change_settings(**{_key: _value}), ("adapter: incomplete or inconsistent", "r "))


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_run_is_refused_before_weights_load(name: str, copied: Any, forbid_weights: None) -> None:
    method, damage, words = DAMAGE[name]
    run = copied(f"{method}-fp32")
    damage(run)
    with unchanged(run):
        for script in ("evaluate", "export"):
            assert_one_line(call_main(script, ["--run", run]), *words)


# Flags over the record ------------------------------------------------------------------------------------------------

# of which run, script, flags, what the one line says or None where they act
FLAGS: tuple[tuple[str, str, str, tuple[str, ...] | None], ...] = (
    # what the run decided
    ("taso-fp32", "evaluate", "--structure intersection", ("structure", "'union'", "drop --structure")),
    ("taso-fp32", "evaluate", "--rank 4", ("rank: 4", "has 1", "drop --rank")),
    ("taso-fp32", "evaluate", "--core_fraction 0.5", ("core_fraction: 0.5", "has 0.25")),
    ("taso-fp32", "evaluate", "--core_regions r.safetensors", ("core_regions", "drop --core_regions")),
    ("taso-fp32", "evaluate", "--importance_weights original", ("importance_weights",)),
    ("lora-fp32", "evaluate", "--alpha 1", ("alpha: 1.0", "has 3.0")),
    ("lora-fp32", "evaluate", "--target_modules q_proj", ("target_modules", "has None")),
    ("lora-fp32", "export", "--method taso", ("method: 'taso'", "has 'lora'")),
    ("lora-fp32", "export", "--adapt_experts", ("adapt_experts",)),
    ("full-fp32", "evaluate", "--learning_rate 1", ("learning_rate", "drop --learning_rate")),
    ("full-fp32", "evaluate", "--global_batch_size 8", ("global_batch_size: 8", "has 4")),
    ("full-fp32", "evaluate", "--seed 1", ("seed: 1", "has 0")),
    ("full-fp32", "evaluate", "--model_name_or_path {gpt2}", ("model_name_or_path", "drop --model_name_or_path")),
    ("full-fp32", "export", "--tokenizer_name {gpt2}", ("tokenizer_name",)),
    # what says how a training goes, or belongs to the other script
    ("taso-fp32", "evaluate", "--merge", ("merge", "drop --merge")),
    ("taso-fp32", "evaluate", "--dry_run", ("dry_run: evaluate has none",)),
    ("taso-fp32", "export", "--merge --dry_run", ("dry_run: export has none",)),
    ("taso-fp32", "evaluate", "--resume none", ("resume", "drop --resume")),
    ("taso-fp32", "export", "--no_verify_export", ("verify_export", "drop --verify_export")),
    ("taso-fp32", "export", "--merge --output_dir elsewhere", ("output_dir", "drop --output_dir")),
    ("taso-fp32", "export", "--overwrite_output_dir", ("overwrite_output_dir",)),
    ("taso-fp32", "export", "--ds_config zero3.json", ("ds_config", "has 'zero0.json'")),
    ("taso-fp32", "export", "--max_new_tokens 7", ("max_new_tokens",)),
    ("taso-fp32", "export", "--merge --load_in_4bit", ("load_in_4bit: True", "has False")),
    # another base, task or head
    ("taso-fp32", "evaluate", "--model_name_or_path {gpt2}", ("the adapter in", "this base does not have")),
    ("lora-fp32", "evaluate", "--model_name_or_path {gpt2}", ("the adapter in", "this base does not have")),
    ("lora-fp32", "evaluate", "--model_name_or_path {wide}", ("k_proj, which this base does not have in that shape",)),
    ("lora-fp32", "export", "--merge --model_name_or_path {wide}", ("k_proj, which this base does not have",)),
    ("taso-head", "evaluate", "--task stsb --eval_file {pairs} --train_file {pairs}", ("classifier", "for task stsb")),
    ("lora-head", "evaluate", "--task stsb --eval_file {pairs} --train_file {pairs}", ("classifier", "for task stsb")),
    ("full-head", "evaluate", "--task stsb --eval_file {pairs} --train_file {pairs}", ("holds classifier",)),
    ("taso-fp32", "evaluate", "--task sst2 --data_dir {data} --head classification", ("has no score.weight",)),
    ("lora-head", "evaluate", "--head lm --task sst2", ("has a trained classifier",)),
    ("full-fp32", "evaluate", "--load_in_4bit", ("load_in_4bit: True cannot apply", "has False")),
    # what opens it
    ("taso-fp32", "evaluate", "--attn_implementation eager --max_seq_length 32", None),
    ("lora-fp32", "evaluate", "--ds_config zero3.json --rank 1 --method lora", None),
    ("full-fp32", "evaluate", "--ds_config zero2.json --attn_implementation eager", None),
    ("lora-fp32", "evaluate", "--load_in_8bit", None),
    ("taso-nf4", "evaluate", "--load_in_4bit False", None),
    ("taso-nf4", "evaluate", "--load_in_8bit", None),
    ("lora-fp32", "evaluate", "--task sst2 --data_dir {data}", None),  # the recorded files belong to another task
    ("full-fp32", "evaluate", "--task sst2 --data_dir {data}", None),
    ("taso-head", "evaluate", "--data_dir {data}", None),
    ("full-head", "evaluate", "--data_dir {data}", None),
    ("lora-fp32", "evaluate", "--config {yaml}/same.yaml", None),
    ("taso-gguf", "evaluate", "--model_name_or_path {llama}", None),  # the recorded file lies in another folder
)


@pytest.fixture(scope="module")
def places(
    llama_folder: Path, gpt2_folder: Path, runs: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Bases, rows and YAML that a flag can name, and two runs that only these flags need."""
    path = tmp_path_factory.mktemp("places")
    wide = tiny_models.llama().config
    wide.num_key_value_heads = 4
    (path / "data" / "sst2").mkdir(parents=True)
    for split in ("train", "validation"):
        write_sentences(path / "data" / "sst2" / f"{split}.jsonl", 6)
    pair = {"sentence1": "sun", "sentence2": "moon", "label": 2.5}
    (path / "pairs.jsonl").write_text(f"{json.dumps(pair)}\n" * 4)
    (path / "same.yaml").write_text("method: lora\nrank: 1\nper_device_eval_batch_size: 2\n")
    found: dict[str, Any] = {"llama": llama_folder, "gpt2": gpt2_folder, "data": path / "data", "yaml": path}
    found |= {"wide": tiny_models.save(LlamaForCausalLM(wide), path / "wide"), "pairs": path / "pairs.jsonl"}
    for name, changes in {
        "taso-gguf": {"model_name_or_path": str(path), "gguf_file": "model.gguf"},
        "taso-nf4": {"load_in_4bit": True, "importance_weights": "original"},
    }.items():
        found[name] = shutil.copytree(runs / "taso-fp32", path / name)
        record = json.loads((found[name] / "run.json").read_text())
        (found[name] / "run.json").write_text(json.dumps(record | {"config": record["config"] | changes}))
    return found


@pytest.mark.parametrize(("name", "script", "flags", "words"), FLAGS, ids=lambda value: str(value)[:60])
def test_a_flag_acts_or_is_refused(
    name: str, script: str, flags: str, words: tuple[str, ...] | None, runs: Path, places: dict[str, Path]
) -> None:
    run = places.get(name, runs / name)
    with unchanged(run):
        finished = call_main(script, ["--run", run, *flags.format(**places).split()])
    if words is None:
        assert json.loads(finished.succeeded().lines[-1])["loss"] > 0
    else:
        assert_one_line(finished, *words)


def test_a_file_cannot_name_the_run(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"run: {runs / 'taso-fp32'}\n")
    finished = call_main("evaluate", ["--config", tmp_path / "run.yaml"])
    assert_one_line(finished, "run: a configuration file cannot name it", "--run")
