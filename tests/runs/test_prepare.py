"""What is decided before weights load: calibration rows come from the training split."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models
from sample_rows import write_rows

from taso_ds.config import RunConfig, parse_run_config
from taso_ds.data.encode import EncodedRow, encode_completions
from taso_ds.data.task_data import load_task_data
from taso_ds.defaults import with_defaults
from taso_ds.distributed.zero_config import ZeroConfig
from taso_ds.errors import UserError
from taso_ds.models.arguments import ModelArguments
from taso_ds.models.spec import BaseSpec, read_spec
from taso_ds.runs.prepare import (
    calibration_rows,
    check_labels,
    check_length,
    check_quantization,
    resolve_deepspeed,
)


def config_of(*flags: str) -> RunConfig:
    return parse_run_config(["--model_name_or_path", "base", "--task", "completion", *flags])


def spec_of(config: RunConfig, model: Any) -> BaseSpec:
    return BaseSpec(config.model, "base", model.config, head="ForCausalLM" not in type(model).__name__)


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """Flags of 40 training and 10 evaluation rows that no two share a text with."""
    train, evaluation = write_rows(tmp_path / "train.jsonl", 40), write_rows(tmp_path / "eval.jsonl", 10)
    return ["--train_file", str(train), "--eval_file", str(evaluation)]


# Calibration rows -----------------------------------------------------------------------------------------------------


def encoded(config: RunConfig) -> list[EncodedRow]:
    data = load_task_data(config.data, seed=config.run.seed)
    return encode_completions(
        tiny_models.byte_tokenizer(), data.train, max_seq_length=64, append_eos=True, source=data.train_source
    )


def test_calibration_rows_are_training_rows(data: list[str]) -> None:
    config = config_of(*data, "--calibration_samples", "12")
    tokenizer, rows = tiny_models.byte_tokenizer(), encoded(config)
    chosen = calibration_rows(config, rows)
    texts = [tokenizer.decode(row.input_ids, skip_special_tokens=True) for row in chosen]
    assert len(set(texts)) == len(chosen) == 12
    assert all(text.startswith("train ") for text in texts)
    positions = [rows.index(row) for row in chosen]
    assert positions == sorted(positions)  # in split order
    assert positions != list(range(12))  # but drawn from all of it


def test_calibration_rows_follow_the_seed_alone(data: list[str]) -> None:
    def chosen(*flags: str) -> list[int]:
        config = config_of(*data, "--calibration_samples", "12", *flags)
        rows = encoded(config)
        return [rows.index(row) for row in calibration_rows(config, rows)]

    assert chosen() == chosen()
    assert chosen() == chosen("--learning_rate", "1")
    assert chosen() != chosen("--seed", "1")


def test_too_few_rows_are_all_taken(data: list[str]) -> None:
    config = config_of(*data, "--calibration_samples", "500")
    rows = encoded(config)
    assert calibration_rows(config, rows) == rows
    assert len(rows) == 40


# Experts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "full"])
def test_only_taso_adapts_experts(method: str) -> None:
    with pytest.raises(UserError, match=f"adapt_experts: --method {method} does not adapt single experts"):
        config_of("--adapt_experts", "--method", method)


def test_experts_of_a_quantized_base_are_refused() -> None:
    config = config_of("--adapt_experts", "--load_in_4bit")
    with pytest.raises(UserError, match="adapt_experts: the base is quantized"):
        check_quantization(config, spec_of(config, tiny_models.mixtral()), ZeroConfig({"zero_optimization": {}}))


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
        check_length(config, BaseSpec(config.model, "base", base_config, head=False))

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
        check_labels(get_task("gsm8k"), head=True)


def test_the_deepspeed_dict_has_the_runs_numbers() -> None:
    config = config_of("--per_device_train_batch_size", "2", "--global_batch_size", "24", "--no_bf16")
    zero, sizes = resolve_deepspeed(config, world_size=4)
    assert (sizes.micro_batch_size, sizes.grad_accum_steps, sizes.world_size) == (2, 3, 4)
    assert zero.raw["train_batch_size"] == sizes.global_batch_size == 24
    assert not zero.bf16
    assert zero.stage == 3  # the default file
