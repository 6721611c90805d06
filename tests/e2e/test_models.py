"""Models that are built, shared or described in ways of their own: they train, or one line says why not."""

import json
import shutil
from pathlib import Path
from typing import Any

import families
import pytest
import tiny_models
import torch
from launching import call_main
from mistakes import GOOD, assert_one_line, unchanged
from safetensors.torch import load_file
from sample_rows import write_sentences

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def classifier(folder: Path) -> Path:
    """An ALBERT for sentences: one block, called three times."""
    from transformers import AlbertForSequenceClassification

    return tiny_models.save(AlbertForSequenceClassification(tiny_models.albert().config), folder)


def sentences(desk: Path) -> list[str]:
    train, held_out = (str(write_sentences(desk / f"{name}.jsonl", 8)) for name in ("sentences", "held-out"))
    return ["--task", "sst2", "--train_file", train, "--eval_file", held_out]


def test_a_block_that_is_called_several_times_trains_and_is_proved(desk: Path) -> None:
    folder = classifier(desk / "albert")
    flags = [*GOOD.format(llama=folder).split(), *sentences(desk), "--verify_export", "--calibration_batch_size", "4"]
    call_main("train", flags).succeeded()
    proof = json.loads((desk / "run" / "results.json").read_text())["export"]
    assert proof["error"] <= proof["tolerance"]
    assert proof["effect"] > 0


@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_a_head_trains_beside_lora_too(stage: str, bert_folder: Path, desk: Path) -> None:
    flags = [*GOOD.format(llama=bert_folder).split(), *sentences(desk), "--ds_config", f"{stage}.json"]
    call_main("train", [*flags, "--method", "lora"]).succeeded()
    trained = load_file(desk / "run" / "adapter" / "adapter_model.safetensors")
    (head,) = (tensor for name, tensor in trained.items() if name.endswith("classifier.weight"))
    assert not torch.equal(head, load_file(bert_folder / "model.safetensors")["classifier.weight"])


