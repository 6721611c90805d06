"""What works for which family of models: every cell of the table in docs/models.md, tried on a tiny random model.

python benchmarks/support.py --write docs/models.md
python benchmarks/support.py --families llama,opt

Each cell is one verb as a user runs it, in processes of its own, and says yes only where exit code and results do. What
is done already is kept in ``--folder``, so an interrupted table goes on; the families that are named are tried again.
"""

import argparse
import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from families import FAMILIES, Family, write
from forked import ForkServer
from support_table import CELLS, render

# Relative differences of losses that are rounding: of the first loss, and after steps that amplify it.
_EXACT, _AFTER_STEPS, _BF16 = 1e-4, 1e-2, 5e-2
_RECOMPUTES = ("transformers.modeling_utils:checkpoint", "torch.utils.checkpoint:checkpoint")
_WORDS = ("sun", "moon", "rain", "snow")
_SECONDS = 240.0
# A picture of the regions takes longer than all the rest of such a run.
_NO_PICTURE = {"rank": 0, "point": "taso_ds.training.regions:draw_regions", "call": 1, "returns": None}


class Failed(Exception):
    """A cell is no; says why in one line."""


@dataclass(frozen=True)
class Desk:
    """A folder with one family's model and rows, and the server that runs verbs on it."""

    server: ForkServer
    path: Path
    family: Family

    def run(self, name: str, *flags: str, script: str = "train", ranks: int = 1, **more: Any) -> str:
        """Run a verb and return what rank 0 printed.

        Raises:
            Failed: the exit code is not 0; with the line a user reads.
        """
        log = self.path / f"{name}.log"
        answer = self.server.run(
            list(flags), log, script=script, ranks=ranks, timeout=_SECONDS, faults=[_NO_PICTURE], **more
        )
        if answer["hung"]:
            raise Failed(f"no end after {_SECONDS:.0f} s")
        if set(answer["codes"]) != {0}:
            errors = [line for file in sorted(log.glob("rank*.err")) for line in file.read_text().splitlines()]
            said = [line.removeprefix("error: ") for line in errors if line.startswith("error: ")]
            raise Failed(said[-1].replace(str(self.path), "…") if said else f"exit codes {answer['codes']}")
        return (log / "rank0.out").read_text()

    def train(self, name: str, *flags: str, ds_config: str = "zero0.json", **more: Any) -> dict[str, Any]:
        """Train and return the results."""
        common = [
            *("--model_name_or_path", str(self.path / "base"), "--output_dir", str(self.path / name)),
            *self.data_flags, "--ds_config", ds_config, "--global_batch_size", "4", "--max_steps", "2",
            *("--per_device_train_batch_size", "2", "--calibration_samples", "8", "--learning_rate", "1e-2"),
        ]  # fmt: skip
        self.run(name, *common, *flags, **more)
        results: dict[str, Any] = json.loads((self.path / name / "results.json").read_text())
        if not all(math.isfinite(results[when]["loss"]) for when in ("before", "after")):
            raise Failed(f"loss {results['before']['loss']}, then {results['after']['loss']}")
        return results

    @property
    def data_flags(self) -> list[str]:
        task = "sst2" if self.family.kind == "encoder" else "completion"
        files = ["--train_file", str(self.path / "train.jsonl"), "--eval_file", str(self.path / "eval.jsonl")]
        return ["--task", task, *files, "--max_seq_length", "64"]


def write_rows(family: Family, folder: Path) -> None:
    """Write rows with a rule in them: the word that comes next, or which of two words it is."""
    for split, number in (("train", 16), ("eval", 4)):
        rows: list[dict[str, Any]] = []
        for n in range(number):
            if family.kind == "encoder":
                rows.append({"sentence": f"{split} {n} {('bad', 'good')[n % 2]}", "label": n % 2})
            else:
                rows.append({"prompt": f"{split} {n} {_WORDS[n % 4]}:", "completion": f" {_WORDS[(n + 1) % 4]}"})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _check_near(found: Mapping[str, Any], wanted: Mapping[str, Any], *, before: float, after: float) -> None:
    for when, tolerance in (("before", before), ("after", after)):
        one, other = found[when]["loss"], wanted[when]["loss"]
        if abs(one - other) > tolerance * abs(other):
            raise Failed(f"the loss {when} training is {one:.4f}, in fp32 at stage 0 it is {other:.4f}")


def _scored(run: Path) -> list[str]:
    """Return the names of the scored matrices; Failed where one has no importance."""
    from taso_ds.adapters.region_file import load_region_file

    scores = load_region_file(run / "core_regions.safetensors").scores
    silent = [name for name, entry in scores.items() if not float(entry.row_importance.sum()) > 0]
    if silent:
        raise Failed(f"no gradient reaches {silent[0]}")
    return list(scores)


