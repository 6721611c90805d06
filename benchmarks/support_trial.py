"""One family of models tried cell after cell: each is one verb as a user runs it, in processes of its own.

A cell is yes only where the exit code and the results of the run say so; otherwise it holds the line that a user reads.
"""

import json
import math
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from families import Family, write
from forked import ForkServer

# Relative differences of losses that are rounding: of the first loss, and after steps that amplify it.
_EXACT, _AFTER_STEPS, _BF16 = 1e-4, 1e-2, 5e-2
_RECOMPUTES = ("transformers.modeling_utils:checkpoint", "torch.utils.checkpoint:checkpoint")
# A picture of the regions takes longer than all the rest of such a run.
_NO_PICTURE = {"rank": 0, "point": "taso_ds.runs.core_regions:draw_regions", "call": 1, "returns": None}
_WORDS = ("sun", "moon", "rain", "snow")
_SECONDS = 240.0


class Failed(Exception):
    """A cell is no; says why in one line."""


class Refused(Failed):
    """A run was refused before it began."""


class NotThere(Exception):
    """There is nothing to try in this cell."""


def try_family(server: ForkServer, family: Family, logs: Path) -> dict[str, Any]:
    """Return one row of the table: ``cells``, each None for yes or why not, and the adapted ``linears``.

    Args:
        logs: what failed leaves its output there.
    """
    with tempfile.TemporaryDirectory(prefix="taso_support_") as folder:
        desk = Desk(server, Path(folder), family)
        write(family, desk.path / "base")
        write_rows(family, desk.path)
        trial = Trial(desk)
        cells = trial.run()
        for cell in (cell for cell, why in cells.items() if why is not None):
            if (desk.path / f"{cell}.log").is_dir():
                shutil.copytree(desk.path / f"{cell}.log", logs / family.name / cell, dirs_exist_ok=True)
    return {"cells": cells, "linears": trial.linears}


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


@dataclass(frozen=True)
class Desk:
    """A folder with one family's model and rows, and the server that runs verbs on it."""

    server: ForkServer
    path: Path
    family: Family

    @property
    def data(self) -> list[str]:
        task = "sst2" if self.family.kind == "encoder" else "completion"
        files = ["--train_file", str(self.path / "train.jsonl"), "--eval_file", str(self.path / "eval.jsonl")]
        return ["--task", task, *files, "--max_seq_length", "64"]

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
            kind = Refused if set(answer["codes"]) == {2} else Failed
            # What nobody foresaw is followed by where its traceback lies on this machine.
            why = said[-1].replace(str(self.path), "…").partition(": not foreseen")[0] if said else None
            raise kind(why or f"exit codes {answer['codes']}")
        return (log / "rank0.out").read_text()

    def train(self, name: str, *flags: str, ds_config: str = "zero0.json", **more: Any) -> dict[str, Any]:
        """Train two steps and return the results, with what was printed as ``said``."""
        common = [
            *("--model_name_or_path", str(self.path / "base"), "--output_dir", str(self.path / name)), *self.data,
            *("--ds_config", ds_config, "--global_batch_size", "4", "--per_device_train_batch_size", "2"),
            *("--max_steps", "2", "--calibration_samples", "8", "--learning_rate", "1e-2"),
        ]  # fmt: skip
        said = self.run(name, *common, *flags, **more)
        results: dict[str, Any] = json.loads((self.path / name / "results.json").read_text())
        if not all(math.isfinite(results[when]["loss"]) for when in ("before", "after")):
            raise Failed(f"the loss is {results['before']['loss']}, then {results['after']['loss']}")
        return results | {"said": said}


def _kind_of(name: str) -> str:
    """Return the last part of a matrix's name, or ``list.*`` for one of a list."""
    *_, owner, last = name.split(".")
    return f"{owner}.*" if last.isdigit() else last


