"""Reading and resolving a DeepSpeed JSON: what is filled in, what is refused and how the refusal reads."""

import copy
import json
import logging
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taso_ds.distributed import ds_config_keys as keys
from taso_ds.distributed.ds_config import read_ds_config, resolve_ds_config, shipped_ds_configs, without_secrets
from taso_ds.distributed.ds_config_values import AUTO, Kind
from taso_ds.errors import UserError

BATCH = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), AUTO)
ZERO2 = {**BATCH, "zero_optimization": {"stage": 2}}


def resolve(raw: dict[str, Any], **changes: Any) -> dict[str, Any]:
    sizes = {"micro_batch_size": 4, "grad_accum_steps": 2, "world_size": 8}
    return resolve_ds_config(raw, **{**sizes, "bf16": True, "max_grad_norm": 1.0, **changes}, source="mine.json").raw


def zero(stage: object, **section: object) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **section}}


# Reading ------------------------------------------------------------------------------------------------------------


def test_reads_a_path_and_a_shipped_name(tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text('{"steps_per_print": 3}')
    assert read_ds_config(str(tmp_path / "own.json")) == {"steps_per_print": 3}
    assert read_ds_config("zero3.json")["zero_optimization"]["stage"] == 3
    assert all(file.is_file() for file in shipped_ds_configs())


def test_the_current_folder_comes_before_the_shipped_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zero3.json").write_text('{"zero_optimization": {"stage": 1}}')
    monkeypatch.chdir(tmp_path)
    assert read_ds_config("zero3.json") == zero(1)


def test_missing_file_lists_the_shipped_ones_and_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no such file; shipped are zero0.json, .*zero3_offload.json \(nearest: 'zero2.json'\)"
    ):
        read_ds_config("zreo2.json")
    with pytest.raises(UserError, match="no such file"):
        read_ds_config("elsewhere/zero2.json")  # a path is not a bare name
    with pytest.raises(UserError, match="a folder"):
        read_ds_config(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n  "a": 1,\n}', r"line 3, column 1: |line 2, column 9: "), ("", "column 1: "),
        ('{"a": {"b": 1, "b": 2}}', "the key 'b' twice"), ("[1]", "holds a list"), ("2", "holds a number"),
        ('{"a": NaN}', "holds NaN, which is not JSON"), (b"\xff\xfe", "cannot read"),
    ],
)  # fmt: skip
def test_malformed_files_say_where(text: str | bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as caught:
        read_ds_config(str(file))
    assert "bad.json" in str(caught.value)
    assert "\n" not in str(caught.value)


# What is filled in ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", shipped_ds_configs(), ids=lambda file: file.name)
def test_nothing_automatic_is_left_and_the_input_is_not_touched(file: Path) -> None:
    raw = read_ds_config(str(file))
    before = copy.deepcopy(raw)
    resolved = resolve(raw, nvme_path="/disk")
    assert raw == before
    assert f'"{AUTO}"' not in json.dumps(resolved)
    resolved["zero_optimization"]["stage"] = -1
    assert raw == before


def test_the_run_decides_batch_precision_clipping_and_silence() -> None:
    resolved = resolve(ZERO2)
    assert resolved["train_batch_size"] == 4 * 2 * 8
    assert resolved["train_micro_batch_size_per_gpu"] == 4
    assert resolved["gradient_accumulation_steps"] == 2
    assert resolved["gradient_clipping"] == 1.0
    assert resolved["bf16"] == {"enabled": True}
    assert resolved["steps_per_print"] >= 10**9
    assert resolve(ZERO2, bf16=False, max_grad_norm=0.0)["bf16"] == {"enabled": False}
    assert resolve({})["zero_optimization"] == {"stage": 0}


def test_numbers_that_agree_are_accepted() -> None:
    raw = {
        "train_batch_size": 64, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2,
        "gradient_clipping": 1, "bf16": {"enabled": True}, "steps_per_print": 10,
    }  # fmt: skip
    resolved = resolve(raw)
    assert resolved["train_batch_size"] == 64
    assert resolved["steps_per_print"] == 10


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("bf16", [True, False])
def test_gradients_add_in_fp32_where_deepspeed_can(stage: int, bf16: bool, caplog: pytest.LogCaptureFixture) -> None:
    resolved = resolve(zero(stage), bf16=bf16)
    rounded = stage == 0 and bf16
    assert resolved["data_types"]["grad_accum_dtype"] == ("bf16" if rounded else "fp32")
    assert resolved["communication_data_type"] == "fp32"
    assert ("adds the gradients of 2 micro-batches in bf16" in caplog.text) is rounded


def test_automatic_zero_values_are_documented_numbers() -> None:
    section = dict.fromkeys(keys.ZERO_AUTO, AUTO)
    resolved = resolve({"zero_optimization": {**section, "stage": 3, "overlap_comm": AUTO}})["zero_optimization"]
    assert resolved == {**keys.ZERO_AUTO, "stage": 3, "overlap_comm": True}
    assert resolve(zero(1, overlap_comm=AUTO))["zero_optimization"] == {
        "stage": 1,
        "overlap_comm": False,
    }


def test_unprefixed_stage3_names_are_the_same_keys() -> None:
    zero = {"stage": 3, "prefetch_bucket_size": AUTO, "max_live_parameters": 5e8}
    assert resolve({"zero_optimization": zero})["zero_optimization"] == {
        "stage": 3,
        "stage3_prefetch_bucket_size": 50_000_000,
        "stage3_max_live_parameters": 5e8,
    }


def test_offloading_the_optimizer_keeps_torch_adamw() -> None:
    offload = zero(3, offload_optimizer={"device": "cpu"})
    assert resolve(offload)["zero_force_ds_cpu_optimizer"] is False
    assert "zero_force_ds_cpu_optimizer" not in resolve(ZERO2)


def test_a_file_written_for_the_hugging_face_trainer_works(caplog: pytest.LogCaptureFixture) -> None:
    adam = {"lr": AUTO, "betas": AUTO, "eps": AUTO, "weight_decay": AUTO, "torch_adam": True}
    raw = {
        **ZERO2,
        "fp16": {"enabled": AUTO, "loss_scale": 0, "initial_scale_power": 16},
        "bf16": {"enabled": AUTO},
        "optimizer": {"type": "AdamW", "params": adam},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": AUTO, "warmup_num_steps": AUTO}},
        "steps_per_print": AUTO,
        "wall_clock_breakdown": False,
    }
    with caplog.at_level(logging.INFO):
        resolved = resolve(raw)
    assert not {"optimizer", "scheduler", "fp16"} & resolved.keys()
    assert "dropped the optimizer section" in caplog.text
    assert "dropped the scheduler section" in caplog.text


@pytest.mark.parametrize("key", keys.UNSUPPORTED)
def test_unsupported_keys_are_left_out_when_they_are_off(key: str) -> None:
    entry = keys.UNSUPPORTED[key]
    for off in (
        None,
        {},
        *entry.off,
        {entry.switch: entry.off[0], "other": 3} if entry.switch else {"a": entry.off[0]},
    ):
        assert key not in resolve({**ZERO2, key: off})


# What is refused ------------------------------------------------------------------------------------------------------

ON: dict[str, Any] = {
    "gradient_allreduce_op": "sum", "gradient_predivide_factor": 8.0, "managed_gradient_accumulation": False,
    "seq_parallel_communication_data_type": "bf16", "data_parallel_size": 2, "sequence_parallel_size": 2,
    "activation_checkpointing": {"partition_activations": True}, "tensor_parallel": {"autotp_size": 2},
    "weight_quantization": {"quantized_initialization": {"num_bits": 4}},
}  # fmt: skip


@pytest.mark.parametrize("key", keys.UNSUPPORTED)
def test_unsupported_keys_are_refused_when_they_are_on(key: str) -> None:
    switch = keys.UNSUPPORTED[key].switch
    on = ON.get(key, True if switch is None else {switch: True})
    with pytest.raises(UserError, match=f"mine.json: {key} is not supported; "):
        resolve({**ZERO2, key: on})


@pytest.mark.parametrize(
    ("raw", "changes", "message"),
    [
        ({"zero_optimisation": {}}, {}, r"unknown key 'zero_optimisation' \(nearest: 'zero_optimization'\)"),
        ({"gradient_acumulation_steps": 2}, {}, r"nearest: 'gradient_accumulation_steps'"),
        (zero(3, stage3_prefech_bucket_size=1), {},
         r"unknown key 'zero_optimization.stage3_prefech_bucket_size' \(nearest: 'stage3_prefetch_bucket_size'\)"),
        (zero(2, offload_optimizer={"devise": "cpu"}), {},
         r"'zero_optimization.offload_optimizer.devise' \(nearest: 'device'\)"),
        ({"bf16": {"enable": True}}, {}, r"'bf16.enable' \(nearest: 'enabled'\)"),
        ({"data_types": {"grad_acc_dtype": "fp32"}}, {}, r"nearest: 'grad_accum_dtype'"),
        ({"train_batch_size": 32}, {},
         "train_batch_size is 32, but this run has 4 rows per rank × 2 micro-batches × 8 ranks = 64 rows per step"),
        ({"train_micro_batch_size_per_gpu": 1}, {}, "train_micro_batch_size_per_gpu is 1, but this run has 4 rows"),
        ({"gradient_accumulation_steps": True}, {"grad_accum_steps": 1}, "gradient_accumulation_steps is true"),
        ({"train_batch_size": "64"}, {}, 'train_batch_size is "64"'),
        ({"gradient_clipping": 0.5}, {}, "gradient_clipping is 0.5, but this run has --max_grad_norm 1.0"),
        ({"bf16": {"enabled": True}}, {"bf16": False}, "bf16.enabled is true, but the run has --no_bf16"),
        ({"bf16": {"enabled": False}}, {}, "bf16.enabled is false, but the run has --bf16"),
        ({"bfloat16": {"enabled": False}}, {}, "bfloat16.enabled is false"),
        ({"bf16": {}, "bfloat16": {}}, {}, "two names of one section"),
        ({"bf16": True}, {}, "bf16 is true, not an object"),
        ({"bf16": {"bf16_optimizer_states": True}}, {}, "stay in fp32"),
        ({"fp16": {"enabled": True}}, {}, "fp16 is not supported: use --bf16"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, {}, "fp16 and bf16 are both enabled"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, {}, '"lr": 0.001.*--learning_rate'),
        ({"optimizer": {"type": "Lion", "params": {"lr": AUTO}}}, {}, "Lion.*remove the section"),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, {}, "adam_w_mode"),
        ({"scheduler": {"type": "WarmupLR"}}, {}, "WarmupLR.*--lr_scheduler_type and --warmup_ratio"),
        ({"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_max_lr": 1e-3}}}, {}, "every parameter group"),
        ({"zero_optimization": True}, {}, "zero_optimization is true, not an object"),
        ({"zero_optimization": {"reduce_scatter": True}}, {}, "stage is null, not one of 0, 1, 2, 3"),
        (zero(4), {}, "stage is 4"),
        (zero(True), {}, "stage is true"),
        (zero(AUTO), {}, 'stage is "auto"'),
        (zero(2, reduce_bucket_size="5e8"), {}, 'is "5e8", not a whole number'),
        (zero(2, reduce_bucket_size=-1), {}, "is -1, not a whole number"),
        (zero(2, reduce_scatter=1), {}, "reduce_scatter is 1, not true or false"),
        (zero(3, max_live_parameters=1, stage3_max_live_parameters=1), {}, "two names of one key"),
        (zero(2, compute_grad_norm=False), {}, "clipping and the log need"),
        (zero(2, cpu_offload=True), {}, '"offload_optimizer": {"device": "cpu"}'),
        (zero(2, offload_param={"device": "cpu"}), {}, "needs stage 3 or more, not 2"),
        (zero(0, offload_optimizer={"device": "cpu"}), {}, "needs stage 1 or more"),
        (zero(3, offload_param={"device": "gpu"}), {}, "not one of none, cpu, nvme"),
        (zero(3, offload_param={"device": "nvme"}), {}, "needs .*nvme_path"),
        (zero(3, stage3_prefetch_bucket_size=9, offload_param={"device": "nvme", "nvme_path": "/disk"}), {},
         "stage3_prefetch_bucket_size must be 0"),
        (read_ds_config("zero3_nvme.json"), {}, "pass --nvme_path, a folder on a local disk"),
        (zero(3, offload_optimizer={"device": "nvme", "nvme_path": "/disk"}), {},
         "offload_optimizer.device nvme is not supported"),
        (zero(2, zero_hpz_partition_size=2), {}, "needs stage 3, not 2"),
        (zero(3, zero_hpz_partition_size=3), {}, "does not divide the 8 ranks"),
        (zero(3, zero_hpz_partition_size=2, offload_param={"device": "cpu"}), {}, "drop offload_param"),
        (zero(3, offload_optimizer={"device": "cpu"}) | {"zero_force_ds_cpu_optimizer": True}, {},
         "zero_force_ds_cpu_optimizer is true, but the optimizer is torch's AdamW"),
        (zero(3, offload_param={"device": "cpu", "buffer_size": AUTO}), {},
         'zero_optimization.offload_param.buffer_size is "auto", but the run does not decide it'),
        ({"aio": {"queue_depth": AUTO}}, {}, 'aio.queue_depth is "auto"'),
        ({"comms_logger": {"prof_ops": [AUTO]}}, {}, 'comms_logger.prof_ops.0 is "auto"'),
        ({"data_types": {"param_dtype": "fp32"}}, {}, 'param_dtype is "fp32", but this run is in bf16'),
        ({"data_types": {"keep_in_fp32_modules": ["("]}}, {}, "not a list of name patterns"),
        ({"timers": {"throughput": {"enabled": 1}}}, {}, "timers.throughput.enabled is 1, not true or false"),
        ({"flops_profiler": {"top_modules": 0}}, {},
         "flops_profiler.top_modules is 0, not a whole number of 1 or more"),
        ({"log_level": "verbose"}, {}, 'log_level is "verbose", not one of debug, info'),
        ({"data_types": {"grad_accum_dtype": "fp32"}}, {},
         "stage 0 in bf16 allows bf16; stage 1 or more can add in fp32"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, {"bf16": False}, "stage 0 in fp32 allows fp32"),
        ({"communication_data_type": "int8"}, {}, "not fp32, bf16 or fp16"),
    ],
)  # fmt: skip
def test_refusals_name_the_key_and_the_remedy(raw: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        resolve(raw, **changes)
    assert str(caught.value).startswith("mine.json: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["micro_batch_size", "grad_accum_steps", "world_size"])
@pytest.mark.parametrize("value", [0, -1, 2.0])
def test_batch_numbers_are_computed_positive_integers(name: str, value: Any) -> None:
    with pytest.raises(AssertionError):
        resolve(ZERO2, **{name: value})


# The tables and the installed DeepSpeed -------------------------------------------------------------------------------


class Recorder(dict[str, Any]):
    """A configuration that remembers which top-level keys DeepSpeed asked for."""

    def __init__(self, *content: Any, **entries: Any) -> None:
        super().__init__(*content, **entries)
        self.asked: set[Any] = set()

    def __copy__(self) -> "Recorder":  # DeepSpeed parses a copy
        twin = Recorder(self)
        twin.asked = self.asked
        return twin

    def get(self, key: Any, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: Any) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: Any) -> bool:
        self.asked.add(key)
        return super().__contains__(key)

    def keys(self) -> Any:  # DeepSpeed also asks `name in config.keys()`
        return self


def test_top_level_keys_are_those_deepspeed_asks_for() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    recorder = Recorder(train_batch_size=1)
    DeepSpeedConfig(recorder)
    # Asked for by deepspeed.initialize and, once a process group exists, by DeepSpeedConfig.
    outside = {"data_parallel_size", "sequence_parallel_size"}
    assert recorder.asked | outside == set(keys.TOP_LEVEL)
    assert len(keys.TOP_LEVEL) == len(keys.PASSED_ON) + len(keys.RESOLVED) + len(keys.UNSUPPORTED)


def test_section_keys_are_deepspeeds_fields() -> None:
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    def names(model: Any) -> set[str]:
        return {name for key, field in model.model_fields.items() for name in (key, field.alias or key)}

    assert set(keys.ZERO) == names(DeepSpeedZeroConfig)
    assert set(keys.OFFLOAD_OPTIMIZER) == names(DeepSpeedZeroOffloadOptimizerConfig)
    assert set(keys.OFFLOAD_PARAM) == names(DeepSpeedZeroOffloadParamConfig)
    assert set(keys.BF16) == names(DeepSpeedBF16Config)
    for key, field in DeepSpeedZeroConfig.model_fields.items():
        kinds = {bool: (keys.BOOL,), int: (keys.INT, keys.BUCKET)}
        types = [kind for kind in (*typing.get_args(field.annotation), field.annotation) if kind in kinds]
        expected = kinds[types[0]] if types else (keys.INT,) if key == "stage" else (keys.SECTION,)
        assert keys.ZERO[key] in expected, key


def test_sections_that_are_passed_on_have_deepspeeds_keys() -> None:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import DeepSpeedMonitorConfig
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    theirs = {name: field.annotation.model_fields for name, field in DeepSpeedMonitorConfig.model_fields.items()}
    theirs |= {"comms_logger": CommsLoggerConfig.model_fields, "aio": AIO_DEFAULT_DICT}
    theirs |= {"flops_profiler": vars(DeepSpeedFlopsProfilerConfig({}))}
    sections = {name: table for name, table in keys.PASSED_ON.items() if not isinstance(table, Kind)}
    throughput = sections.pop("timers")["throughput"]
    assert {name: set(table) for name, table in sections.items()} == {
        name: set(table) for name, table in theirs.items()
    }
    assert isinstance(throughput, dict)
    assert set(throughput) == set(DeepSpeedThroughputTimerConfig.model_fields)


def test_data_types_are_those_deepspeed_asks_for() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    types = Recorder()
    DeepSpeedConfig({"train_batch_size": 1, "data_types": types})
    assert types.asked == set(keys.DATA_TYPES)


def test_automatic_zero_keys_exist() -> None:
    assert keys.ZERO_AUTO.keys() | keys.ZERO_FIXED.keys() <= keys.ZERO.keys()


def test_secondary_shards_span_one_node_of_several() -> None:
    raw = read_ds_config("zero3_hpz.json")
    assert resolve(raw)["zero_optimization"]["zero_hpz_partition_size"] == 1
    assert resolve(raw, ranks_per_node=4)["zero_optimization"]["zero_hpz_partition_size"] == 4


def test_the_run_says_where_the_disk_is() -> None:
    offloaded = resolve(read_ds_config("zero3_nvme.json"), nvme_path="/disk")["zero_optimization"]["offload_param"]
    assert (offloaded["device"], offloaded["nvme_path"]) == ("nvme", "/disk")


def test_secrets_are_not_shown() -> None:
    raw = {"comet": {"enabled": False, "api_key": "abc", "project": "p"}, "wandb": [{"TOKEN": "def", "tokens": 3}]}
    shown = {"enabled": False, "api_key": "(not recorded)", "project": "p"}
    assert without_secrets(raw) == {"comet": shown, "wandb": [{"TOKEN": "(not recorded)", "tokens": 3}]}


# Any JSON -------------------------------------------------------------------------------------------------------------

KEYS = sorted(
    {"device", "nvme_path", "type", "params", "lr", "enabled", "grad_accum_dtype", *keys.TOP_LEVEL, *keys.ZERO}
)
VALUES = st.recursive(
    st.sampled_from([AUTO, None, True, False, 0, 1, 3, 2.0, -1, 1e400, 10**400, "", "cpu", "nvme", "fp32", "AdamW"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=5,
)
SECTIONS = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4)
DOCUMENTS = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(keys.TOP_LEVEL, SECTIONS | VALUES) | {"zero_optimization": SECTIONS}
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(DOCUMENTS, st.booleans(), st.sampled_from((1, 8)))
def test_any_document_resolves_whole_or_is_refused(raw: dict[str, Any], bf16: bool, world_size: int) -> None:
    before = copy.deepcopy(raw)
    try:
        resolved = resolve(raw, bf16=bf16, world_size=world_size, nvme_path="/disk")
    except UserError:
        return
    finally:
        assert raw == before
    assert resolved["train_batch_size"] == 4 * 2 * world_size
    assert resolved["bf16"]["enabled"] is bf16
    assert resolved["zero_optimization"]["stage"] in (0, 1, 2, 3)
    assert f'"{AUTO}"' not in json.dumps(resolved)
    assert resolve(resolved, bf16=bf16, world_size=world_size, nvme_path="/disk") == resolved  # nothing left to decide


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=SECTIONS, indent=st.sampled_from((None, 1)))
def test_any_document_is_read_as_it_was_written(tmp_path: Path, raw: dict[str, Any], indent: int | None) -> None:
    text = json.dumps(raw, indent=indent)
    (tmp_path / "any.json").write_text(text)
    if "Infinity" in text:
        with pytest.raises(UserError, match="Infinity, which is not JSON"):
            read_ds_config(str(tmp_path / "any.json"))
    else:
        assert read_ds_config(str(tmp_path / "any.json")) == raw
