"""Predicted against measured peak memory of real runs on this machine, and against published figures.

python benchmarks/plan_check.py --sizes 0.1b,0.4b,1.1b --stages 2,3
python benchmarks/plan_check.py --published

Two CPU ranks; random weights of known shapes. Measured is the resident set of the worst rank above what it held once
everything was imported. The C library would keep freed blocks below 32 MB on its heaps and count as resident what no
tensor uses; MALLOC_MMAP_THRESHOLD_ makes it give them back, as an accelerator's peak counter does (``--keep_heap``
shows what it keeps). The last line is one JSON object.
"""

import argparse
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ranks
import shapes

from taso_ds.config import RunConfig, parse_run_config
from taso_ds.planning.devices import get_device, get_network
from taso_ds.planning.memory import Usage, phase_usage
from taso_ds.planning.model_shape import ModelShape
from taso_ds.planning.speed import step_seconds
from taso_ds.planning.strategy import Strategy, Workload
from taso_ds.training import prepare
from taso_ds.training.base_model import meta_model
from taso_ds.training.count_model import count_model

WORKER = Path(__file__).with_name("plan_worker.py")
# Of each rank. During the second one DeepSpeed still gathers less than planned; from the third on, as planned.
SCORING_BATCHES = 4


def run_flags(model: Path, rows: Path, stage: int, arguments: argparse.Namespace) -> list[str]:
    flags = [
        "--model_name_or_path", str(model), "--task", "completion", "--train_file", str(rows), "--eval_file", str(rows),
        "--max_seq_length", str(arguments.length), "--ds_config", f"zero{stage}.json",
        "--per_device_train_batch_size", str(arguments.rows), "--max_steps", str(arguments.steps),
        "--calibration_samples", str(SCORING_BATCHES * ranks.RANKS * arguments.rows), "--no_verify_export",
    ]  # fmt: skip
    flags += ["--gradient_checkpointing"] * arguments.gradient_checkpointing
    return flags + ["--load_in_4bit"] * arguments.load_in_4bit


def measure(flags: list[str], *, keep_heap: bool) -> dict[str, dict[str, float]]:
    """Launch a run and return peak and time of each phase."""
    environment = {"OMP_NUM_THREADS": "1"} | ({} if keep_heap else {"MALLOC_MMAP_THRESHOLD_": "65536"})
    found: dict[str, dict[str, float]] | None = ranks.launch(WORKER, flags, environment=environment)
    if found is None:
        raise SystemExit("stopped before it exhausted this machine's memory")
    return found


def predict(config: RunConfig, base_config: Any, stage: int) -> dict[str, Usage]:
    """Return the plan of one rank for the same run."""
    model = meta_model(config.model, base_config, head=False)
    shape = count_model(config, model, base_config, prepare.target_shapes(config, model))
    strategy = Strategy(
        stage,
        bits=4 if config.model.load_in_4bit else 16,
        gradient_checkpointing=config.training.gradient_checkpointing,
    )
    rows = config.training.per_device_train_batch_size
    work = Workload(
        gpus_per_node=ranks.RANKS,
        max_seq_length=config.data.max_seq_length,
        micro_batch_size=rows,
        calibration_samples=config.calibration.calibration_samples,
        calibration_batch_size=rows,
        supervised_share=0.5,
    )
    return phase_usage(shape, strategy, work, get_device("cpu"))


