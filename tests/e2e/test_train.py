"""One run through the real scripts, from rows to files, and everything that can be done with it afterwards.

One two-rank run at stage 3 under the deepspeed launcher is the reference; every other way to compute the same thing is
compared with it, and what it wrote is computed again in plain torch, transformers and peft.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import launching
import longhand
import pytest
import tiny_models
import torch
import torch.nn.functional as F
from desks import Desk
from launching import Finished, call_main
from run_files import read_json, read_lines
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sample_rows import write_sentences, write_splits
from torch import Tensor

from taso_ds.config import parse_run_config

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

STEPS, BATCH, TRAIN_ROWS, EVAL_ROWS, CALIBRATION_ROWS = 10, 8, 21, 11, 9
LEARNING_RATE, ELEMENT_FRACTION, CORE_FRACTION = 1e-2, 0.05, 0.10
FILES = {
    "run.json", "calibration.jsonl", "core_regions.safetensors", "core_regions.png", "metrics.jsonl", "results.json",
    "log.txt",
    "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/taso_adapter.safetensors",
}  # fmt: skip


FLAGS = (
    *("--calibration_samples", str(CALIBRATION_ROWS), "--learning_rate", str(LEARNING_RATE), "--max_steps", str(STEPS)),
    *("--global_batch_size", str(BATCH), "--per_device_train_batch_size", "4", "--calibration_batch_size", "2"),
    *("--eval_steps", "5", "--alpha", "2"),  # so that the scaling is not 1
)


@pytest.fixture(scope="module")
def desk(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    path = tmp_path_factory.mktemp("desk")
    write_splits(path, TRAIN_ROWS, EVAL_ROWS)
    return Desk(path, llama_folder, FLAGS)


@pytest.fixture(scope="module")
def launched(desk: Desk) -> Finished:
    return desk.start("stage3", "deepspeed", 2, "--ds_config", "zero3.json")


@pytest.fixture(scope="module")
def stage3(desk: Desk, launched: Finished) -> Path:
    """The run folder of the reference run."""
    return desk.folder("stage3")


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(run / "metrics.jsonl") if "loss" in line]


def files(run: Path) -> set[str]:
    """The run's files, without those of its checkpoints."""
    everything = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    return {name for name in everything if not name.startswith("checkpoints/")}


def checkpoints(run: Path) -> dict[str, set[str]]:
    """The files of every checkpoint."""
    folders = [path for path in (run / "checkpoints").iterdir() if path.is_dir()]
    return {folder.name: {path.name for path in folder.iterdir()} for folder in folders}