@pytest.mark.parametrize(("make", "checkpointing"), [(tiny_models.opt, False), (tiny_models.falcon, True)])
def test_a_body_that_is_not_called_and_results_changed_in_place(make: Any, checkpointing: bool, desk: Path) -> None:
    flags = GOOD.format(llama=tiny_models.save(make(), desk / "model")).split()
    call_main("train", [*flags, *["--gradient_checkpointing"] * checkpointing]).succeeded()
    assert len((desk / "run" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("script", ["train", "train --dry_run", "plan"])
def test_blocks_that_cannot_be_recomputed(script: str, desk: Path, forbid_weights: None) -> None:
    folder, rows = classifier(desk / "albert"), sentences(desk)
    script, *dry_run = script.split()
    flags = ["--model_name_or_path", str(folder), "--task", "sst2", "--max_seq_length", "64"]
    if script == "train":
        flags = [*GOOD.format(llama=folder).split(), *rows, *dry_run]
    with unchanged(desk):
        finished = call_main(script, [*flags, "--gradient_checkpointing"])
    assert_one_line(finished, "gradient_checkpointing", "AlbertForSequenceClassification", "drop the flag")


def test_a_base_of_which_nothing_would_be_quantized_is_refused(desk: Path, forbid_weights: None) -> None:
    folder = tiny_models.save(tiny_models.falcon(), desk / "falcon")
    finished = call_main("train", [*GOOD.format(llama=folder).split(), "--load_in_4bit"])
    assert_one_line(finished, "load_in_4bit: bitsandbytes quantizes no linear of FalconForCausalLM", "drop the flag")


def test_a_model_that_cannot_be_planned_trains_all_the_same(llama_folder: Path, desk: Path) -> None:
    """A configuration may hold anything under names that a plan reads."""
    folder = shutil.copytree(llama_folder, desk / "llama")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_experts": "many"}))
    finished = call_main("train", GOOD.format(llama=folder).split()).succeeded()
    said = "LlamaForCausalLM cannot be planned: invalid literal for int() with base 10: 'many'; whether it fits"
    assert sum(said in line for line in (finished.out + finished.err).splitlines()) == 1
    finished = call_main("plan", ["--model_name_or_path", folder, "--max_seq_length", "64"])
    assert_one_line(finished, "model_name_or_path: LlamaForCausalLM cannot be planned")
    finished = call_main("doctor", ["--model_name_or_path", folder, "--max_seq_length", "64", "--json", "-"])
    found = {finding["check"]: finding for finding in json.loads(finished.out)["findings"]}
    assert found["model"]["status"] == "warn"


# Tokens without an embedding ------------------------------------------------------------------------------------------


def family(name: str, folder: Path) -> Path:
    (found,) = (entry for entry in families.FAMILIES if entry.name == name)
    return families.write(found, folder)


@pytest.mark.parametrize(
    ("name", "script", "flags"),
    [
        ("fnet", "train", ""), ("fnet", "plan", "--load_in_4bit"), ("deberta", "train --dry_run", ""),
        ("deberta", "train", "--load_in_4bit"), ("xlnet", "train", ""),
    ],
)  # fmt: skip
def test_a_base_that_does_not_compute_in_bfloat16(
    name: str, script: str, flags: str, desk: Path, forbid_weights: None
) -> None:
    folder, rows = family(name, desk / "model"), sentences(desk)
    script, *more = script.split()
    task = ["--head", "classification", "--task", "sst2"] if name != "xlnet" else ["--task", "completion"]
    given = ["--model_name_or_path", str(folder), *task, "--max_seq_length", "64"]
    if script == "train":
        given = [
            *GOOD.format(llama=folder).replace("--no_bf16 ", "").split(),
            *(rows if name != "xlnet" else ()),
            *more,
        ]
    with unchanged(desk):
        finished = call_main(script, [*given, *flags.split()])
    assert_one_line(finished, "bf16", f"({name})", "bfloat16", "--no_bf16")


@pytest.mark.parametrize("script", ["train", "train --dry_run", "plan"])
def test_an_export_that_peft_would_not_read_is_refused(script: str, desk: Path, forbid_weights: None) -> None:
    folder = family("laguna", desk / "model")
    script, *more = script.split()
    given = ["--model_name_or_path", str(folder), "--task", "completion", "--max_seq_length", "64"]
    if script == "train":
        given = [*GOOD.format(llama=folder).replace("--no_verify_export", "--verify_export").split(), *more]
    with unchanged(desk):
        finished = call_main(script, given)
    assert_one_line(finished, "target_modules", "shared_experts.down_proj and 2 more", "--no_verify_export", "--merge")


def larger_tokenizer(folder: Path, *, pads: bool) -> str:
    """A tokenizer with one token that the base does not know, and others that it has room for."""
    tokenizer = tiny_models.byte_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(len(tokenizer), tiny_models.VOCABULARY + 1)])
    if pads:
        tokenizer.pad_token = f"<{tiny_models.VOCABULARY}>"
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("pads", "split", "words"),
    [
        (True, "", ("it pads with that", "pad_token", "eos_token")),
        (False, "train", ("train.jsonl has that token",)),
        (False, "eval", ("eval.jsonl has that token",)),
    ],
)
def test_a_token_without_an_embedding(
    pads: bool, split: str, words: tuple[str, ...], llama_folder: Path, desk: Path, forbid_weights: None
) -> None:
    flags = ["--tokenizer_name", larger_tokenizer(desk / "tokenizer", pads=pads)]
    if split:
        row = {"prompt": "say", "completion": f"<{tiny_models.VOCABULARY}>"}
        with (desk / f"{split}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    with unchanged(desk):
        finished = call_main("train", [*GOOD.format(llama=llama_folder).split(), *flags])
    assert_one_line(finished, "tokenizer_name", "token 320 (<320>)", "embeddings for 320 tokens", *words)


def test_a_token_without_an_embedding_that_never_occurs_is_no_mistake(llama_folder: Path, desk: Path) -> None:
    flags = ["--tokenizer_name", larger_tokenizer(desk / "tokenizer", pads=False)]
    call_main("train", [*GOOD.format(llama=llama_folder).split(), *flags]).succeeded()