class Trial:
    """One family, cell after cell."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.cells: dict[str, str | None] = {}  # None for yes, otherwise why not; absent where there is nothing to try
        self.linears: list[str] = []
        self.fp32: dict[str, Any] | None = None

    def run(self) -> dict[str, Any]:
        for name, attempt in self._attempts().items():
            try:
                attempt()
                self.cells[name] = None
            except Failed as error:
                self.cells[name] = str(error)
            except NotThere:
                pass
        return {"cells": self.cells, "linears": self.linears}

    def _attempts(self) -> dict[str, Callable[[], None]]:
        return {
            "fp32": self._fp32, "score": self._score, "bf16": self._bf16, "zero3": self._zero3,
            "checkpointing": self._checkpointing, "nf4": self._nf4, "experts": self._experts, "proof": self._proof,
            "merge": self._merge, "lora": self._lora,
        }  # fmt: skip

    def _fp32(self) -> None:
        self.fp32 = self.desk.train("fp32", "--no_bf16", "--no_verify_export")

    def _done(self) -> dict[str, Any]:
        if self.fp32 is None:
            raise NotThere
        return self.fp32

    def _score(self) -> None:
        self._done()
        names = _scored(self.desk.path / "fp32")
        self.linears = list(dict.fromkeys(name.rpartition(".")[2] for name in names))

    def _bf16(self) -> None:
        found = self.desk.train("bf16", "--no_verify_export")
        if self.fp32:
            _check_near(found, self.fp32, before=_BF16, after=_BF16)

    def _zero3(self) -> None:
        found = self.desk.train("zero3", "--no_bf16", "--no_verify_export", ds_config="zero3.json", ranks=2)
        if self.fp32:
            _check_near(found, self.fp32, before=_EXACT, after=_AFTER_STEPS)

    def _checkpointing(self) -> None:
        flags = ("--no_bf16", "--no_verify_export", "--gradient_checkpointing")
        found = self.desk.train("checkpointing", *flags, count=_RECOMPUTES)
        if self.fp32:
            _check_near(found, self.fp32, before=_EXACT, after=_AFTER_STEPS)
        if not (self.desk.path / "checkpointing.log" / "calls0.json").is_file():
            raise Failed("nothing is recomputed")

    def _nf4(self) -> None:
        self.desk.train("nf4", "--load_in_4bit", "--no_verify_export")

    def _experts(self) -> None:
        try:
            self.desk.train("experts", "--no_bf16", "--adapt_experts")
        except Failed as error:
            if "has no experts in fused parameters" in str(error):
                raise NotThere from error
            raise

    def _proof(self) -> None:
        self._done()
        self.desk.run("proof", "--run", str(self.desk.path / "fp32"), script="export")

    def _merge(self) -> None:
        wanted = self._done()["after"]["loss"]
        self.desk.run("merge", "--run", str(self.desk.path / "fp32"), "--merge", script="export")
        merged = ["--model_name_or_path", str(self.desk.path / "fp32" / "model"), "--no_bf16"]
        said = self.desk.run(
            "merged", *merged, *self.desk.data_flags, "--ds_config", "zero0.json", script="evaluate"
        )
        loss = json.loads(said.splitlines()[-1])["loss"]
        if abs(loss - wanted) > _EXACT * abs(wanted):
            raise Failed(f"the merged model's loss is {loss:.4f}, with the adapter it was {wanted:.4f}")

    def _lora(self) -> None:
        if self.fp32 is not None:
            raise NotThere
        self.desk.train("lora", "--no_bf16", "--no_verify_export", "--method", "lora")


class NotThere(Exception):
    """There is nothing to try in this cell."""


def try_family(server: ForkServer, family: Family, logs: Path) -> dict[str, Any]:
    """Return one row of the table; what failed leaves its output in ``logs``."""
    path = Path(tempfile.mkdtemp(prefix=f"taso_support_{re.sub('[^a-z0-9]', '_', family.name)}_"))
    write(family, path / "base")
    write_rows(family, path)
    row = Trial(Desk(server, path, family)).run()
    for cell in (cell for cell, why in row["cells"].items() if why is not None and (path / f"{cell}.log").is_dir()):
        shutil.copytree(path / f"{cell}.log", logs / family.name / cell, dirs_exist_ok=True)
    shutil.rmtree(path)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default="", help="only these, again; default: all that have no row yet")
    parser.add_argument("--folder", type=Path, default=Path(".cache/support"), help="where rows are kept")
    parser.add_argument("--jobs", type=int, default=2, help="families at the same time")
    parser.add_argument("--write", type=Path, help="put the table into this file")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    names = [name for name in arguments.families.split(",") if name]
    file_of = {family.name: arguments.folder / f"{family.name}.json" for family in FAMILIES}
    queue = [
        family for family in FAMILIES if (family.name in names if names else not file_of[family.name].is_file())
    ]
    waiting = iter(queue)

    def work() -> None:
        with ForkServer() as server:
            for family in waiting:
                row = try_family(server, family, arguments.folder)
                file_of[family.name].write_text(json.dumps(row, indent=1))
                marks = " ".join(f"{cell} {'yes' if why is None else 'NO'}" for cell, why in row["cells"].items())
                print(f"{family.name}: {marks}", flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        for done in [pool.submit(work) for _ in range(arguments.jobs)]:
            done.result()
    if arguments.write:
        rows = {name: json.loads(file.read_text()) for name, file in file_of.items() if file.is_file()}
        arguments.write.write_text(render(rows))


if __name__ == "__main__":
    main()
