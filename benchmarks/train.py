"""One table, measured side by side in one run: step time and memory of TASO and LoRA, scoring against backward.

python benchmarks/train.py

Two ranks at ZeRO-3 on the embedded SmolLM2-135M. For times, the engines of all methods are alive at once and take their
steps in turn, so that a machine that speeds up or slows down does so for all of them; ratios are of medians. Peak
memory is the resident set of a launch of its own per method. The last line is one JSON object.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import ranks

WORKER = Path(__file__).with_name("worker.py")
METHODS = {
    "TASO union": ["--method", "taso", "--structure", "union"],
    "TASO intersection": ["--method", "taso", "--structure", "intersection"],
    "LoRA r=1": ["--method", "lora", "--rank", "1"],
    "LoRA r=32": ["--method", "lora", "--rank", "32"],
}
# The C library keeps freed blocks of megabytes for later, gigabytes of them: here it gives them back to be measured.
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}


def job(name: str, arguments: list[str], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Run one job of the worker and return what rank 0 wrote."""
    found: dict[str, Any] | None = ranks.launch(WORKER, ["--job", name, *arguments], environment=environment)
    if found is None:
        raise SystemExit(f"{name}: stopped before it exhausted this machine's memory")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each method, after two untimed ones")
    parser.add_argument("--rounds", type=int, default=1, help="timed rounds of scoring and of plain backward")
    arguments = parser.parse_args()
    methods = json.dumps(METHODS)
    times = job("steps", ["--methods", methods, "--steps", str(arguments.steps)])
    scoring = job("scoring", ["--rounds", str(arguments.rounds)])
    extra = job("scoring_memory", ["--rounds", str(arguments.rounds)], _GIVE_BACK)
    memory = {
        name: job("memory", ["--methods", json.dumps({name: flags})])["peak_gb"] for name, flags in METHODS.items()
    }
    reference = times["LoRA r=1"]["median_s"]
    print(
        f"{'method':<20}{'trainable':>12}{'step (median)':>16}{'vs LoRA r=1':>13}{'tokens/s':>11}{'peak GB/rank':>14}"
    )
    for name, row in times.items():
        print(
            f"{name:<20}{row['trainable']:>12,}{row['median_s']:>14.2f} s{row['median_s'] / reference:>13.3f}"
            f"{row['tokens'] / row['median_s']:>11.0f}{memory[name]:>14.2f}"
        )
    ratio = scoring["scoring_s"] / scoring["backward_s"]
    print(
        f"\nscoring {scoring['tokens']:,} tokens: {scoring['scoring_s']:.1f} s ({scoring['select_s']:.1f} s of it after"
        f" the last backward); plain forward + backward with all weight gradients: {scoring['backward_s']:.1f} s;"
        f" ratio {ratio:.3f}"
    )
    print(
        f"scoring memory above plain backward: {extra['extra_gb']:.3f} GB/rank;"
        f" accumulators/ranks + two matrices: {extra['allowed_gb']:.3f} GB"
    )
    print(
        json.dumps(
            {
                "step_time_vs_lora_r1": times["TASO union"]["median_s"] / reference,
                "intersection_step_time_vs_lora_r1": times["TASO intersection"]["median_s"] / reference,
                "scoring_time_vs_backward": ratio,
                "scoring_extra_gb": extra["extra_gb"],
                "scoring_allowed_gb": extra["allowed_gb"],
                "peak_gb": memory,
            }
        )
    )


if __name__ == "__main__":
    main()
