"""The worked examples of CONTRIBUTING.md work as they stand."""

import json
import re
from pathlib import Path

import pytest
from launching import ROOT, call_main

from taso_ds.adapters.choices import STRUCTURES
from taso_ds.data.tasks import TASKS
from taso_ds.reports.monitors import MONITORS

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
RUN = (
    "--no_bf16 --max_steps 2 --ds_config own.json --calibration_samples 4 --per_device_train_batch_size 2"
    " --no_verify_export --output_dir run"
)


def example(title: str, language: str) -> str:
    """Return the code of a section."""
    section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    (code,) = re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)
    return str(code)


@pytest.fixture
def _as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an example adds goes again."""
    for table in (TASKS, STRUCTURES, MONITORS):
        for name in ("parity", "rows", "losses"):
            monkeypatch.setitem(table, name, None)
            monkeypatch.delitem(table, name)


@pytest.mark.usefixtures("_as_before")
def test_a_run_with_a_task_a_structure_a_monitor_and_a_json(
    tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for title in ("A task", "A structure", "A monitor"):
        exec(compile(example(title, "python"), title, "exec"), {"__name__": title})
    Path("own.json").write_text(example("A DeepSpeed JSON", "json"))
    Path("parity").mkdir()
    for split in ("train", "validation"):
        rows = (json.dumps({"number": number}) + "\n" for number in range(8))
        Path("parity", f"{split}.jsonl").write_text("".join(rows))
    flags = ["--model_name_or_path", str(llama_folder), "--task", "parity", "--data_dir", ".", "--structure", "rows"]
    call_main("train", [*flags, "--max_seq_length", "64", *RUN.split()]).succeeded()
    results = json.loads(Path("run/results.json").read_text())
    assert results["headline"] == "accuracy"
    assert [line.split(",")[0] for line in Path("run/losses.csv").read_text().splitlines()] == ["1", "2"]
    assert json.loads(Path("run/run.json").read_text())["deepspeed"]["zero_optimization"]["reduce_bucket_size"] == 10**8
