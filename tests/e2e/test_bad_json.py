"""Mistakes in the DeepSpeed JSON."""

import importlib.util
from pathlib import Path

import pytest
from launching import call_main
from mistakes import GOOD, Mistake, Mistakes, assert_one_line, assert_refused, unchanged

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

MISTAKES = Mistakes()
add = MISTAKES.add


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
    "unknown zero key", '{"zero_optimization": {"stage": 3, "stage3_param_persistence_treshold": 0}}',
    "zero_optimization.stage3_param_persistence_treshold", "nearest: 'stage3_param_persistence_threshold'",
)  # fmt: skip
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
    "empty bucket", '{"zero_optimization": {"stage": 2, "reduce_bucket_size": 0}}', "reduce_bucket_size is 0",
    "from 1 to",
)  # fmt: skip
add_json("misspelt monitor", '{"wandb": {"projekt": "a"}}', "'wandb.projekt'", "nearest: 'project'")
add_json("monitor as text", '{"tensorboard": {"enabled": "yes"}}', 'tensorboard.enabled is "yes"', "true or false")
add_json(
    "monitor nowhere", '{"csv_monitor": {"enabled": true, "output_path": "train.jsonl/x"}}', "csv_monitor.output_path",
    "train.jsonl is not a writable folder",
)  # fmt: skip
add_json("checkpoint", '{"checkpoint": {"writer": {"type": "fast"}}}', "checkpoint is not supported", "remove it")
add_json(
    "part of the optimizer",
    '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}',
    "offload_optimizer.ratio", "torch's AdamW",
)  # fmt: skip
add_json(
    "DeepSpeed's own", '{"aio": {"use_gds": true}}', "DeepSpeed refuses it", "GDS currently only supported for CUDA"
)
add_json(
    "GPUs only", '{"zero_optimization": {"stage": 3, "zero_quantized_weights": true}}', "zero_quantized_weights", "GPU"
)
for library in ("wandb", "comet_ml"):
    section = library.removesuffix("_ml")
    if importlib.util.find_spec(library) is None:
        add_json(f"{section} without its library", f'{{"{section}": {{"enabled": true}}}}', library, "pip install")
add_json("fp32 against --bf16", '{"bf16": {"enabled": false}}', "bf16.enabled", "--bf16", flags="--bf16")
add_json(
    "alters bits", '{"zero_optimization": {"stage": 3, "zero_quantized_weights": true}}',
    "zero_optimization.zero_quantized_weights", "bits of quantized weights", flags="--load_in_4bit",
)  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=list(MISTAKES))
def test_one_line_and_nothing_written(mistake: Mistake, desk: Path, request: pytest.FixtureRequest) -> None:
    assert_refused(mistake, desk, request)


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
    flags = f"{GOOD} --ds_config zero3_nvme.json {flag}".format(llama=llama_folder)
    with unchanged(desk):
        assert_one_line(call_main("train", flags.split()), *words)
