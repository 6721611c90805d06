"""What is decided before weights load, and refused there."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models
from configs import config_of

from taso_ds.config import RunConfig, parse_run_config
from taso_ds.defaults import with_defaults
from taso_ds.distributed.zero_config import ZeroConfig
from taso_ds.errors import UserError
from taso_ds.job import _check_labels, _check_length, _check_quantization, resolve_deepspeed
from taso_ds.models.arguments import ModelArguments
from taso_ds.models.spec import BaseSpec, read_spec


def spec_of(config: RunConfig, model: Any) -> BaseSpec:
    return BaseSpec(config.model, "base", model.config, head="ForCausalLM" not in type(model).__name__)


# Experts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "full"])
def test_only_taso_adapts_experts(method: str) -> None:
    with pytest.raises(UserError, match=f"adapt_experts: --method {method} does not adapt single experts"):
        config_of("--adapt_experts", "--method", method)


def test_experts_of_a_quantized_base_are_refused() -> None:
    config = config_of("--adapt_experts", "--load_in_4bit")
    with pytest.raises(UserError, match="adapt_experts: the base is quantized"):
        _check_quantization(config, spec_of(config, tiny_models.mixtral()), ZeroConfig({"zero_optimization": {}}))


# The rest -------------------------------------------------------------------------------------------------------------


def test_a_model_without_a_task_is_refused() -> None:
    with pytest.raises(UserError, match="task: name one"):
        with_defaults(parse_run_config(["--model_name_or_path", "base"]))
    with pytest.raises(UserError, match="gguf_file: needs --model_name_or_path"):
        with_defaults(parse_run_config(["--gguf_file", "x.gguf", "--task", "rte"]))


def test_sequences_longer_than_the_model_are_refused() -> None:
    from transformers import XLNetConfig

    def check(length: int, base_config: Any) -> None:
        config = config_of("--max_seq_length", str(length))
        _check_length(config, BaseSpec(config.model, "base", base_config, head=False))

    base = tiny_models.llama(layers=1).config  # 128 positions
    check(128, base)
    with pytest.raises(UserError, match="max_seq_length: 129 exceeds the model's 128 positions"):
        check(129, base)
    with pytest.raises(UserError, match="exceeds the model's 128 positions"):
        check(129, tiny_models.gpt2().config)
    check(4096, XLNetConfig(n_layer=1))  # any length


@pytest.mark.parametrize(("task", "labels"), [("rte", 2), ("stsb", 1)])
def test_a_head_gets_the_tasks_labels(task: str, labels: int, tmp_path: Path) -> None:
    from taso_ds.data.tasks import get_task

    tiny_models.bert(num_labels=5).config.save_pretrained(tmp_path)
    arguments = ModelArguments(model_name_or_path=str(tmp_path), head="classification")
    base = read_spec(arguments, str(tmp_path), num_labels=get_task(task).num_labels)
    base.pad_with(0)
    assert (base.config.num_labels, base.config.pad_token_id) == (labels, 0)
    assert base.meta.config.num_labels == labels


def test_a_task_without_labels_has_no_head() -> None:
    from taso_ds.data.tasks import get_task

    with pytest.raises(UserError, match="gsm8k has no labels for a classification head"):
        _check_labels(get_task("gsm8k"), head=True)


def test_the_deepspeed_dict_has_the_runs_numbers() -> None:
    config = config_of("--per_device_train_batch_size", "2", "--global_batch_size", "24", "--no_bf16")
    zero, sizes = resolve_deepspeed(config, 4)
    assert (sizes.micro_batch_size, sizes.grad_accum_steps, sizes.world_size) == (2, 3, 4)
    assert zero.raw["train_batch_size"] == sizes.global_batch_size == 24
    assert not zero.bf16
    assert zero.stage == 3  # the default file
