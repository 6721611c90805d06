"""Kills ranks of real runs at random points, starts them again, and compares the adapter with an uninterrupted run's.

python benchmarks/faults.py --n 100

Two ranks, ZeRO-3, a tiny random model; scoring in two passes, a checkpoint after every second step. A fault strikes
one rank with SIGKILL or SIGTERM, or all with SIGTERM, before or after a call drawn at random in a phase drawn at
random. The last line is one JSON object; the exit code is 1 unless every run recovered bit-identically and none hung.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import shapes
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))  # the ranks that fork

from faulty import POINTS
from forked import ForkServer

ADAPTER = ("adapter/adapter_model.safetensors", "adapter/taso_adapter.safetensors", "core_regions.safetensors")
RESTARTS = 3
# kind of fault: signal, whether it strikes all ranks
KINDS = {
    "SIGKILL one": (signal.SIGKILL, False),
    "SIGTERM one": (signal.SIGTERM, False),
    "SIGTERM all": (signal.SIGTERM, True),
}


def flags(desk: Path, run: Path) -> list[str]:
    return [
        *("--model_name_or_path", str(desk / "llama-tiny"), "--task", "completion", "--output_dir", str(run)),
        *("--train_file", str(desk / "rows.jsonl"), "--eval_file", str(desk / "eval.jsonl"), "--max_seq_length", "32"),
        *("--ds_config", "zero3.json", "--global_batch_size", "4", "--per_device_train_batch_size", "1"),
        *("--calibration_samples", "8", "--calibration_passes", "2", "--learning_rate", "1e-2", "--max_steps", "6"),
        *("--save_steps", "2", "--no_verify_export"),
    ]


def content(run: Path) -> dict[str, Any]:
    """Return what has to be the same: the files of the adapter, and the losses."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]
    return {"losses": losses} | {name: (run / name).read_bytes() for name in ADAPTER}


def draw(random_numbers: random.Random, calls: list[dict[str, int]]) -> tuple[str, str, dict[str, Any]]:
    """Return phase, kind and fault."""
    phase, kind = random_numbers.choice(list(POINTS)), random_numbers.choice(list(KINDS))
    point = random_numbers.choice([place for place in POINTS[phase] if place in calls[0]])
    rank = random_numbers.choice([number for number, counted in enumerate(calls) if point in counted])
    number, everywhere = KINDS[kind]
    fault = {
        "rank": rank,
        "point": point,
        "call": random_numbers.randint(1, calls[rank][point]),
        "when": random_numbers.choice(("before", "after")),
        "signal": int(number),
        "all": everywhere,
    }
    return phase, kind, fault


def recover(server: ForkServer, desk: Path, run: Path, fault: dict[str, Any]) -> dict[str, Any]:
    """Run with a fault, then without until it has finished; returns codes, and seconds from the fault to the end."""
    log = run.with_suffix(".log")
    answer = server.run(flags(desk, run), log, faults=[fault])
    struck = float((log / "struck").read_text())
    found: dict[str, Any] = {"codes": [answer["codes"]], "hung": answer["hung"], "seconds": answer["ended"] - struck}
    for _ in range(RESTARTS):
        if (run / "results.json").is_file() and set(answer["codes"]) == {0}:
            break
        answer = server.run(flags(desk, run), log)
        found["codes"].append(answer["codes"])
        found["hung"] |= answer["hung"]
    return found


def inject(server: ForkServer, desk: Path, number: int, seed: int) -> dict[str, Any]:
    server.run(flags(desk, desk / "whole"), desk / "whole.log", count=sum(POINTS.values(), ()))
    calls = [json.loads((desk / "whole.log" / f"calls{rank}.json").read_text()) for rank in range(2)]
    expected, random_numbers = content(desk / "whole"), random.Random(seed)
    injected, identical, hung, slowest = Counter[str](), Counter[str](), 0, 0.0
    for index in tqdm(range(number), desc="faults", unit="fault"):
        phase, kind, fault = draw(random_numbers, calls)
        run = desk / f"run{index}"
        found = recover(server, desk, run, fault)
        injected[phase] += 1
        hung += found["hung"]
        slowest = max(slowest, found["seconds"])
        if (run / "results.json").is_file() and content(run) == expected:
            identical[phase] += 1
            shutil.rmtree(run)
        else:
            tqdm.write(f"NOT RECOVERED: {kind} {fault}, exit codes {found['codes']}, see {run}")
    print(f"\n{'phase':<20}{'injected':>10}{'identical':>12}")
    for phase in POINTS:
        print(f"{phase:<20}{injected[phase]:>10}{identical[phase]:>12}")
    print(f"slowest end of all ranks after a fault: {slowest:.1f} s")
    return {
        "injected": injected.total(),
        "recovered_identical": identical.total(),
        "hung": hung,
        "slowest_end_s": round(slowest, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100, help="faults")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    desk = Path(tempfile.mkdtemp(prefix="taso_faults_"))
    shapes.write_model(desk, "tiny")
    rows = [json.dumps({"prompt": f"row {number}:", "completion": f" {number % 7}"}) for number in range(24)]
    for name in ("rows", "eval"):
        (desk / f"{name}.jsonl").write_text("\n".join(rows))
    with ForkServer() as server:
        found = inject(server, desk, arguments.n, arguments.seed)
    good = found["recovered_identical"] == found["injected"] and not found["hung"]
    if good:
        shutil.rmtree(desk)
    print(json.dumps(found))
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
