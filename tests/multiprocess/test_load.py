"""ZeRO-3 loading on two and four ranks: every bit of ``from_pretrained``, whatever the checkpoint looks like."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import load_ranks
import pytest
import tiny_models
import torch
from forked import ForkServer
from launching import HAS_NVME, NO_NVME
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from taso_ds.distributed import zero
from taso_ds.distributed.ds_config import read_ds_config

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(600)]

THROUGH_TRANSFORMERS = "through transformers"
NORMS = [f"model.layers.{layer}.{place}_layernorm.weight" for layer in (0, 1) for place in ("input", "post_attention")]
UP = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)]


def rewrite(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    save_file(change(tensors), path, metadata={"format": "pt"})


def both_tied(scale: float) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] * scale}


def without(*keys: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {name: value for name, value in tensors.items() if name not in keys}


def misshapen(*keys: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: tensors | {key: torch.zeros(3) for key in keys}


def odd_llama() -> Any:
    """A Llama whose matrices do not divide by the ranks: 33 tokens of 30 numbers."""
    return tiny_models.llama(
        layers=1, seed=3, vocab_size=33, hidden_size=30, intermediate_size=7, num_attention_heads=3,
        num_key_value_heads=3, max_position_embeddings=16, attention_bias=True,
    )  # fmt: skip


def wide_llama() -> Any:
    """A Llama whose MLP is worth reading from a disk: on 4 ranks a bit more than a megabyte of each matrix in fp32."""
    return tiny_models.llama(
        layers=1, seed=5, vocab_size=33, hidden_size=64, intermediate_size=16400, num_attention_heads=2,
        max_position_embeddings=16,
    )  # fmt: skip


def gptj() -> Any:
    """A GPT-J, which computes a table of sines in its modules' dtype."""
    from transformers import GPTJConfig, GPTJForCausalLM

    config = GPTJConfig(vocab_size=33, n_positions=512, n_embd=32, n_layer=1, n_head=2, rotary_dim=8)
    torch.manual_seed(6)
    return GPTJForCausalLM(config)


def changed(root: Path, name: str, **values: int) -> Path:
    """Write a shipped DeepSpeed JSON with other numbers."""
    raw = read_ds_config(f"{name}.json")
    for key, value in values.items():
        section = raw["zero_optimization"]
        (section if key in section else section["offload_param"])[key] = value
    path = root / f"{name}.json"
    path.write_text(json.dumps(raw))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("load")
    cases: dict[str, dict[str, Any]] = {}

    def add(
        name: str, model: Any, *flags: str, change: Any = None, ds_config: str = "zero3.json", **options: Any
    ) -> None:
        model.save_pretrained(root / name, **options)
        if change is not None:
            rewrite(root / name, change)
        cases[name] = {"folder": name, "flags": list(flags), "ds_config": ds_config}

    llama, tied = tiny_models.llama(), tiny_models.llama(tied=True)
    add("bf16", llama)
    add("fp32", llama, "--no_bf16")
    add("stored_bf16", copy.deepcopy(llama).bfloat16())
    add("widened", copy.deepcopy(llama).bfloat16(), "--no_bf16")
    add("stored_fp16", copy.deepcopy(llama).half())
    add("several_files", llama, max_shard_size="20KB")
    (root / "several_files" / "consolidated.safetensors").write_bytes(b"not read")
    add("old_index", llama, max_shard_size="20KB")
    llama.save_pretrained(root / "old_index")  # the index stays, and names files that are gone
    add("odd", odd_llama(), "--no_bf16")
    add("tied", tied)
    add("both_tied", tied, change=both_tied(1.0))
    add("both_differ", tied, "--no_bf16", change=both_tied(2.0))
    add("gpt2", tiny_models.gpt2())
    add("bare_body", tiny_models.gpt2().transformer)
    (root / "bare_body" / "config.json").write_text((root / "gpt2" / "config.json").read_text())
    add("classifier", tiny_models.bert(), "--head", "classification")
    add("new_head", llama, "--head", "classification", "--no_bf16")
    add("encoder", tiny_models.bert().bert, "--head", "classification", "--no_bf16")
    add("experts", tiny_models.mixtral(), "--no_bf16")
    add("experts_in_files", tiny_models.qwen3_moe(), max_shard_size="20KB")
    add("rearranged", tiny_models.hrm(), "--no_bf16")
    add("computed_buffer", gptj())
    rotary = {"model.rotary_emb.inv_freq": torch.ones(4, dtype=torch.bfloat16)}
    add("stored_buffer", llama, change=lambda tensors: tensors | rotary)
    add("generation", llama)
    generation = {"eos_token_id": [2, 7, 9], "repetition_penalty": 1.05, "do_sample": True, "temperature": 0.7}
    (root / "generation" / "generation_config.json").write_text(json.dumps(generation))
    add("surplus", llama, change=lambda tensors: tensors | {"model.extra.weight": torch.zeros(3)})
    add("lacking", llama, change=without(*NORMS, *UP))
    add("lacking_nf4", llama, "--load_in_4bit", change=without(*UP))
    add("misshapen", llama, change=misshapen(NORMS[0]))
    add("all_wrong", llama, change=lambda tensors: misshapen(*NORMS, UP[0])(without(UP[1])(tensors)))
    add("more_surplus", llama, change=lambda tensors: tensors | {f"extra.{n}": torch.zeros(3) for n in range(5)})
    add("cpu", odd_llama(), "--no_bf16", ds_config="zero3_offload.json")
    if HAS_NVME:
        add("nvme", wide_llama(), "--no_bf16", ds_config="zero3_nvme.json")
        add("nvme_too_small", wide_llama(), "--no_bf16", ds_config=str(changed(root, "zero3_nvme", buffer_size=1000)))
    add("nodes_of_two", odd_llama(), "--no_bf16", ds_config=str(changed(root, "zero3_hpz", zero_hpz_partition_size=2)))
    (root / "cases.json").write_text(json.dumps(cases))
    return root


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def found(request: pytest.FixtureRequest, fork_server: ForkServer, folder: Path) -> Any:
    return fork_server.run_on_ranks(load_ranks.load_all, request.param, folder)


