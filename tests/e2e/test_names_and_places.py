"""Names of other trainers, empty texts, links that lead nowhere, rows used twice: the words of a person."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import tiny_models
from launching import call_main
from mistakes import GOOD, assert_one_line, refused
from sample_rows import write_rows

from taso_ds.config import GROUPS
from taso_ds.flags.foreign_names import _INSTEAD, _SAME, in_our_words, ours

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300), pytest.mark.usefixtures("forbid_weights")]
FIELDS = {entry.name: str(entry.type) for group in GROUPS for entry in dataclasses.fields(group)}
TEXTS = sorted(name for name, kind in FIELDS.items() if kind.startswith("str"))


# Names of other trainers ----------------------------------------------------------------------------------------------


def test_every_name_of_ours_exists_and_no_name_of_theirs_is_one() -> None:
    theirs = [name for names in (*_SAME.values(), *_INSTEAD.values()) for name in names]
    assert _SAME.keys() <= FIELDS.keys()
    assert not FIELDS.keys() & set(theirs)
    assert len(theirs) == len(set(theirs))


@pytest.mark.parametrize(
    ("theirs", "our"),
    {
        "--deepspeed": "ds_config", "--lr": "learning_rate", "--epochs": "num_train_epochs", "--lora_r": "rank",
        "--lora-alpha": "alpha", "--resume_from_checkpoint": "resume", "--cutoff_len": "max_seq_length",
        "--batch_size": "per_device_train_batch_size", "--per_device_batch_size": "per_device_train_batch_size",
        "--gradient_checkpoint": "gradient_checkpointing", "--max_length": "max_seq_length",
        "--lora_target": "target_modules", "--report_to": "metrics.jsonl", "--dataset": "--task NAME",
        "--quantization_bit": "--load_in_4bit",
    }.items(),
)  # fmt: skip
def test_names_people_know(theirs: str, our: str, llama_folder: Path, desk: Path) -> None:
    refused(f"{theirs} 1", f"unknown flag {theirs!r}: ", our, llama=llama_folder)
    (desk / "run.yaml").write_text(f"{theirs[2:]}: 1")
    refused("--config run.yaml", "run.yaml", f"key {theirs[2:]!r}: ", our, llama=llama_folder)


def test_other_names_have_none_of_ours() -> None:
    assert ours("learing_rate") is None
    assert in_our_words("learing_rate") == ""


def test_switches_take_the_values_people_write(llama_folder: Path, desk: Path) -> None:
    for value, precision in (("true", "true"), ("false", "false"), ("True", "true"), ("off", "false")):
        flags = [*GOOD.format(llama=llama_folder).split(), "--bf16", value, "--dry_run"]
        assert f'"bf16": {precision}' in call_main("train", flags).succeeded().out


# Empty texts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_an_empty_text_is_no_name(name: str, llama_folder: Path, desk: Path) -> None:
    refused(f"--{name} ", name, "''", llama=llama_folder)


@pytest.mark.parametrize("name", sorted(set(TEXTS) - {"config"}))
def test_an_empty_text_in_yaml_is_no_name(name: str, llama_folder: Path, desk: Path) -> None:
    (desk / "run.yaml").write_text(f"{name}: ''")
    finished = call_main("train", ["--config", "run.yaml", "--dry_run"])
    assert_one_line(finished, name, "''")


def test_empty_texts_of_other_scripts(llama_folder: Path, desk: Path) -> None:
    refused("--json ", "json", "empty", llama=llama_folder, script="plan")
    refused("--run ", "run", "empty", llama=llama_folder, script="evaluate")
    refused("--write ", "write", "empty", llama=llama_folder, script="slurm")
    assert_one_line(call_main("doctor", ["--hostfile", ""]), "hostfile", "empty")


def test_an_empty_configuration(llama_folder: Path, desk: Path) -> None:
    for text in ("", "\n", "# rank: 2\n", "---\n"):
        (desk / "run.yaml").write_text(text)
        refused("--config run.yaml", "run.yaml is empty", "name: value", llama=llama_folder)


# Links that lead nowhere ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "name"),
    [
        *(("train", name) for name in ("model_name_or_path", "tokenizer_name", "train_file", "eval_file", "data_dir")),
        *(("train", name) for name in ("core_regions", "ds_config", "config", "output_dir", "resume", "nvme_path")),
        *(("evaluate", "run"), ("plan", "json"), ("slurm", "write")),
    ],
)
def test_a_link_that_leads_nowhere(script: str, name: str, llama_folder: Path, desk: Path) -> None:
    (desk / "here.jsonl").symlink_to("gone.jsonl")
    refused(f"--{name} here.jsonl", name, "a link to gone.jsonl, which does not exist", llama=llama_folder,
            script=script)  # fmt: skip


def test_links_that_lead_nowhere_inside_folders(llama_folder: Path, desk: Path) -> None:
    shutil.copytree(llama_folder, desk / "model")
    (desk / "model" / "config.json").unlink()
    (desk / "model" / "config.json").symlink_to("gone.json")
    refused("--model_name_or_path model", "model/config.json", "a link to gone.json", llama=llama_folder)
    (desk / "rte").mkdir()
    (desk / "rte" / "train.jsonl").symlink_to("gone.jsonl")
    flags = ["--model_name_or_path", str(llama_folder), "--task", "rte", "--data_dir", ".", "--output_dir", "run"]
    assert_one_line(call_main("train", flags), "rte/train.jsonl", "a link to gone.jsonl, which does not exist")
    (desk / "run").mkdir()
    (desk / "run" / "run.json").symlink_to("gone.json")
    refused("--run run", "run/run.json", "a link to gone.json", llama=llama_folder, script="evaluate")


# Rows -----------------------------------------------------------------------------------------------------------------


def test_rows_that_are_trained_on_do_not_judge(llama_folder: Path, desk: Path) -> None:
    (desk / "same.jsonl").symlink_to("train.jsonl")
    for file in ("train.jsonl", "./train.jsonl", "same.jsonl", str(desk / "train.jsonl")):
        for more in ("", " --dry_run"):
            refused(f"--eval_file {file}{more}", f"eval_file: {file} is train_file", llama=llama_folder)
    refused("--eval_file train.jsonl", "eval_file: train.jsonl is train_file", llama=llama_folder, script="plan")


def test_an_empty_line_between_rows_is_named(llama_folder: Path, desk: Path) -> None:
    for blank in ("", "  ", "\t"):
        rows = write_rows(desk / "rows.jsonl", 4).read_text().splitlines()
        (desk / "rows.jsonl").write_text("\n".join([*rows[:2], blank, *rows[2:]]))
        refused("--train_file rows.jsonl", "rows.jsonl:3: the line is empty", "delete it", llama=llama_folder)


def test_a_chat_template_that_fails(llama_folder: Path, desk: Path) -> None:
    tokenizer = tiny_models.byte_tokenizer()
    for template, words in {
        "{{ messages[0].content }}\n{{ messages[1].content }}": "line 2",
        "{% for message in messages %}{{ message.role }}{% endfor %}": "leaves out",
    }.items():
        tokenizer.chat_template = template
        tokenizer.save_pretrained(desk / "tokenizer")
        flags = "--use_chat_template --tokenizer_name tokenizer"
        refused(flags, "the chat template of tokenizer", words, llama=llama_folder)
