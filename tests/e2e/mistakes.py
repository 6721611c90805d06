"""What the tests of mistakes share: a run that works, and what a mistake made of it must leave behind.

A mistake that a user makes is told in one line that names the thing and the remedy, with exit code 2, and nothing is
written. Every case runs the real ``main()``. Loading weights fails the test, unless the fault lies in the weights.
"""

import shlex
import string
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from launching import Finished, call_main

# A run that works, in a folder with train.jsonl and eval.jsonl; the flags of a case come after these and override them.
GOOD = (
    "--model_name_or_path {llama} --task completion --train_file train.jsonl --eval_file eval.jsonl --max_seq_length 64"
    " --no_bf16 --ds_config zero0.json --max_steps 2 --calibration_samples 4 --no_verify_export --output_dir run"
)
# One without rows.
NO_EVAL = "--model_name_or_path {llama} --max_seq_length 64 --output_dir run"
REGIONS = "--core_regions {regions}/"
# name of a folder in flags: the fixture that makes it
PLACES = {
    "llama": "llama_folder", "gpt2": "gpt2_folder", "bert": "bert_folder", "models": "damaged_models",
    "regions": "region_files", "runs": "damaged_runs",
}  # fmt: skip


@dataclass(frozen=True)
class Mistake:
    """One mistake.

    Attributes:
        flags: what is added to ``GOOD``, or all flags where ``alone``.
        words: what the error line must contain.
        files: what lies in the current folder, besides the rows of ``GOOD``.
        loads: whether the weights have to be read to see the mistake.
    """

    flags: str
    words: tuple[str, ...]
    files: Mapping[str, str] = field(default_factory=dict)
    script: str = "train"
    alone: bool = False
    loads: bool = False


class Mistakes(dict[str, Mistake]):
    """A table of mistakes by name."""

    def add(self, name: str, flags: str, *words: str, **more: Any) -> None:
        assert name not in self
        self[name] = Mistake(flags, words, **more)


def assert_refused(mistake: Mistake, desk: Path, request: pytest.FixtureRequest) -> None:
    """Run the script with the mistake in the current folder."""
    text = mistake.flags if mistake.alone else f"{GOOD} {mistake.flags}"
    names = {name for _, name, *_ in string.Formatter().parse(text) if name}
    places: dict[str, Path] = {name: request.getfixturevalue(PLACES[name]) for name in sorted(names)}
    if not mistake.loads:
        request.getfixturevalue("forbid_weights")
    for file, content in mistake.files.items():
        (desk / file).parent.mkdir(exist_ok=True)
        (desk / file).write_text(content, encoding="utf-8")
    with unchanged(desk, *places.values()):
        finished = call_main(mistake.script, [word.format(**places) for word in shlex.split(text)])
    assert_one_line(finished, *mistake.words)
    if not mistake.loads:
        assert finished.err.splitlines() == finished.errors  # that one line, and nothing else


def refused(flags: str, *words: str, llama: Path, script: str = "train") -> None:
    """Run the script with a mistake in the current folder, which stays as it is."""
    with unchanged(Path.cwd()):
        finished = call_main(script, [*GOOD.format(llama=llama).split(), *flags.split(" ")])
    assert_one_line(finished, *words)
    assert finished.err.splitlines() == finished.errors  # that one line, and nothing else


@contextmanager
def unchanged(*folders: Path) -> Iterator[None]:
    """Nothing that happens meanwhile makes, changes or removes a file or a folder there."""
    before = contents(*folders)
    yield
    assert contents(*folders) == before


def contents(*folders: Path) -> dict[Path, bytes | None]:
    """Every file and folder below, with what the files hold."""
    found = [path for folder in folders for path in folder.rglob("*")]
    return {path: path.read_bytes() if path.is_file() else None for path in found}


def assert_one_line(finished: Finished, *words: str) -> None:
    assert finished.code == 2
    assert "Traceback" not in finished.err
    assert len(finished.errors) == 1, finished.err
    line = finished.errors[0]
    assert len(line) < 600, line
    for word in words:
        assert word in line, line
