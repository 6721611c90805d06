"""Mistakes in flags and in the YAML of ``--config``."""

from pathlib import Path

import pytest
from launching import call_main
from mistakes import GOOD, Mistake, Mistakes, assert_refused

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

MISTAKES = Mistakes()
add = MISTAKES.add

for value in ("0", "1.5", "-0.1", "nan"):
    for name in ("element_fraction", "core_fraction"):
        add(f"{name} {value}", f"--{name} {value}", name, str(float(value)), "(0, 1]")
for value in ("1.0", "-0.1", "masks", "nan"):
    add(f"rho {value}", f"--rho {value}", "rho", value, "mask, parameters, off", "[0, 1)")
for name, value, near in (
    ("structure", "unions", "union"),
    ("method", "loras", "lora"),
    ("importance", "importence", "importance"),
    ("calibration_reduction", "signed", "signed_mean"),
    ("lr_scheduler_type", "linea", "linear"),
    ("head", "classifier", "classification"),
):
    add(f"unknown {name}", f"--{name} {value}", name, repr(value), f"nearest: {near!r}")
for flags, words in {
    "--device a100": ("device", "'a100'", "nearest: 'a100-"),
    "--network ib400": ("network", "'ib400'", "nearest: 'ib-400'"),
    "--nodes 0": ("nodes", "0", "positive"),
    "--device_memory_gb nan": ("device_memory_gb", "nan", "positive"),
    "--supervised_share 2": ("supervised_share", "2.0", "(0, 1]"),
    "--global_batch_size 7": ("global_batch_size", "not a multiple"),
}.items():
    add(f"plan {flags}", flags, *words, script="plan")
for flag in ("--json", "--plot"):
    add(f"plan writes {flag} into a folder", f"{flag} .", "cannot write .", "a folder", "name a file", script="plan")
for script, flag in (("plan", "json"), ("plan", "plot"), ("slurm", "write")):
    add(f"{script} --{flag} with a name too long", f"--{flag} {'x' * 300}", flag, "short enough", script=script)
add("unknown task", "--task sst3", "task", "'sst3'", "nearest: 'sst2'", "known: ")
for name, values in {
    "seed": ("-1", "18446744073709551616"),
    "per_device_train_batch_size": ("0", "-4"),
    "per_device_eval_batch_size": ("0",),
    "global_batch_size": ("0",),
    "gradient_accumulation_steps": ("0",),
    "max_steps": ("0", "-5"),
    "learning_rate": ("nan", "0", "-1", "inf"),
    "num_train_epochs": ("0", "nan", "inf"),
    "warmup_ratio": ("1.5", "nan"),
    "weight_decay": ("-1", "nan", "inf"),
    "max_grad_norm": ("-1", "nan", "inf"),
    "adam_beta1": ("1", "nan"),
    "adam_epsilon": ("0", "nan", "inf"),
    "alpha": ("0", "nan", "inf"),
    "rank": ("0",),
    "logging_steps": ("0",),
    "eval_steps": ("0",),
    "max_new_tokens": ("0",),
    "max_train_samples": ("0",),
    "calibration_samples": ("0",),
    "calibration_batch_size": ("0",),
    "max_seq_length": ("1", "-8"),
}.items():
    for value in values:
        add(f"{name} {value}", f"--{name} {value}", name, value.lstrip("-").split(".")[0], "is not")
for flags, words in {
    "--learning_rate 1e308": ("learning_rate", "1e+308", "fp32"),
    "--alpha 1e308": ("alpha", "1e+308", "fp32"),
    "--num_train_epochs 1e308": ("num_train_epochs", "1e+308", "fp32"),
    "--max_seq_length 1000000000000": ("max_seq_length", "1000000000000", "128 positions"),
    "--rank 1000000000000": ("host memory", "needs", "--force"),
    f"--rank {2**63 - 1} --dry_run": ("rank", "more than a tensor can have"),
    f"--rank {2**63 - 1} --method lora --dry_run": ("rank", "more than a tensor can have"),
    "--core_fraction 1e-17 --dry_run": ("core_fraction", "1e-17", "cannot be told from 0"),
    "--rank=--": ("rank", "'--' is not a value"),
    "--task=--": ("task", "'--' is not a value"),
    "--gradient_accumulation_steps 1000000000000": ("gradient_accumulation_steps", "8 training rows"),
    "--global_batch_size 4000000000000": ("gradient_accumulation_steps", "8 training rows", "--global_batch_size"),
    "--seed 1000000000000": ("seed", "1000000000000", "2**32"),
    f"--max_steps 1{'0' * 30}": ("max_steps", "64 bits"),
    f"--max_steps {'9' * 5000}": ("max_steps",),
    f"--model_name_or_path {'m' * 300}": ("model_name_or_path", "255 bytes"),
    f"--output_dir {'deep/' * 1000}": ("output_dir", "4095"),
    f"--ds_config {'z' * 300}.json": ("ds_config", "255 bytes"),
    f"--core_regions {'r' * 300}": ("core_regions", "255 bytes"),
    "--ds_config ~nobody-of-that-name/zero3.json": ("ds_config", "no such file"),
}.items():
    add(f"absurd {flags[:60]}", flags, *words)