def compare(size: str, stage: int, arguments: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoConfig

    model = shapes.write_model(arguments.folder, size)
    with tempfile.TemporaryDirectory(prefix="taso_plan_") as name:
        rows = Path(name) / "rows.jsonl"
        shapes.write_rows(rows, arguments.length)
        flags = run_flags(model, rows, stage, arguments)
        plan = predict(parse_run_config(flags), AutoConfig.from_pretrained(model), stage)
        found = measure(flags, keep_heap=arguments.keep_heap)
    row: dict[str, Any] = {"size": size, "stage": stage}
    for phase in ("load", "score", "train"):
        row[f"{phase}_predicted_gb"] = plan[phase].device_bytes / 1e9
        row[f"{phase}_measured_gb"] = found[phase]["peak_gb"]
    for kind in ("predicted", "measured"):
        row[f"peak_{kind}_gb"] = max(row[f"{phase}_{kind}_gb"] for phase in ("load", "score", "train"))
    row["deviation"] = row["peak_predicted_gb"] / row["peak_measured_gb"] - 1.0
    return row


@dataclass(frozen=True)
class Published:
    """A published measurement: per-device memory in GB and tokens per second and device; None where not given."""

    what: str
    shape: dict[str, Any]
    strategy: Strategy
    work: Workload
    device: str
    memory_gb: float | None
    tokens_per_s: float | None
    source: str


def _llama(hidden: int, layers: int, feed_forward: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": feed_forward, "vocab_size": vocabulary,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }  # fmt: skip


_7B = _llama(4096, 32, 11008, 32, 32, 32_000)
_70B = _llama(8192, 80, 28672, 64, 8, 32_000)
_72B = _llama(8192, 80, 24576, 64, 64, 152_064)
_CHECKPOINTED = Strategy(3, gradient_checkpointing=True)


def _work(gpus: int, rows: int, length: int) -> Workload:
    return Workload(gpus_per_node=gpus, micro_batch_size=rows, max_seq_length=length, scores=False)


# Gradient checkpointing is each recipe's default. The NeMo row is FP8 without it; a plan knows no FP8.
PUBLISHED = (
    Published("Llama-2-7B LoRA", _7B, replace(_CHECKPOINTED, stage=0), _work(1, 4, 1024), "a100-80", 17.0, 2954.0,
              "LLaMA-Factory wiki"),
    Published("Llama-2-7B LoRA, FP8, packed 4096", _7B, Strategy(0), _work(8, 1, 4096), "h100", None, 24_824.0,
              "NeMo 24.12"),
    Published("Llama-2-70B LoRA ZeRO-3, bs 8", _70B, _CHECKPOINTED, _work(8, 8, 2048), "h100", 64.0, None, "PEFT docs"),
    Published("Llama-2-70B QLoRA ZeRO-3, bs 2", _70B, replace(_CHECKPOINTED, bits=4), _work(2, 2, 2048),
              "a100-40", 36.6, None, "PEFT docs"),
    Published("Qwen-72B LoRA ZeRO-3, 2048", _72B, _CHECKPOINTED, _work(4, 1, 2048), "a100-80", 229 / 4, 358.0,
              "Qwen README"),
    Published("Qwen2-72B LoRA ZeRO-3, 8000", _llama(8192, 80, 29568, 64, 8, 152_064), _CHECKPOINTED, _work(8, 1, 8000),
              "a100-80", None, 0.394 * 8000 / 8, "DeepSpeed#6507"),
)  # fmt: skip


def count_llama(values: dict[str, Any]) -> ModelShape:
    """Count a Llama of these sizes with adapters on all its linears."""
    from transformers import LlamaConfig

    config = parse_run_config(["--model_name_or_path", "llama", "--task", "completion"])
    base_config = LlamaConfig(**values, architectures=["LlamaForCausalLM"])
    model = meta_model(config.model, base_config, head=False)
    return count_model(config, model, base_config, prepare.target_shapes(config, model))


def published_peak_gb(shape: ModelShape, entry: Published) -> float:
    """Predict the peak of somebody else's trainer, whose loss holds the logits of all positions at once.

    Of each there are two bytes as computed, four in fp32 and four of their gradient.
    """
    phases = phase_usage(shape, entry.strategy, entry.work, get_device(entry.device))
    logits = 10.0 * shape.vocabulary * entry.work.micro_batch_size * entry.work.max_seq_length
    phases["train"] = replace(phases["train"], device={**phases["train"].device, "loss": logits})
    return max(usage.device_bytes for usage in phases.values()) / 1e9


def compare_published() -> list[dict[str, Any]]:
    rows = []
    for entry in PUBLISHED:
        shape, device = count_llama(entry.shape), get_device(entry.device)
        peak = published_peak_gb(shape, entry)
        step = step_seconds(shape, entry.strategy, entry.work, device, get_network("ib-400")).total
        speed = entry.work.micro_batch_size * entry.work.max_seq_length / step
        rows.append(
            {
                "what": f"{entry.what}, {entry.work.world_size}×{entry.device} ({entry.source})",
                "memory_gb": peak,
                "memory_published_gb": entry.memory_gb,
                "tokens_per_s": speed,
                "tokens_per_s_published": entry.tokens_per_s,
            }
        )
    return rows


def _deviation(predicted: float, published: float | None) -> str:
    return (
        f"{predicted:,.1f}"
        if published is None
        else f"{predicted:,.1f} / {published:,.1f} {predicted / published - 1:+.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="0.1b", help=f"of {', '.join(shapes.SHAPES)}")
    parser.add_argument("--stages", default="2,3")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=2, help="rows per rank and micro-batch")
    parser.add_argument(
        "--steps", type=int, default=2, help="training steps; gathering is as planned from the second on"
    )
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--load_in_4bit", action="store_true")
    parser.add_argument("--keep_heap", action="store_true", help="let the C library keep freed blocks")
    parser.add_argument("--published", action="store_true", help="compare with published figures; runs nothing")
    parser.add_argument("--tolerance", type=float, default=0.10, help="share that a prediction may be off by")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "taso_bench_models")
    arguments = parser.parse_args()
    if arguments.published:
        published = compare_published()
        print(f"{'predicted / published':<75}{'GB per device':>24}{'tokens/s per device':>30}")
        for row in published:
            print(
                f"{row['what']:<75}{_deviation(row['memory_gb'], row['memory_published_gb']):>24}"
                f"{_deviation(row['tokens_per_s'], row['tokens_per_s_published']):>30}"
            )
        print(json.dumps(published))
        return
    rows = []
    print(f"{'shape':<7}{'stage':>6}" + "".join(f"{name:>20}" for name in ("load", "score", "train")) + f"{'peak':>10}")
    for size in arguments.sizes.split(","):
        for stage in map(int, arguments.stages.split(",")):
            row = compare(size, stage, arguments)
            cells = "".join(
                f"{row[f'{phase}_predicted_gb']:>12.3f} / {row[f'{phase}_measured_gb']:.3f}"
                for phase in ("load", "score", "train")
            )
            print(f"{size:<7}{stage:>6}{cells}{row['deviation']:>+10.1%}", flush=True)
            rows.append(row)
    print(json.dumps(rows))
    if any(abs(row["deviation"]) > arguments.tolerance for row in rows):
        raise SystemExit(f"a prediction is off by more than {arguments.tolerance:.0%}")


if __name__ == "__main__":
    main()