def lm(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def with_adapter(base: Any, run: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(base, run / "adapter").eval()


def encoded(desk: Desk, split: str) -> list[dict[str, list[int]]]:
    """Rows as they should reach the model: BOS, prompt, completion, EOS; the last two supervised. A token is a byte."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(desk.base)
    found = []
    for row in read_lines(desk.path / f"{split}.jsonl"):
        prompt, completion = (
            tokenizer(row[key], add_special_tokens=False).input_ids for key in ("prompt", "completion")
        )
        ids = [tokenizer.bos_token_id, *prompt, *completion, tokenizer.eos_token_id]
        found.append({"input_ids": ids, "labels": [-100] * (1 + len(prompt)) + ids[1 + len(prompt) :]})
    return found


def loss_of(model: Any, rows: list[dict[str, list[int]]]) -> Tensor:
    """Mean loss over all supervised tokens, one row after the other, so that nothing is padded."""
    total, units = torch.zeros(()), 0
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        total = total + F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        units += int((labels != -100).sum())
    return total / units


def logits_of(model: Any, desk: Desk) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in encoded(desk, "eval")])


# The reference run ----------------------------------------------------------------------------------------------------


def test_writes_exactly_its_files_and_says_where(launched: Finished, stage3: Path, desk: Desk) -> None:
    assert launched.lines[-1] == f"RUN {stage3}"
    assert files(stage3) == FILES
    saved = {"state.safetensors", "core_regions.safetensors", "progress.json", "manifest.json", "COMPLETE"}
    assert checkpoints(stage3) == {f"step-{STEPS:08d}": saved}
    assert (stage3 / "checkpoints" / "latest").read_text() == f"step-{STEPS:08d}\n"
    assert {path.name for path in desk.path.iterdir()} == {"train.jsonl", "eval.jsonl", "runs"}
    assert launched.errors == []


def test_the_console_is_ours_and_the_log_has_the_rest(launched: Finished, stage3: Path) -> None:
    """Each stage says what comes next; what libraries print, as of the parts that DeepSpeed compiles, is in the log."""
    said = [line.split(":")[0] for line in launched.lines]
    stages = ["reading", "loading", "scoring", "engine", "evaluation", "training", "evaluation", "export", "proof"]
    assert [word for word in said if word in stages[1:]] == ["evaluation", *stages[1:]]  # first what there is of it
    assert f"training: {STEPS} steps in " in launched.out
    assert "; next: evaluation\n" in launched.out
    ours = {*stages, "train", "core regions", "parameters", "group adapter", "before", "checkpoint", "after"}
    assert {*said} - ours == {"opened with peft", f"RUN {stage3}"}
    bars = {line.split(":")[0].strip() for line in launched.err.replace("\r", "\n").splitlines() if "%|" in line}
    assert bars == {"loading", "scoring", "evaluating", "training"}
    log = (stage3 / "log.txt").read_text()
    assert "built successfully" in log
    assert "rank 1 WARNING py.warnings: " in log
    assert "built successfully" not in launched.out + launched.err


def test_says_what_it_does(launched: Finished, stage3: Path, desk: Desk) -> None:
    for said in (
        f"train: {TRAIN_ROWS} rows from {desk.path / 'train.jsonl'}",
        f"evaluation: {EVAL_ROWS} rows from {desk.path / 'eval.jsonl'}",
    ):
        assert launched.lines.count(said) == 1  # rank 0 speaks, once
    results = read_json(stage3 / "results.json")
    assert sum(f"loss {results['after']['loss']:.4f}" in line for line in launched.lines) == 1
    assert sum("factor 3.1623" in line and "rho 0.9000" in line for line in launched.lines) == 1
    assert sum("core regions: 14 matrices" in line for line in launched.lines) == 1


def test_learns(stage3: Path) -> None:
    losses = [line["loss"] for line in steps_of(stage3)]
    results = read_json(stage3 / "results.json")
    assert losses[-1] < 0.8 * losses[0]
    assert results["after"]["loss"] < 0.9 * results["before"]["loss"]


def test_metrics_have_every_step_and_evaluation(stage3: Path) -> None:
    metrics = read_lines(stage3 / "metrics.jsonl")
    assert [("eval" if "eval" in line else "train", line["step"]) for line in metrics] == [
        *[("train", step) for step in range(1, 6)], ("eval", 5), *[("train", step) for step in range(6, 11)]
    ]  # fmt: skip
    for line in steps_of(stage3):
        assert {"step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second"} <= set(line)
        assert line["epoch"] == pytest.approx(line["step"] / 3)  # 21 rows in batches of 8
        assert line["grad_norm"] > 0
    # Warm-up of ⌈0.03 · 10⌉ = 1 step, which is at the peak already; then linear over the other 9.
    peak = LEARNING_RATE * math.sqrt(10)
    rates = [line["learning_rate"]["adapter"] for line in steps_of(stage3)]
    assert rates == pytest.approx([peak, *(peak * (1 - n / 9) for n in range(9))])


def test_record_holds_all_that_decided_the_run(stage3: Path, desk: Desk) -> None:
    record = read_json(stage3 / "run.json")
    config = record["config"]
    assert config["model_name_or_path"] == str(desk.base)
    assert (config["learning_rate"], config["max_steps"], config["bf16"]) == (LEARNING_RATE, STEPS, False)
    assert (config["ds_config"], config["core_fraction"], config["rho"]) == ("zero3.json", CORE_FRACTION, "mask")
    flags = []
    for key, value in config.items():  # every key is a flag, and together they make the same run again
        values = value if isinstance(value, list) else [value]
        flags += [] if value is None else [f"--{key}", *map(str, values)]
    assert json.loads(json.dumps(parse_run_config(flags).flags())) == config

    assert '"auto"' not in json.dumps(record["deepspeed"])
    assert record["deepspeed"]["train_batch_size"] == BATCH
    assert record["deepspeed"]["zero_optimization"]["stage"] == 3
    assert record["world_size"] == 2
    sizes = {"micro_batch_size": 4, "grad_accum_steps": 1, "world_size": 2, "global_batch_size": BATCH}
    assert record["batch"] == sizes
    assert record["steps"] == STEPS
    assert {"python", "torch", "deepspeed", "transformers", "peft"} <= set(record["versions"])
    # (out, in) of a block: q, o (32, 32), k, v (16, 32), gate, up (48, 32), down (32, 48). Of n rows and columns each
    # whole core row trains max(1, ⌊n / 10⌋) values of B1 and all of A1; the columns alike.
    shapes = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]
    trainable = 2 * sum(int(out / 10) + width + out + int(width / 10) for out, width in shapes)
    assert record["parameters"]["trainable"] == trainable
    assert record["parameters"]["total"] == trainable + sum(value.numel() for value in lm(desk.base).parameters())
    (group,) = record["learning_rates"]
    assert group["group"] == "adapter"
    assert group["peak"] == pytest.approx(LEARNING_RATE * math.sqrt(10), rel=1e-12)
    assert group["parameters"] == trainable


def test_calibration_rows_are_training_rows(stage3: Path, desk: Desk) -> None:
    rows, training = read_lines(stage3 / "calibration.jsonl"), encoded(desk, "train")
    assert len(rows) == CALIBRATION_ROWS
    positions = [training.index(row) for row in rows]  # a row that is none of them raises
    assert positions == sorted(set(positions))


def test_regions_are_recomputed_from_the_calibration_rows(stage3: Path, desk: Desk) -> None:
    model = lm(desk.base)
    loss_of(model, read_lines(stage3 / "calibration.jsonl")).backward()
    stored = load_file(stage3 / "core_regions.safetensors")
    names = {name.removesuffix(".rows") for name in stored if name.endswith(".rows")}
    assert len(names) == 14
    for name in names:
        weight = model.get_submodule(name).weight
        importance = (weight * weight.grad).abs().detach()
        expected = longhand.region(importance, element_fraction=ELEMENT_FRACTION, core_fraction=CORE_FRACTION)
        assert (stored[f"{name}.rows"].tolist(), stored[f"{name}.cols"].tolist()) == expected, name


def test_adapter_stays_inside_its_regions(stage3: Path) -> None:
    """ΔW = B A is zero wherever neither the row nor the column is core, for anyone who opens the file."""
    tensors = load_file(stage3 / "adapter" / "adapter_model.safetensors")
    regions = load_file(stage3 / "core_regions.safetensors")
    outside = 0
    for name in {name.removesuffix(".rows") for name in regions if name.endswith(".rows")}:
        A, B = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        delta = B @ A
        assert delta.any()
        delta[regions[f"{name}.rows"]] = 0.0
        delta[:, regions[f"{name}.cols"]] = 0.0
        assert not delta.any(), name
        outside += delta.numel()
    assert outside > 0


def test_results_are_what_plain_transformers_and_peft_compute(stage3: Path, desk: Desk) -> None:
    results, rows = read_json(stage3 / "results.json"), encoded(desk, "eval")
    base = lm(desk.base)
    with torch.no_grad():
        assert results["before"]["loss"] == pytest.approx(float(loss_of(base, rows)), abs=1e-4)
        assert results["after"]["loss"] == pytest.approx(float(loss_of(with_adapter(base, stage3), rows)), abs=1e-4)
    assert results["before"]["num_examples"] == results["after"]["num_examples"] == EVAL_ROWS
    assert results["headline"] == "loss"
    proof = results["export"]
    assert proof["error"] <= proof["tolerance"] < proof["effect"]
    assert proof["error"] < 1e-4  # fp32


# The same run in other ways -------------------------------------------------------------------------------------------


def assert_same_training(run: Path, reference: Path, *, tolerance: float) -> None:
    ours, theirs = steps_of(run), steps_of(reference)
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in ours] == pytest.approx([line[key] for line in theirs], rel=tolerance)
    assert [line["tokens"] for line in ours] == [line["tokens"] for line in theirs]
    ours, theirs = read_json(run / "results.json"), read_json(reference / "results.json")
    for when in ("before", "after"):
        assert ours[when] == pytest.approx(theirs[when], rel=tolerance)


@pytest.mark.slow
def test_torchrun_with_gradient_checkpointing_learns_the_same(desk: Desk, stage3: Path) -> None:
    flags = ("--ds_config", "zero3.json", "--gradient_checkpointing", "--no_verify_export")
    finished = desk.start("checkpointed", "torchrun", 2, *flags)
    run = desk.folder("checkpointed")
    assert finished.out.splitlines()[-1] == f"RUN {run}"
    assert_same_training(run, stage3, tolerance=1e-6)
    assert files(run) == FILES
    assert read_json(run / "results.json")["export"] is None
    assert (run / "calibration.jsonl").read_bytes() == (stage3 / "calibration.jsonl").read_bytes()


def test_plain_python_learns_the_same(desk: Desk, stage3: Path) -> None:
    """One process, two micro-batches a step instead of two ranks, on regions that are scored again."""
    finished = desk.start("alone", "python", 1, "--ds_config", "zero2.json", "--no_verify_export")
    run = desk.folder("alone")
    assert finished.out.splitlines()[-1] == f"RUN {run}"
    sizes = {"micro_batch_size": 4, "grad_accum_steps": 2, "world_size": 1, "global_batch_size": BATCH}
    assert read_json(run / "run.json")["batch"] == sizes
    assert_same_training(run, stage3, tolerance=1e-4)


def region_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items() if key != "checksum"}
        return load_file(path), metadata


def test_calibrate_alone_finds_the_same_regions(desk: Desk, stage3: Path) -> None:
    run = desk.folder("regions")
    finished = desk.call("calibrate", "regions", "--ds_config", "zero0.json").succeeded()
    assert finished.lines[-1] == f"RUN {run}"
    made = {"run.json", "calibration.jsonl", "core_regions.safetensors", "core_regions.png", "log.txt"}
    assert files(run) == made
    assert (run / "calibration.jsonl").read_bytes() == (stage3 / "calibration.jsonl").read_bytes()
    (ours, our_metadata), (theirs, their_metadata) = (
        region_file(folder / "core_regions.safetensors") for folder in (run, stage3)
    )
    assert our_metadata == their_metadata  # the fingerprint of the base among it
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=0.0)
        else:
            assert torch.equal(tensor, theirs[name]), name


# What can be done with a run ------------------------------------------------------------------------------------------


def test_evaluate_repeats_the_recorded_numbers(stage3: Path) -> None:
    finished = call_main("evaluate", ["--run", stage3]).succeeded()
    found = json.loads(finished.lines[-1])
    after = read_json(stage3 / "results.json")["after"]
    assert {key: found[key] for key in after} == pytest.approx(after, rel=1e-6)  # one rank gathers other shards
    assert (found["task"], found["run"]) == ("completion", str(stage3))
    assert files(stage3) == FILES


def test_evaluate_a_base_as_it_is(stage3: Path, desk: Desk) -> None:
    finished = call_main("evaluate", [*desk.flags, "--ds_config", "zero0.json"]).succeeded()
    before = read_json(stage3 / "results.json")["before"]
    assert json.loads(finished.lines[-1])["loss"] == pytest.approx(before["loss"], rel=1e-5)


def test_export_proves_a_run_again(stage3: Path) -> None:
    finished = call_main("export", ["--run", stage3]).succeeded()
    assert finished.lines[-1] == f"EXPORT {stage3 / 'adapter'}"
    assert any(line.startswith("opened with peft") for line in finished.lines)


def test_export_tells_a_changed_adapter(stage3: Path, tmp_path: Path) -> None:
    run = shutil.copytree(stage3, tmp_path / "run")
    file = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_B" in name and tensors[name].any())
    save_file(tensors | {name: tensors[name] * 1.5}, file, metadata={"format": "pt"})
    finished = call_main("export", ["--run", run])
    assert finished.code == 2
    assert "differs from the live model" in finished.errors[0]


def test_export_merges_into_a_plain_model(stage3: Path, desk: Desk, tmp_path: Path) -> None:
    run = shutil.copytree(stage3, tmp_path / "run")
    finished = call_main("export", ["--run", run, "--merge"]).succeeded()
    assert finished.lines[-1] == f"EXPORT {run / 'model'}"
    merged, base = lm(run / "model"), lm(desk.base)
    assert set(merged.state_dict()) == set(base.state_dict())
    before = logits_of(base, desk)
    adapted = logits_of(with_adapter(base, stage3), desk)
    torch.testing.assert_close(logits_of(merged, desk), adapted, rtol=1e-4, atol=1e-4)
    assert float((before - adapted).norm() / before.norm()) > 0.1
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(run / "model").eos_token_id == 2


def test_regions_are_reused_and_cut_again(desk: Desk, stage3: Path) -> None:
    file = stage3 / "core_regions.safetensors"
    flags = ("--core_regions", str(file), "--core_fraction", "0.25", "--ds_config", "zero0.json", "--no_verify_export")
    finished = desk.call("train", "reused", *flags).succeeded()
    run = desk.folder("reused")
    assert finished.lines[-1] == f"RUN {run}"
    assert files(run) == FILES - {"calibration.jsonl"}
    old, new = load_file(file), load_file(run / "core_regions.safetensors")
    for name, tensor in old.items():
        if name.endswith(".rows"):
            assert (
                len(new[name])
                == len(new[name].unique())
                == int(0.25 * old[name.replace("rows", "row_counts")].shape[1])
            )
            assert set(tensor.tolist()) < set(new[name].tolist())  # a larger cut of the same ranking
        elif not name.endswith(".cols"):
            assert torch.equal(tensor, new[name])
    (group,) = read_json(run / "run.json")["learning_rates"]
    assert group["peak"] == pytest.approx(LEARNING_RATE * 2)  # √(1 / 0.25)


# Other methods and models ---------------------------------------------------------------------------------------------


def test_lora(desk: Desk, stage3: Path) -> None:
    flags = ("--method", "lora", "--rank", "2", "--ds_config", "zero2.json")
    desk.call("train", "lora", *flags).succeeded()
    run = desk.folder("lora")
    assert files(run) == {
        "run.json", "log.txt", "metrics.jsonl", "results.json",
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
    }  # fmt: skip
    results, rows = read_json(run / "results.json"), encoded(desk, "eval")
    assert results["before"]["loss"] == pytest.approx(read_json(stage3 / "results.json")["before"]["loss"], rel=1e-5)
    assert results["after"]["loss"] < 0.9 * results["before"]["loss"]
    opened = with_adapter(lm(desk.base), run)
    assert opened.peft_config["default"].r == 2
    with torch.no_grad():
        assert float(loss_of(opened, rows)) == pytest.approx(results["after"]["loss"], abs=1e-4)
    assert results["export"]["error"] <= results["export"]["tolerance"]
    (group,) = read_json(run / "run.json")["learning_rates"]
    assert (group["peak"], group["factor"]) == (LEARNING_RATE, 1.0)


def test_full_fine_tuning(desk: Desk) -> None:
    flags = ("--method", "full", "--ds_config", "zero0.json", "--learning_rate", "1e-3", "--weight_decay", "0.1")
    desk.call("train", "full", *flags).succeeded()
    run = desk.folder("full")
    written = files(run)
    assert {"run.json", "metrics.jsonl", "results.json", "model/config.json", "model/model.safetensors"} <= written
    beside = {name for name in written if not name.startswith("model/")}
    assert beside == {"run.json", "log.txt", "metrics.jsonl", "results.json"}
    results, model = read_json(run / "results.json"), lm(run / "model")
    assert results["after"]["loss"] < 0.9 * results["before"]["loss"]
    with torch.no_grad():
        assert float(loss_of(model, encoded(desk, "eval"))) == pytest.approx(results["after"]["loss"], abs=1e-4)
    assert results["export"]["error"] <= results["export"]["tolerance"] < 1e-3  # opened by transformers alone
    groups = {group["group"]: group for group in read_json(run / "run.json")["learning_rates"]}
    assert sum(group["parameters"] for group in groups.values()) == sum(value.numel() for value in model.parameters())
    # Five norms of 32: before attention and MLP of two blocks, and the last.
    assert groups["norms_and_biases"]["parameters"] == 5 * 32
    assert (groups["norms_and_biases"]["weight_decay"], groups["weights"]["weight_decay"]) == (0.0, 0.1)


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of SST-2 rows."""
    path = tmp_path_factory.mktemp("sentences")
    files = [write_sentences(path / f"{split}.jsonl", number) for split, number in (("train", 24), ("eval", 10))]
    return ["--task", "sst2", "--train_file", str(files[0]), "--eval_file", str(files[1])]


def test_classification_head(desk: Desk, bert_folder: Path, sentences: list[str]) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    flags = (*sentences, "--model_name_or_path", str(bert_folder), "--ds_config", "zero2.json")
    desk.call("train", "head", *flags).succeeded()
    run = desk.folder("head")
    assert files(run) == FILES
    assert read_json(run / "adapter" / "adapter_config.json")["modules_to_save"] == ["classifier"]
    results = read_json(run / "results.json")
    assert results["headline"] == "accuracy"
    assert results["after"]["loss"] < results["before"]["loss"]
    assert results["export"]["error"] <= results["export"]["tolerance"]
    adapter, head = read_json(run / "run.json")["learning_rates"]
    assert (adapter["group"], head["group"], head["peak"], head["parameters"]) == ("adapter", "head", LEARNING_RATE, 66)
    assert adapter["peak"] == pytest.approx(LEARNING_RATE * math.sqrt(10))

    base = AutoModelForSequenceClassification.from_pretrained(bert_folder, dtype=torch.float32, num_labels=2)
    opened, tokenizer = with_adapter(base, run), AutoTokenizer.from_pretrained(bert_folder)
    total, right, rows = 0.0, 0, read_lines(Path(sentences[-1]))
    for row in rows:
        with torch.no_grad():
            logits = opened(**tokenizer(row["sentence"], return_tensors="pt")).logits
        total += float(F.cross_entropy(logits, torch.tensor([row["label"]])))
        right += int(logits.argmax()) == row["label"]
    assert results["after"]["loss"] == pytest.approx(total / len(rows), abs=1e-4)
    assert results["after"]["accuracy"] == right / len(rows)

    found = json.loads(call_main("evaluate", ["--run", run]).succeeded().lines[-1])
    assert {key: found[key] for key in results["after"]} == results["after"]  # the head came back too


def test_a_pooler_that_the_checkpoint_lacks_is_part_of_the_head(
    desk: Desk, bert_folder: Path, sentences: list[str]
) -> None:
    folder = shutil.copytree(bert_folder, desk.path / "no_pooler")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "pooler" not in name and "classifier" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    flags = (*sentences, "--model_name_or_path", str(folder))
    (dry,) = [
        line for line in desk.call("train", "no_pooler", *flags, "--dry_run").lines if line.startswith("group head:")
    ]
    finished = desk.call("train", "no_pooler", *flags).succeeded()
    assert sum("lacks bert.pooler.dense.bias, bert.pooler.dense.weight" in line for line in finished.lines) == 1
    run = desk.folder("no_pooler")
    assert read_json(run / "adapter" / "adapter_config.json")["modules_to_save"] == ["bert.pooler", "classifier"]
    results = read_json(run / "results.json")
    assert results["export"]["error"] <= results["export"]["tolerance"]
    _, head = read_json(run / "run.json")["learning_rates"]
    assert head["parameters"] == 66 + 32 * 32 + 32  # the classifier, the pooler's weight and bias
    assert f"{head['parameters']:,} parameters" in dry
    found = json.loads(call_main("evaluate", ["--run", run]).succeeded().lines[-1])
    assert {key: found[key] for key in results["after"]} == results["after"]
    call_main("export", ["--run", run, "--merge"]).succeeded()
    pooler = load_file(run / "model" / "model.safetensors")["bert.pooler.dense.weight"]
    assert torch.equal(pooler, load_file(run / "adapter" / "taso_adapter.safetensors")["head.bert.pooler.dense.weight"])


@pytest.mark.parametrize(("make", "said"), [("gemma3", "text model only: model.vision_tower"), ("phimoe", "experts: ")])
def test_what_is_no_linear_of_the_text_model_stays_as_it_is(desk: Desk, make: str, said: str) -> None:
    folder = tiny_models.save(getattr(tiny_models, make)(), desk.path / make)
    flags = ("--model_name_or_path", str(folder), "--max_steps", "1", "--no_verify_export")
    finished = desk.call("train", f"run_{make}", *flags).succeeded()
    assert sum(said in line for line in finished.lines) == 1
    adapted = load_file(desk.folder(f"run_{make}") / "core_regions.safetensors")
    assert not any("vision" in name or "router" in name for name in adapted)


# A run that goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_loss_that_diverges_stops_and_keeps_the_last_good_adapter(desk: Desk) -> None:
    run = desk.folder("diverged")
    flags = ("--learning_rate", "1e30", "--max_grad_norm", "0", "--output_dir", str(run))
    finished = launching.start("train", [*desk.flags, *flags], cwd=desk.path, launcher="deepspeed", ranks=2)
    assert finished.code == 2
    (line,) = finished.errors
    good = len(steps_of(run))
    assert good >= 1
    assert f"the loss of step {good + 1} is nan on training rows [" in line
    assert f"the adapter after step {good} is in {run / 'adapter'}" in line
    named = json.loads(line[line.index("[") : line.index("]") + 1])
    assert 0 < len(named) <= BATCH
    assert set(named) <= set(range(TRAIN_ROWS))
    assert "Traceback" not in finished.out + finished.err
    assert files(run) == FILES - {"results.json"}
    for tensor in load_file(run / "adapter" / "taso_adapter.safetensors").values():
        assert tensor.isfinite().all()


@pytest.fixture
def poisoned(llama_folder: Path, tmp_path: Path) -> Path:
    """A base with one infinite weight."""
    folder = shutil.copytree(llama_folder, tmp_path / "poisoned")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = math.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_poisoned_base_is_not_scored(desk: Desk, poisoned: Path) -> None:
    finished = desk.call("train", "poisoned", "--model_name_or_path", str(poisoned), "--ds_config", "zero0.json")
    assert (finished.code, len(finished.errors)) == (2, 1)
    assert "scoring: the importance of model.layers." in finished.errors[0]
    assert "not finite" in finished.errors[0]
    assert not desk.folder("poisoned").exists()


def test_a_poisoned_base_is_not_trained(desk: Desk, poisoned: Path) -> None:
    flags = ("--model_name_or_path", str(poisoned), "--method", "lora", "--ds_config", "zero0.json")
    finished = desk.call("train", "poisoned_lora", *flags)
    assert (finished.code, len(finished.errors)) == (2, 1)
    assert "the loss of step 1 is nan on training rows" in finished.errors[0]
    assert not (desk.folder("poisoned_lora") / "adapter").exists()
