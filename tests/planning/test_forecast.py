"""A run's model and strategy in numbers: what is quantized, merged and offloaded follows what the run does."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models

from taso_ds.config import RunConfig, parse_run_config
from taso_ds.errors import UserError
from taso_ds.job import resolve_deepspeed
from taso_ds.models.spec import BaseSpec
from taso_ds.planning.count_model import can_quantize, count_model
from taso_ds.planning.forecast import strategy_of
from taso_ds.planning.numbers.devices import get_device
from taso_ds.planning.numbers.memory import phase_usage
from taso_ds.planning.numbers.model_shape import ModelShape
from taso_ds.planning.numbers.strategy import Strategy, Workload
from taso_ds.planning.numbers.weights import weight_bytes

BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def run(*flags: str) -> RunConfig:
    return parse_run_config(["--model_name_or_path", "tiny", "--task", "completion", *flags])


def spec_of(config: RunConfig, model: Any, *, source: str = "tiny", **stored: Any) -> BaseSpec:
    base_config = model.config
    base_config.architectures = [type(model).__name__]
    if stored:
        base_config.quantization_config = stored
    return BaseSpec(config.model, source, base_config, head=False)


def counted(model: Any, *flags: str, **options: Any) -> ModelShape:
    config = run(*flags)
    base = spec_of(config, model, **options)
    return count_model(config, base, base.targets(config.adapter.target_modules, experts=config.adapter.adapt_experts))


def test_experts_are_merged_and_not_quantized() -> None:
    """By transformers, where it loads them; in shards they are read as they lie."""
    shape = counted(tiny_models.mixtral())
    assert not shape.reads_whole
    assert shape.merged == shape.experts == 2 * 4 * 3 * 32 * 48
    assert shape.largest_merged == 4 * 2 * 32 * 48  # gate and up of four experts
    assert shape.quantized == shape.targets  # attention only
    dense = counted(tiny_models.llama())
    assert (dense.reads_whole, dense.merged) == (False, 0)


def test_a_checkpoint_says_itself_whether_it_is_merged(tmp_path: Path) -> None:
    """gpt-oss has no rule to merge; a saved Mixtral has its experts one by one; hrm's attention must be split."""
    assert counted(tiny_models.gpt_oss()).merged == 0
    assert counted(tiny_models.hrm()).reads_whole
    tiny_models.hrm().save_pretrained(tmp_path / "hrm")
    assert counted(tiny_models.hrm(), source=str(tmp_path / "hrm")).reads_whole
    model = tiny_models.mixtral()
    model.save_pretrained(tmp_path)
    assert counted(model, source=str(tmp_path)).merged == counted(tiny_models.mixtral()).merged


def test_a_checkpoint_says_itself_what_is_quantized() -> None:
    ours = counted(tiny_models.llama(), "--load_in_4bit")
    theirs = counted(tiny_models.llama(), **BNB, llm_int8_skip_modules=["lm_head", "down_proj"])
    assert ours.quantized - theirs.quantized == 2 * 48 * 32  # down of two layers
    assert ours.double_quantized
    assert not theirs.double_quantized
    assert counted(tiny_models.llama(), **BNB, bnb_4bit_use_double_quant=True).double_quantized


def test_what_can_be_quantized() -> None:
    base = spec_of(run(), tiny_models.mixtral())
    assert can_quantize(run(), base)
    assert not can_quantize(run("--adapt_experts"), base)
    assert not can_quantize(run("--method", "full"), base)
    with pytest.raises(UserError, match="gptq"):
        counted(tiny_models.llama(), quant_method="gptq", bits=4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("zero1.json", Strategy(1)),
        ("zero3_offload.json", Strategy(3, place="cpu")),
        ("zero3_nvme.json", Strategy(3, place="nvme")),
        ("zero3_hpz.json", Strategy(3, hpz=True)),
    ],
)
def test_a_strategy_is_read_from_the_json(name: str, expected: Strategy) -> None:
    config = run("--ds_config", name, "--nvme_path", "/disk", "--gradient_checkpointing")
    zero, _ = resolve_deepspeed(config, 16, ranks_per_node=8)
    found = strategy_of(config, zero)
    assert (found.stage, found.place, found.hpz) == (expected.stage, expected.place, expected.hpz)
    assert found.gradient_checkpointing
    assert found.ds_config == name
    assert found.limits.prefetch_bucket == (0 if found.place == "nvme" else 50_000_000)


def test_a_host_is_asked_for_what_8_bits_and_nvme_leave() -> None:
    """The check before loading uses these numbers, so a quantized base must not count as a whole one."""
    shape, work, device = counted(tiny_models.llama()), Workload(gpus_per_node=2), get_device("cpu")

    def needed(strategy: Strategy) -> float:
        return phase_usage(shape, strategy, work, device)["train"].host["weights"]

    assert needed(Strategy(2, bits=8)) == 2 * weight_bytes(shape, Strategy(2, bits=8)).total
    assert needed(Strategy(2, bits=8)) < needed(Strategy(2))
    on_disk = phase_usage(shape, Strategy(3, place="nvme"), work, device)["train"].host
    assert on_disk.get("weights", 0.0) == 0.0
    assert on_disk["nvme buffers"] == 2 * 2 * 5 * 100_000_000
