"""Evaluates bases on however many ranks the launcher started and writes what rank 0 saw as JSON.

torchrun evaluate_worker.py OUT.json FOLDER, where FOLDER holds <task>.jsonl and the models <task>/.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from taso_ds.config import parse_run_config
from taso_ds.distributed import comm, process_group
from taso_ds.objectives import classification, inference, language_model, metrics
from taso_ds.runs import finished
from taso_ds.runs.join import join

TASKS = {"arc_easy": "lm", "boolq": "lm", "gsm8k": "lm", "completion": "lm", "sst2": "classification"}  # and their head
STAGES = (0, 3)
BATCH_SIZE, MAX_NEW_TOKENS = 4, 6


def config_of(folder: Path, task: str, stage: int) -> Any:
    rows = str(folder / f"{task}.jsonl")
    flags = ["--model_name_or_path", str(folder / task), "--task", task, "--train_file", rows, "--eval_file", rows]
    flags += ["--no_bf16", "--max_seq_length", "128", "--max_new_tokens", str(MAX_NEW_TOKENS), "--head", TASKS[task]]
    flags += ["--per_device_eval_batch_size", str(BATCH_SIZE), "--ds_config", f"zero{stage}.json"]
    if task == "completion":
        flags += ["--eval_metric", "rouge"]
    return parse_run_config(flags)


@contextmanager
def watched() -> Iterator[dict[str, list[Any]]]:
    """Yield what an evaluation deals to this rank, batch by batch, and what it compares."""
    seen: dict[str, list[Any]] = {"dealt": [], "compared": []}
    deal, compute = inference.dealt_batches, metrics.compute_metrics

    def dealt(*args: Any, **options: Any) -> Any:
        batches = deal(*args, **options)
        seen["dealt"].append([ids for ids, _ in batches])
        return batches

    def compared(names: Any, predictions: Any, references: Any) -> Any:
        seen["compared"].append([list(predictions), list(references)])
        return compute(names, predictions, references)

    def replace(deal: Any, compute: Any) -> None:
        inference.dealt_batches = deal
        classification.compute_metrics = language_model.compute_metrics = compute

    replace(dealt, compared)
    try:
        yield seen
    finally:
        replace(deal, compute)


def evaluate_task(folder: Path, task: str, stage: int) -> dict[str, Any]:
    with watched() as seen:
        found = finished.evaluate(config_of(folder, task, stage), None)
    scores = {name: value for name, value in found.items() if name not in ("run", "task")}
    return {"scores": scores, "compared": seen["compared"], "dealt": comm.gather_objects(seen["dealt"])}


def main(out: str, folder: str) -> None:
    join(config_of(Path(folder), "arc_easy", 3))
    found = {f"{task} {stage}": evaluate_task(Path(folder), task, stage) for stage in STAGES for task in TASKS}
    if comm.is_main():
        Path(out).write_text(json.dumps(found))
    process_group.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
