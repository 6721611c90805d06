"""``launch/plan.py`` as a user starts it: from config.json alone, with files on request."""

import json
import shlex
from pathlib import Path

import pytest
from launching import ROOT, call_main

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def config_only(folder: Path) -> Path:
    """A folder with the config of Llama 2 70B and nothing else."""
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=8192, num_hidden_layers=80, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8,
        max_position_embeddings=4096, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    return folder


def test_a_plan_needs_config_json_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama").mkdir()
    folder = config_only(tmp_path / "llama")
    flags = ["--model_name_or_path", str(folder), "--task", "gsm8k", "--nodes", "2", "--max_seq_length", "2048"]
    flags += ["--per_device_train_batch_size", "1", "--json", "plan.json", "--plot", "plan.png"]
    finished = call_main("plan", flags).succeeded()
    assert "model: 68,976,648,192 frozen parameters" in finished.out  # as published
    last = shlex.split(finished.lines[-1])
    assert last[:8] == ["fits:", "deepspeed", "--hostfile", "hostfile", "--num_nodes", "2", "--num_gpus", "8"]
    assert last[last.index("--task") + 1] == "gsm8k"
    plan = json.loads(Path("plan.json").read_text())
    assert plan["fastest"]["stage"] == 3  # 138 GB do not fit on 80
    stages = {row["stage"]: row["fits"] for row in plan["strategies"] if row["bits"] == 16}
    assert not stages[2]
    assert Path("plan.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "plan.json", "plan.png"]


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    finished = call_main(
        "plan", ["--model_name_or_path", config_only(tmp_path), "--gpus_per_node", "1", "--device_memory_gb", "4",
                 "--host_memory_gb", "32"]
    ).succeeded()  # fmt: skip
    assert finished.lines[-1].startswith("does not fit: ")


def write_config(folder: Path, config: object, **more: object) -> Path:
    """Write a config and nothing else."""
    folder.mkdir()
    text = json.loads(config.to_json_string())  # type: ignore[attr-defined]
    (folder / "config.json").write_text(json.dumps(text | more))
    return folder


def llama_7b(folder: Path, **more: object) -> Path:
    from transformers import LlamaConfig

    return write_config(folder, LlamaConfig(architectures=["LlamaForCausalLM"], tie_word_embeddings=False), **more)


def mixtral(folder: Path) -> Path:
    from transformers import MixtralConfig

    return write_config(
        folder, MixtralConfig(num_hidden_layers=8, architectures=["MixtralForCausalLM"], tie_word_embeddings=False)
    )


BNB_4BIT = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "bfloat16",
}  # fmt: skip
RUN = ["--task", "gsm8k", "--max_steps", "10"]  # a dry run then reads no data
SMALL = ["--gpus_per_node", "1", "--device_memory_gb", "24", "--per_device_train_batch_size", "1"]


