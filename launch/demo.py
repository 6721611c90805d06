"""Demo: fine-tune the embedded SmolLM2-135M on real sentiment data with TASO, then with LoRA rank 1, and compare.

python launch/demo.py

Two ranks on this machine under ZeRO-3, the same steps, rows and base learning rate for both. SST-2's validation split
is cut into training and held-out rows, so the scores are not comparable with published ones.
"""

import json
import subprocess
import sys
from pathlib import Path

from taso_ds.entry import run_script
from taso_ds.errors import UserError
from taso_ds.interrupts import Interrupts

_TRAIN = Path(__file__).with_name("train.py")
_LAUNCH = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--num_gpus", "2", str(_TRAIN)]
_FLAGS = ["--ds_config", "zero3.json", "--overwrite_output_dir"]
_RUNS = {
    "TASO union": ("runs/demo", []),
    "LoRA r=1": ("runs/demo-lora-r1", ["--method", "lora", "--rank", "1"]),
}


def _demo(_: Interrupts) -> str:
    for title, (folder, flags) in _RUNS.items():
        command = [*_LAUNCH, *_FLAGS, *flags, "--output_dir", folder]
        print(f"\n=== {title}: deepspeed --quiet --num_gpus 2 launch/train.py {' '.join(command[7:])}\n", flush=True)
        if subprocess.run(command, check=False).returncode:
            raise UserError(f"demo: {title} failed; its message stands above")
    runs = {title: Path(folder) for title, (folder, _) in _RUNS.items()}
    print(_table(runs), flush=True)
    taso = runs["TASO union"]
    print("\nfiles:")
    for path in sorted(taso.rglob("*")):
        if path.is_file():
            print(f"  {path}  {path.stat().st_size:,} bytes")
    print(f"\nsee where the core regions lie: {taso / 'core_regions.png'}")
    return f"RUN {taso}"


def _table(runs: dict[str, Path]) -> str:
    results = {title: json.loads((path / "results.json").read_text()) for title, path in runs.items()}
    records = {title: json.loads((path / "run.json").read_text()) for title, path in runs.items()}
    any_record = next(iter(records.values()))
    rows: dict[str, list[str]] = {"": list(runs)}
    rows["trainable parameters"] = [f"{result['trainable_parameters']:,}" for result in results.values()]
    rows["peak learning rate"] = [f"{record['learning_rates'][0]['peak']:.2e}" for record in records.values()]
    for name in ("loss", next(iter(results.values()))["headline"]):
        for when in ("before", "after"):
            rows[f"{name} {when}"] = [f"{result[when][name]:.4f}" for result in results.values()]
    width = max(map(len, rows))
    lines = ["", f"held-out: {any_record['data']['evaluation']}", f"steps: {any_record['steps']}", ""]
    lines += [f"{name:<{width}}  " + "  ".join(f"{value:>12}" for value in values) for name, values in rows.items()]
    return "\n".join(lines)


def main() -> None:
    run_script(_demo)


if __name__ == "__main__":
    main()
