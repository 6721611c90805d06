"""A new method and a new monitor: one class and one entry each, and a run that uses both."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from launching import call_main
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from taso_ds.adapters.selection import CoreRegion
from taso_ds.adapters.targets import Targets
from taso_ds.distributed import comm, zero
from taso_ds.errors import UserError
from taso_ds.files.atomic import replacing_folder
from taso_ds.methods.method import Count, Deltas, MethodSettings
from taso_ds.methods.table import METHODS
from taso_ds.models.load import BaseModel
from taso_ds.models.spec import BaseSpec
from taso_ds.reports.monitors import MONITORS
from taso_ds.reports.observer import Observer, StepMetrics
from taso_ds.training.optim import Group, make_group

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

FLAGS = (
    "--task completion --max_seq_length 64 --train_file train.jsonl --eval_file eval.jsonl --no_bf16 --max_steps 3"
    " --ds_config zero0.json --learning_rate 1e-2 --no_verify_export --eval_steps 2 --save_steps 2 --output_dir run"
)


# A method -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Norms:
    """Trains the weights of the norms."""

    settings: MethodSettings

    needs_regions: ClassVar[bool] = False
    trains_base: ClassVar[bool] = False
    adapts_experts: ClassVar[bool] = False

    def count(self, base: BaseSpec, targets: Targets) -> Count:
        return Count([make_group(self.settings.training, "norms", list(_norms(base.meta).values()))])

    def attach(self, base: BaseModel, targets: Targets, regions: Mapping[str, CoreRegion]) -> list[Group]:
        weights = list(_norms(base.model).values())
        for weight in weights:
            weight.requires_grad_(True)
        return [make_group(self.settings.training, "norms", weights)]

    def save(self, folder: Path, base: BaseModel) -> None:
        weights = {name: zero.full_copy(weight) for name, weight in _norms(base.model).items()}

        def write() -> None:
            with replacing_folder(folder) as path:
                save_file(weights, path / "norms.safetensors")

        comm.on_main(write)

    @staticmethod
    def open(folder: Path) -> "SavedNorms":
        return SavedNorms(load_file(folder / "norms.safetensors"))


@dataclass(frozen=True, eq=False)
class SavedNorms:
    weights: dict[str, Tensor]
    shapes: ClassVar[dict[str, tuple[int, int]]] = {}
    head_tensors: ClassVar[dict[str, Tensor]] = {}

    def attach(self, model: nn.Module) -> None:
        for name, weight in self.weights.items():
            zero.assign(model.get_parameter(name), weight)

    def detach(self, model: nn.Module) -> Deltas:
        raise UserError("merge: norms have no matrices")


def _norms(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if name.endswith("norm.weight")}


# A monitor ------------------------------------------------------------------------------------------------------------


class Diary(Observer):
    """Writes down what it is told, in a file of its own."""

    def __init__(self, folder: Path) -> None:
        self._file = folder.parent / "diary"

    def _write(self, line: str) -> None:
        with self._file.open("a") as file:
            file.write(line + "\n")

    def on_start(self, record: Mapping[str, Any], step: int) -> None:
        self._write(f"start {step} of {record['steps']}")

    def on_step(self, metrics: StepMetrics) -> None:
        self._write(f"step {metrics['step']}")

    def on_eval(self, step: int, scores: Mapping[str, float]) -> None:
        self._write(f"eval {step} {sorted(scores)}")

    def on_save(self, step: int) -> None:
        self._write(f"save {step}")

    def on_end(self, results: Mapping[str, Any]) -> None:
        self._write(f"end {results['steps']} {sorted(results['after'])}")


# A run with both ------------------------------------------------------------------------------------------------------


def test_a_run_trains_one_and_is_seen_by_the_other(
    llama_folder: Path, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "norms", lambda: Norms)
    monkeypatch.setitem(MONITORS, "diary", Diary)
    flags = [*FLAGS.split(), "--model_name_or_path", str(llama_folder), "--method", "norms"]
    number = 5 * 32  # two norms in each of two layers, and the last one
    assert f"group norms: {number} parameters" in call_main("train", [*flags, "--dry_run"]).succeeded().out
    finished = call_main("train", flags).succeeded()
    assert any(line.startswith(f"parameters: {number} trainable of") for line in finished.lines)

    before = load_file(llama_folder / "model.safetensors")
    after = load_file(desk / "run" / "adapter" / "norms.safetensors")
    assert sum(value.numel() for value in after.values()) == number
    assert all(not torch.equal(value, before[name]) for name, value in after.items())

    first, *lines, last = (desk / "diary").read_text().splitlines()
    assert first == "start 0 of 3"
    assert [line.split(" [")[0] for line in lines] == ["step 1", "step 2", "eval 2", "save 2", "step 3", "save 3"]
    assert last == f"end 3 {lines[2].removeprefix('eval 2 ')}"

    scores = json.loads(call_main("evaluate", ["--run", "run"]).succeeded().lines[-1])
    wanted = json.loads((desk / "run" / "results.json").read_text())["after"]
    assert {name: scores[name] for name in wanted} == wanted