@pytest.mark.parametrize(
    ("model", "flags", "proposed", "not_proposed"),
    [
        ("dense", SMALL, [], []),
        ("dense", [*SMALL, "--load_in_4bit", "False", "--gradient_checkpointing=False"], ["--calibration_"],
         ["--load_in_4bit --"]),
        ("dense", [*SMALL[:2], "--calibration_passes", "1", "--calibration_offload", "none"], [], ["offload cpu"]),
        ("dense", [*SMALL, "--load_in_8bit"], ["--load_in_8bit"], ["--load_in_4bit"]),
        ("dense", [*SMALL, "--load_in_4bit", "--importance_weights", "original"],
         ["--load_in_4bit", "--importance_weights original"], []),
        ("dense", ["--ds_config", "zero2.json", "--gradient_checkpointing"], ["zero2.json", "--gradient_check"], []),
        ("dense", ["--nvme_path", "/disk", "--ds_config", "zero3_nvme.json"], ["zero3_nvme.json", "--nvme_path"], []),
        ("dense", ["--method", "full"], ["--method full"], ["--load_in"]),
        ("dense", ["--no_bf16", "--output_dir", "runs/it's"], ["--no_bf16", "--output_dir"], []),
        ("quantized", SMALL, [], ["--load_in"]),
        ("experts", ["--adapt_experts", *SMALL], ["--adapt_experts"], ["--load_in"]),
        ("experts", ["--nodes", "2", "--network", "ethernet-25"], [], []),
    ],
)  # fmt: skip
def test_a_run_takes_what_is_proposed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    flags: list[str],
    proposed: list[str],
    not_proposed: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if model == "experts":
        folder = mixtral(tmp_path / "model")
    else:
        more = {"quantization_config": BNB_4BIT} if model == "quantized" else {}
        folder = llama_7b(tmp_path / "model", **more)
    finished = call_main("plan", ["--model_name_or_path", folder, *RUN, *flags]).succeeded()
    line = finished.lines[-1]
    assert line.startswith("fits: deepspeed ")
    assert all(words in line for words in proposed)
    assert not any(words in line for words in not_proposed)
    words = shlex.split(line)
    call_main("train", [*words[words.index(str(ROOT / "launch" / "train.py")) + 1 :], "--dry_run"]).succeeded()


@pytest.mark.parametrize(
    ("more", "flags", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, [], "is quantized by gptq"),
        ({"quantization_config": BNB_4BIT}, ["--load_in_4bit"], "is quantized already"),
        ({}, ["--adapt_experts"], "has no experts in fused parameters"),
        ({}, ["--load_in_4bit", "--method", "full"], "method: full trains all weights"),
        ({}, ["--ds_config", "zero3_nvme.json"], "nvme_path is not known"),
        ({}, ["--core_regions", "missing.safetensors"], "missing.safetensors"),
        ({}, ["--expected_world_size", "4"], "4 ranks were asked for and 8 came"),
        ({}, ["--network_gb_per_s", "0"], "network_gb_per_s: 0.0 is not positive"),
    ],
)
def test_what_a_run_refuses_a_plan_refuses(
    tmp_path: Path, more: dict[str, object], flags: list[str], message: str
) -> None:
    finished = call_main("plan", ["--model_name_or_path", llama_7b(tmp_path / "model", **more), *RUN, *flags])
    assert finished.code == 2
    assert len(finished.errors) == 1
    assert message in finished.errors[0]


def test_the_users_json_is_judged_beside_all_others(tmp_path: Path) -> None:
    flags = [*RUN, "--ds_config", "zero1.json", "--load_in_4bit", "False", "--model_name_or_path"]
    finished = call_main("plan", [*flags, llama_7b(tmp_path / "model"), "--device_memory_gb", "12"]).succeeded()
    assert "kept as given: --ds_config, --load_in_4bit" in finished.out
    rows = [line for line in finished.lines if line.startswith("zero")]
    assert any(line.startswith("zero3 checkpointing") and line.endswith("yes") for line in rows)
    assert sum("(zero1.json)" in line for line in rows) == 2
    assert finished.lines[-1].startswith("does not fit: ")


def test_quantized_experts_load_in_shards(tmp_path: Path) -> None:
    """Mixtral: 2.8 GB of its 23 are linears, which 4 bits leave at 0.7; the experts stay in 16 bits, shared by 8."""
    flags = [*RUN, "--load_in_4bit", "--device_memory_gb", "20"]
    finished = call_main("plan", ["--model_name_or_path", mixtral(tmp_path / "model"), *flags]).succeeded()
    below = [line for line in finished.lines if line.startswith(("zero0", "zero1", "zero2"))]
    assert below
    assert all("load needs 2" in line for line in below)
    assert any(line.startswith("load") and "weights 2.91" in line for line in finished.lines)  # 23.3 GB / 8
    assert "--ds_config zero3_nf4.json" in finished.lines[-1]