def reference(folder: Path, flags: list[str]) -> dict[str, Any]:
    model_class: Any = AutoModelForSequenceClassification if "classification" in flags else AutoModelForCausalLM
    torch.manual_seed(7)
    dtype = torch.float32 if "--no_bf16" in flags else torch.bfloat16
    model = model_class.from_pretrained(folder, config=AutoConfig.from_pretrained(folder), dtype=dtype)
    parameters = {name: load_ranks.digest(value) for name, value in model.named_parameters(remove_duplicate=False)}
    buffers = {name: load_ranks.digest(value) for name, value in model.named_buffers()}
    checksum, generation = zero.checksum(list(model.parameters())), load_ranks.generation(model)
    return {"parameters": parameters, "buffers": buffers, "checksum": checksum, "generation": generation}


on_nvme = pytest.mark.skipif(not HAS_NVME, reason=NO_NVME)
SAME = (
    "bf16", "fp32", "stored_bf16", "widened", "stored_fp16", "several_files", "old_index", "odd", "tied", "both_tied",
    "both_differ", "gpt2", "bare_body", "classifier", "new_head", "encoder", "experts", "experts_in_files",
    "rearranged", "computed_buffer", "stored_buffer", "generation", "surplus", "cpu", "nodes_of_two",
    pytest.param("nvme", marks=on_nvme),
)  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_every_bit_is_from_pretrained(found: dict[str, Any], folder: Path, name: str) -> None:
    flags = json.loads((folder / "cases.json").read_text())[name]["flags"]
    expected = reference(folder / name, flags)
    assert {key: found[name][key] for key in expected} == expected
    assert not found[name]["training"]


@pytest.mark.parametrize("name", SAME)
def test_each_rank_holds_its_share_only(found: dict[str, Any], folder: Path, name: str) -> None:
    shards = found[name]["shards"]
    assert max(shards) - min(shards) <= 60 * len(shards)  # the last rank's parts are shorter by less than one each
    whole = [line for line in found[name]["said"] if THROUGH_TRANSFORMERS in line]
    assert bool(whole) == (name == "rearranged"), found[name]["said"]