class Trial:
    """The cells of one family, in their order; later ones compare with the first."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._fp32: dict[str, Any] | None = None
        self.linears: list[str] = []

    def run(self) -> dict[str, str | None]:
        cells: dict[str, str | None] = {}
        attempts = {
            "fp32": self._train_fp32, "score": self._score, "bf16": self._train_bf16, "zero3": self._train_zero3,
            "checkpointing": self._recompute, "nf4": self._train_nf4, "experts": self._adapt_experts,
            "proof": self._prove, "merge": self._merge, "lora": self._train_lora,
        }  # fmt: skip
        refused = False
        for name, attempt in attempts.items():
            try:
                if not refused or name == "lora":
                    attempt()
                    cells[name] = None
            except Refused as error:
                cells[name] = str(error)
                refused |= name == "fp32"  # then so is all that begins like it
            except Failed as error:
                cells[name] = str(error)
            except NotThere:
                continue
        return cells

    def _done(self) -> dict[str, Any]:
        if self._fp32 is None:
            raise NotThere
        return self._fp32

    def _train_fp32(self) -> None:
        self._fp32 = self._desk.train("fp32", "--no_bf16", "--no_verify_export")

    def _score(self) -> None:
        """Say no where a matrix has no importance at all: whatever computes it does not pass the module."""
        from taso_ds.adapters.region_file import load_region_file

        self._done()
        scores = load_region_file(self._desk.path / "fp32" / "core_regions.safetensors").scores
        self.linears = list(dict.fromkeys(_kind_of(name) for name in scores))
        silent = [name for name, entry in scores.items() if not float(entry.row_importance.sum()) > 0]
        if silent:
            raise Failed(f"no gradient reaches {silent[0]}")

    def _train_bf16(self) -> None:
        found = self._desk.train("bf16", "--no_verify_export")
        self._check_near(found, before=_BF16, after=_BF16)

    def _train_zero3(self) -> None:
        found = self._desk.train("zero3", "--no_bf16", "--no_verify_export", ds_config="zero3.json", ranks=2)
        self._check_near(found, before=_EXACT, after=_AFTER_STEPS)

    def _recompute(self) -> None:
        flags = ("--no_bf16", "--no_verify_export", "--gradient_checkpointing")
        found = self._desk.train("checkpointing", *flags, count=_RECOMPUTES)
        self._check_near(found, before=_EXACT, after=_AFTER_STEPS)
        if not (self._desk.path / "checkpointing.log" / "calls0.json").is_file():
            raise Failed("nothing is recomputed")

    def _train_nf4(self) -> None:
        found = self._desk.train("nf4", "--load_in_4bit", "--no_verify_export")
        share = re.search(r"(\d+) % of the weights in 4 bits", found["said"])
        if share is None or not int(share[1]):
            raise Failed("no weight is quantized")

    def _adapt_experts(self) -> None:
        try:
            self._desk.train("experts", "--no_bf16", "--adapt_experts")
        except Failed as error:
            if "has no experts in fused parameters" in str(error):
                raise NotThere from error
            raise

    def _prove(self) -> None:
        self._done()
        self._desk.run("proof", "--run", str(self._desk.path / "fp32"), script="export")

    def _merge(self) -> None:
        wanted, run = self._done()["after"]["loss"], self._desk.path / "fp32"
        self._desk.run("merge", "--run", str(run), "--merge", script="export")
        merged = ["--model_name_or_path", str(run / "model"), "--no_bf16", "--ds_config", "zero0.json"]
        said = self._desk.run("merged", *merged, *self._desk.data, script="evaluate")
        loss = json.loads(said.splitlines()[-1])["loss"]
        if abs(loss - wanted) > _EXACT * abs(wanted):
            raise Failed(f"the merged model's loss is {loss:.4f}, with the adapter it was {wanted:.4f}")

    def _train_lora(self) -> None:
        """Try the baseline where TASO cannot."""
        if self._fp32 is not None:
            raise NotThere
        self._desk.train("lora", "--no_bf16", "--no_verify_export", "--method", "lora")

    def _check_near(self, found: Mapping[str, Any], *, before: float, after: float) -> None:
        if self._fp32 is None:
            return
        for when, tolerance in (("before", before), ("after", after)):
            one, other = found[when]["loss"], self._fp32[when]["loss"]
            if abs(one - other) > tolerance * abs(other):
                raise Failed(f"the loss {when} training is {one:.4f}, in fp32 at stage 0 it is {other:.4f}")
