"""Load a model at ZeRO-3 in shards and through transformers, side by side: time from config to ready, peak memory.

python benchmarks/load.py --sizes 1.1b,3b

Two ranks on this machine; random weights of known shapes in safetensors files, read once before so that they lie in the
page cache. With --load_in_4bit both quantize to NF4; transformers then holds the whole model on every rank. Each load
is a launch of its own, the two ways in turn. A load that fails, or would exhaust the machine's memory and is stopped,
is reported; the exit code is 1 if it was a sharded one.
"of file speed" compares the loader's reads with reading the same files from end to end into memory that is kept, in the
same process; ``read_share_of_one_buffer`` in the JSON with ``dd``'s way, one small buffer over and over. The last line
is one JSON object, of the last size.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import ranks
import shapes

WORKER = Path(__file__).with_name("load_worker.py")
WAYS = ("sharded", "transformers")


def measure(size: str, folder: Path, rounds: int, flags: list[str]) -> dict[str, Any]:
    model = shapes.write_model(folder, size)
    shapes.read_once(model)
    found: dict[str, list[list[dict[str, float]]]] = {how: [] for how in WAYS}
    lacking: dict[str, str] = {}  # why a way has no numbers
    for _ in range(rounds):
        for how in WAYS:
            if how not in lacking:
                measured, why = ranks.attempt(WORKER, ["--how", how, "--model", str(model), *flags])
                if why:
                    lacking[how] = why
                else:
                    found[how].append(measured)
    largest = shapes.largest_tensor(size) * 2 / 1e9
    row: dict[str, Any] = {"size": size, "parameters": shapes.num_parameters(size)}
    row |= {f"{how}_lacks": why for how, why in lacking.items()}
    for how in WAYS:
        if how not in lacking:
            row[f"{how}_s"] = statistics.median(max(rank["seconds"] for rank in launched) for launched in found[how])
            row[f"{how}_peak_gb"] = max(rank["peak_gb"] for launched in found[how] for rank in launched)
    if "sharded" not in lacking:
        sharded = [rank for launched in found["sharded"] for rank in launched]
        row["shard_gb"] = max(rank["shard_gb"] for rank in sharded)
        row["peak_over_shard_gb"] = max(rank["peak_gb"] - rank["shard_gb"] - largest for rank in sharded)
        row["read_share"] = statistics.median(rank["read_gb_per_s"] / rank["sequential_gb_per_s"] for rank in sharded)
        row["read_share_of_one_buffer"] = statistics.median(
            rank["read_gb_per_s"] / rank["one_buffer_gb_per_s"] for rank in sharded
        )
        row["read_gb_per_s"] = statistics.median(rank["read_gb_per_s"] for rank in sharded)
    if not lacking:
        row["speedup"] = row["transformers_s"] / row["sharded_s"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1.1b", help=f"of {', '.join(shapes.SHAPES)}")
    parser.add_argument("--rounds", type=int, default=3, help="loads of each kind")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "taso_bench_models")
    parser.add_argument("--load_in_4bit", action="store_true", help="quantize to NF4 on the way")
    arguments = parser.parse_args()
    flags = ["--load_in_4bit"] if arguments.load_in_4bit else []
    rows = [measure(size, arguments.folder, arguments.rounds, flags) for size in arguments.sizes.split(",")]
    columns = ("sharded", "transformers", "speedup", "peak/rank", "usual peak", "over shard + largest", "of file speed")
    print(f"{'shape':<8}" + "".join(f"{column:>22}" for column in columns))
    for row in rows:
        cells = [
            _cell(row, "sharded_s", "{:.2f} s"), _cell(row, "transformers_s", "{:.2f} s", of="transformers"),
            _cell(row, "speedup", "{:.1f}", of="transformers"), _cell(row, "sharded_peak_gb", "{:.2f} GB"),
            _cell(row, "transformers_peak_gb", "{:.2f} GB", of="transformers"),
            _cell(row, "peak_over_shard_gb", "{:+.2f} GB"), _cell(row, "read_share", "{:.0%}"),
        ]  # fmt: skip
        print(f"{row['size']:<8}" + "".join(f"{cell:>22}" for cell in cells))
    print(json.dumps(rows[-1]))
    if any("sharded_s" not in row for row in rows):
        raise SystemExit(1)


def _cell(row: dict[str, Any], key: str, form: str, *, of: str = "sharded") -> str:
    return form.format(row[key]) if key in row else row.get(f"{of}_lacks", "-")


if __name__ == "__main__":
    main()
