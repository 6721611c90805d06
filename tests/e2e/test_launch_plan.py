"""``launch/plan.py`` as a user starts it: from config.json alone, with files on request."""

import json
import shlex
from pathlib import Path

import pytest
from launching import call_main

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
    flags = ["--model_name_or_path", folder, "--task", "gsm8k", "--nodes", "2", "--max_seq_length", "2048"]
    flags += ["--per_device_train_batch_size", "1", "--json", "plan.json", "--plot", "plan.png"]
    finished = call_main("plan", flags).succeeded()
    assert "model: 68,976,648,192 frozen parameters" in finished.out  # as published
    last = shlex.split(finished.lines[-1])
    assert last[:8] == ["fits:", "deepspeed", "--hostfile", "hostfile", "--num_nodes", "2", "--num_gpus", "8"]
    assert last[last.index("--task") + 1] == "gsm8k"
    plan = json.loads(Path("plan.json").read_text())
    assert plan["fastest"]["stage"] == 3  # 138 GB do not fit on 80
    stages = {row["stage"]: row["fits"] for row in plan["strategies"] if not row["load_in_4bit"]}
    assert not stages[2]
    assert Path("plan.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "plan.json", "plan.png"]


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    finished = call_main(
        "plan", ["--model_name_or_path", config_only(tmp_path), "--gpus_per_node", "1", "--device_memory_gb", "4",
                 "--host_memory_gb", "32"]
    ).succeeded()  # fmt: skip
    assert finished.lines[-1].startswith("does not fit: ")
