"""How a run grows with the model: load, score, train and export of Llama shapes at ZeRO-3, two ranks, bf16.

python benchmarks/scale.py --sizes 0.1b,0.4b,1.1b,3b,7b

Random weights of known shapes, written once. Every size runs to the end: sharded load, importance of all matrices on
one micro-batch per rank, TASO steps, and the exported adapter opened with peft in a fresh process. Beside it the same
checkpoint is loaded the usual way, through transformers. A launch that would exhaust the machine's memory is stopped
and said not to fit; one that fails is said to have failed. Memory is resident, of the worst rank, above what it held
with everything imported. The last line is one JSON object; the exit code is 1 if a size did not complete, the usual
load apart.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ranks
import shapes

HERE = Path(__file__).parent
# Of DeepSpeed's default of 1e9 gathered parameters per rank a machine that is full of shards has no room.
_LIVE_PARAMETERS = 300_000_000
_PHASES = ("load", "score", "train", "export")


def run_size(size: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return one row of the table; what did not complete is missing from it."""
    model = shapes.write_model(arguments.folder, size)
    row: dict[str, Any] = {"size": size, "parameters": shapes.num_parameters(size)}
    if arguments.usual:
        usual, why = ranks.attempt(HERE / "load_worker.py", ["--how", "transformers", "--model", str(model)])
        if why:
            row["usual_load_lacks"] = why
        else:
            row["usual_load_s"] = max(rank["seconds"] for rank in usual)
            row["usual_load_peak_gb"] = max(rank["peak_gb"] for rank in usual)
    with tempfile.TemporaryDirectory(prefix="taso_scale_") as name:
        flags = run_flags(model, Path(name), arguments)
        environment = {"MALLOC_MMAP_THRESHOLD_": "65536"}
        found, why = ranks.attempt(HERE / "plan_worker.py", flags, environment=environment)
    if why:
        row["lacks"] = why
    else:
        for phase in _PHASES:
            row |= {f"{phase}_s": found[phase]["seconds"], f"{phase}_peak_gb": found[phase]["peak_gb"]}
        row["first_step_s"] = found["first step"]["seconds"]
        row["resident_gb"] = found["load"]["after_gb"]
    return row


def run_flags(model: Path, folder: Path, arguments: argparse.Namespace) -> list[str]:
    rows, held_out, config = folder / "rows.jsonl", folder / "eval.jsonl", folder / "zero3.json"
    for file in (rows, held_out):
        shapes.write_rows(file, arguments.length)
    config.write_text(json.dumps(zero3()))
    return [
        "--model_name_or_path", str(model), "--task", "completion", "--train_file", str(rows),
        "--eval_file", str(held_out),
        "--max_seq_length", str(arguments.length), "--ds_config", str(config), "--max_steps", str(arguments.steps),
        "--per_device_train_batch_size", "1", "--calibration_samples", str(ranks.RANKS),
        "--calibration_batch_size", "1",
    ]  # fmt: skip


def zero3() -> dict[str, Any]:
    """Return the shipped ``zero3.json`` with room for fewer gathered parameters."""
    from taso_ds.distributed.ds_config import read_ds_config

    config = read_ds_config("zero3.json")
    limits = dict.fromkeys(("stage3_max_live_parameters", "stage3_max_reuse_distance"), _LIVE_PARAMETERS)
    return config | {"zero_optimization": config["zero_optimization"] | limits}


def exponent(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    """Fit ``value ∝ parameters^e`` over the rows that have the value; None for fewer than two."""
    points = [(row["parameters"], row[key]) for row in rows if key in row]
    if len(points) < 2:
        return None
    logarithms = np.log(np.array(points, dtype=float))
    return float(np.polyfit(logarithms[:, 0], logarithms[:, 1], 1)[0])


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw times and peaks against parameters, both logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    times, memory = figure.subplots(1, 2)
    for axes, unit, label in ((times, "s", "seconds"), (memory, "peak_gb", "GB per rank above start")):
        for phase in (*_PHASES, "usual_load"):
            points = [(row["parameters"], row[f"{phase}_{unit}"]) for row in rows if f"{phase}_{unit}" in row]
            if points:
                style = "--" if phase == "usual_load" else "-"
                axes.loglog(*zip(*points, strict=True), style, marker="o", label=phase.replace("_", " "))
        axes.set_xlabel("parameters")
        axes.set_ylabel(label)
        axes.grid(visible=True, which="both", alpha=0.3)
    shards = [(row["parameters"], 2 * row["parameters"] / ranks.RANKS / 1e9) for row in rows]
    memory.loglog(*zip(*shards, strict=True), ":", color="gray", label="shard")
    sizes = [row["parameters"] for row in rows]
    for axes in (times, memory):  # last: every logarithmic line sets ticks of its own
        axes.set_xticks(sizes, [f"{size / 1e9:.2g}B" for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
    times.legend(fontsize=8)
    memory.legend(fontsize=8)
    figure.savefig(path, format="png", dpi=110)


def _cell(row: dict[str, Any], key: str, form: str) -> str:
    why = row.get("usual_load_lacks" if key.startswith("usual") else "lacks", "-")
    return form.format(row[key]) if key in row else why


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="0.1b,0.4b,1.1b", help=f"of {', '.join(shapes.SHAPES)}")
    parser.add_argument("--length", type=int, default=64, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=3, help="TASO steps; the last one is timed")
    parser.add_argument("--no_usual", dest="usual", action="store_false", help="do not load through transformers too")
    parser.add_argument("--plot", type=Path, default=Path("runs/scale.png"))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "taso_bench_models")
    arguments = parser.parse_args()
    headings = ("load", "usual load", "score", "step", "export + proof", "load", "usual load", "score", "train")
    print(f"{'shape':<7}" + "".join(f"{heading:>16}" for heading in headings))
    rows = []
    for size in arguments.sizes.split(","):
        row = run_size(size, arguments)
        rows.append(row)
        cells = [
            _cell(row, "load_s", "{:.1f} s"), _cell(row, "usual_load_s", "{:.1f} s"),
            _cell(row, "score_s", "{:.1f} s"), _cell(row, "train_s", "{:.1f} s"), _cell(row, "export_s", "{:.1f} s"),
            _cell(row, "load_peak_gb", "{:.2f} GB"), _cell(row, "usual_load_peak_gb", "{:.2f} GB"),
            _cell(row, "score_peak_gb", "{:.2f} GB"), _cell(row, "train_peak_gb", "{:.2f} GB"),
        ]  # fmt: skip
        print(f"{size:<7}" + "".join(f"{cell:>16}" for cell in cells), flush=True)
    growth = {key: exponent(rows, key) for phase in _PHASES for key in (f"{phase}_s", f"{phase}_peak_gb")}
    print("growth with parameters^e: " + ", ".join(f"{k} {e:.2f}" for k, e in growth.items() if e is not None))
    arguments.plot.parent.mkdir(parents=True, exist_ok=True)
    draw(rows, arguments.plot)
    incomplete = [row["size"] for row in rows if "export_s" not in row]
    print(json.dumps({"rows": rows, "growth": growth, "plot": str(arguments.plot), "incomplete": incomplete}))
    if incomplete:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
