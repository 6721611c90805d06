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
from pathlib import Path
from typing import Any

import ranks
import shapes
from published import compare_published, in_words

from taso_ds.config import RunConfig, parse_run_config
from taso_ds.models.spec import BaseSpec
from taso_ds.planning.count_model import count_model
from taso_ds.planning.numbers.devices import get_device
from taso_ds.planning.numbers.memory import Usage, phase_usage
from taso_ds.planning.numbers.strategy import Strategy, Workload

WORKER = Path(__file__).with_name("plan_worker.py")
# Of each rank. During the second one DeepSpeed still gathers less than planned; from the third on, as planned.
SCORING_BATCHES = 4


def run_flags(model: Path, rows: Path, stage: int, arguments: argparse.Namespace) -> list[str]:
    flags = [
        "--model_name_or_path", str(model), "--task", "completion", "--train_file", str(rows), "--eval_file",
        str(rows.with_name("eval.jsonl")),
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
    base = BaseSpec(config.model, str(config.model.model_name_or_path), base_config, head=False)
    shape = count_model(config, base, base.targets(config.adapter.target_modules, experts=config.adapter.adapt_experts))
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
        for file in (rows, rows.with_name("eval.jsonl")):
            shapes.write_rows(file, arguments.length)
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
        for entry in published:
            memory = in_words(entry.memory_gb, entry.entry.memory_gb)
            speed = in_words(entry.tokens_per_s, entry.entry.tokens_per_s)
            print(f"{entry.name:<75}{memory:>24}{speed:>30}")
        print(json.dumps([entry.as_json() for entry in published]))
        return
    measured = []
    print(f"{'shape':<7}{'stage':>6}" + "".join(f"{name:>20}" for name in ("load", "score", "train")) + f"{'peak':>10}")
    for size in arguments.sizes.split(","):
        for stage in map(int, arguments.stages.split(",")):
            row = compare(size, stage, arguments)
            cells = "".join(
                f"{row[f'{phase}_predicted_gb']:>12.3f} / {row[f'{phase}_measured_gb']:.3f}"
                for phase in ("load", "score", "train")
            )
            print(f"{size:<7}{stage:>6}{cells}{row['deviation']:>+10.1%}", flush=True)
            measured.append(row)
    print(json.dumps(measured))
    if any(abs(row["deviation"]) > arguments.tolerance for row in measured):
        raise SystemExit(f"a prediction is off by more than {arguments.tolerance:.0%}")


if __name__ == "__main__":
    main()