add("fp16 and bf16", "--fp16 --bf16", "fp16 and bf16 are both on", "--no_bf16")
add("fp16", "--fp16 --no_bf16", "fp16 is not supported", "--bf16")
add("unknown flag", "--learing_rate 1", "'--learing_rate'", "nearest: 'learning_rate'", "--help")
add("flag without its value", "--max_steps", "--max_steps", "expected one argument")
add("not a number", "--max_steps ten", "--max_steps", "'ten'")
add("word without a flag", "--rank 1 run.yaml", "'run.yaml' stands where a flag should", "begin with --")
add("value after --no_", "--no_bf16 true", "'true' stands where a flag should")
add("word after a switch", "--force run.yaml", "--force", "'run.yaml' is not true or false")
add("--no_ of what is off", "--no_load_in_4bit", "'--no_load_in_4bit'", "give load_in_4bit the value false")
add("list in pieces", "--target_modules q_proj --target-modules=v_proj", "target_modules", "2 times", "after one --")
add("line end of Windows", "--output_dir 'run\r'", "output_dir", r"'run\r'", "line ends of Windows")
add(
    "batch does not multiply", "--global_batch_size 6", "global_batch_size: 6 is not a multiple",
    "per_device_train_batch_size 4",
)  # fmt: skip
add(
    "accumulation disagrees", "--global_batch_size 8 --gradient_accumulation_steps 3", "global_batch_size",
    "--gradient_accumulation_steps must be 2",
)  # fmt: skip
add("no target", "--target_modules q_prj", "target_modules", "'q_prj'", "nearest: 'q_proj'")
add("one target of two", "--target_modules q_proj hub", "target_modules", "'hub'", "there are ", "q_proj")
add("target pattern", "--target_modules 'q_proj['", "target_modules", "not a regular expression")
add("too long", "--max_seq_length 129", "max_seq_length: 129", "128 positions")
add("chat template", "--use_chat_template", "use_chat_template", "no chat template")
add("calibrate a baseline", "--method lora", "calibrate", "--method", script="calibrate")
add("attention", "--attn_implementation flash", "flash", loads=True)

# YAML -----------------------------------------------------------------------------------------------------------------


def add_yaml(name: str, content: str, *words: str) -> None:
    add(f"YAML {name}", "--config run.yaml", "run.yaml", *words, files={"run.yaml": content})


add("YAML missing", "--config run.yaml", "config", "run.yaml", "No such file")
add_yaml("malformed", "seed: [1\nrank: 2", "line 2")
add_yaml("list", "- seed", "mapping")
add_yaml("unknown key", "learing_rate: 1", "'learing_rate'", "nearest: 'learning_rate'")
add_yaml("text for a number", "rank: two", "rank", "'two'", "a whole number")
add_yaml("fraction for a whole number", "rank: 2.5", "rank", "2.5", "a whole number")
add_yaml("number for a switch", "debug: 2", "debug", "'2'", "true or false")
add_yaml("switch for a number", "rank: true", "rank", "'true'", "a whole number")
add_yaml("minutes for a number", "max_steps: 1:30", "max_steps", "'1:30'", "a whole number")
add_yaml("nothing for a number", "rank:", "rank", "None", "a whole number")
add_yaml("list for a number", "rank: [1, 2]", "rank", "['1', '2']", "a whole number")
add_yaml("section for a text", "ds_config: {stage: 2}", "ds_config", "'stage'", "a text")
add_yaml("--no_ in a file", "no_bf16: true", "'no_bf16'", "give bf16 the value false")
add_yaml("section", "model:\n  rank: 2", "unknown key 'model'", "no sections", "`name: value`")
add_yaml("lists in a list of texts", "target_modules: [[a]]", "target_modules", "[['a']]", "a list of texts")
for variable in ("$HOME", "${SCRATCH}"):
    words = ("output_dir", f"replaced {variable} in '{variable}/runs'", "write the path")
    file = {"run.yaml": f"output_dir: {variable}/runs"}
    add(f"YAML variable {variable}", "--task rte --config run.yaml", *words, files=file, alone=True)
add("flag variable", "--output_dir '$HOME/runs'", "output_dir", "replaced $HOME in '$HOME/runs'", "write the path")
add("YAML bad value", "--config run.yaml", "core_fraction: 1.5", "(0, 1]", files={"run.yaml": "core_fraction: 1.5"})


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=list(MISTAKES))
def test_one_line_and_nothing_written(mistake: Mistake, desk: Path, request: pytest.FixtureRequest) -> None:
    assert_refused(mistake, desk, request)


def test_absurd_numbers_that_only_mean_all_or_for_ever(llama_folder: Path, desk: Path, forbid_weights: None) -> None:
    """They cost neither time nor memory before the run."""
    flags = "--calibration_samples 1000000000000 --calibration_passes 1000000000000 --max_steps 1000000000000 --dry_run"
    finished = call_main("train", [*GOOD.format(llama=llama_folder).split(), *flags.split()]).succeeded()
    assert "steps: 1000000000000" in finished.out


def test_debug_shows_the_traceback(llama_folder: Path, desk: Path) -> None:
    finished = call_main("train", [*GOOD.format(llama=llama_folder).split(), "--task", "sst3", "--debug"])
    assert (finished.code, len(finished.errors)) == (2, 1)
    assert "Traceback" in finished.err
    assert "UserError: unknown task" in finished.err