# How often a stored tensor is read where it is not once: without a place in the model, or also to be compared.
READ = {
    "stored_buffer": {"model.rotary_emb.inv_freq": 0},
    "surplus": {"model.extra.weight": 0},
    "new_head": {"lm_head.weight": 0},
    "both_tied": {"model.embed_tokens.weight": 2},
    "both_differ": {"model.embed_tokens.weight": 2, "lm_head.weight": 2},
}


@pytest.mark.parametrize("name", SAME)
def test_each_rank_reads_its_share_only_and_no_weight_travels(found: dict[str, Any], folder: Path, name: str) -> None:
    seen = found[name]["seen"]
    if name == "rearranged":  # transformers reads on rank 0 and sends every weight
        assert [rank["bytes_read"] for rank in seen] == [0] * len(seen)
        assert all(rank["weights_sent"] for rank in seen)
        return
    assert not any(rank["weights_sent"] for rank in seen)
    stored = {
        key: value for file in (folder / name).glob("model*.safetensors") for key, value in load_file(file).items()
    }
    whole = sum(value.nbytes * READ.get(name, {}).get(key, 1) for key, value in stored.items())
    if name == "nodes_of_two":
        whole += whole * len(seen) // 2  # once more on each node
    read = [rank["bytes_read"] for rank in seen]
    assert sum(read) == whole
    assert max(read) - min(read) <= 60 * len(seen) * 4  # as their shards, of at most 4 bytes a number


@pytest.mark.parametrize("name", [name for name in SAME if name != "rearranged"])
def test_rank_0_shows_a_bar_that_comes_to_its_end(found: dict[str, Any], name: str) -> None:
    shown, *others = (rank["terminal"] for rank in found[name]["seen"])
    assert "loading: 100%" in shown
    assert not any("loading" in terminal for terminal in others)


@on_nvme
def test_large_partitions_are_on_the_disk(found: dict[str, Any]) -> None:
    nvme = found["nvme"]
    ranks = len(nvme["shards"])
    assert nvme["on_disk"] == [64 * 16400 // ranks] * 3  # smaller ones stay on the CPU, as DeepSpeed has it
    assert not any(nvme["secondary"])


def test_partitions_are_where_the_config_places_them(found: dict[str, Any]) -> None:
    nodes = found["nodes_of_two"]
    # Half of each parameter on each of the two ranks of a node, rounded up to what all ranks divide.
    assert sum(nodes["secondary"]) >= sum(nodes["shards"]) / 2
    assert all(size > 0 for size in nodes["secondary"])
    assert found["cpu"]["on_disk"] == nodes["on_disk"] == []


@on_nvme
def test_a_buffer_too_small_for_a_partition_is_named(found: dict[str, Any]) -> None:
    assert "buffer_size is 1000, but a rank's share of the (16400, 64) parameter" in found["nvme_too_small"]["error"]


def test_different_tied_tensors_stay_apart_and_are_named(found: dict[str, Any]) -> None:
    both = found["both_differ"]
    assert both["parameters"]["lm_head.weight"] != both["parameters"]["model.embed_tokens.weight"]
    assert any("lm_head.weight" in line and "differ" in line for line in both["said"])
    assert found["both_tied"]["parameters"]["lm_head.weight"] == found["tied"]["parameters"]["lm_head.weight"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lacking", f"lacks {', '.join(sorted([*NORMS, *UP])[:3])} and 3 more (6 in all)"),
        ("lacking_nf4", f"lacks {UP[0]}, {UP[1]} in the model's shape"),
        ("misshapen", f"holds {NORMS[0]} as (3,) instead of (32,)"),
        (
            "all_wrong",
            f"holds {NORMS[0]} as (3,) instead of (32,), {UP[0]} as (3,) instead of (48, 32),"
            f" {NORMS[1]} as (3,) instead of (32,)"
            f" and 2 more (5 in all); it lacks {UP[1]}",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named(found: dict[str, Any], name: str, said: str) -> None:
    assert said in found[name]["error"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("surplus", "holds model.extra.weight, which the model has no place for"),
        ("more_surplus", "holds extra.0, extra.1, extra.2 and 2 more (5 in all), which"),
    ],
)
def test_surplus_tensors_are_named(found: dict[str, Any], name: str, said: str) -> None:
    assert any(said in line for line in found[name]["said"])
