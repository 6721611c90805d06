"""Reads records from a file, a local folder, a folder saved by ``datasets``, or the Hugging Face Hub.

Every set of records names its source in words, because a score says nothing without the rows it was taken on.
"""

import gzip
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import torch

from taso_ds.data.tasks import Example, Record, Task
from taso_ds.errors import UserError, reason
from taso_ds.files.json_text import parse_json

# Names a split goes by: many local copies call the validation split dev, and some publish only a test split.
_SPLIT_NAMES = {"validation": ("validation", "dev", "test")}
_SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Records:
    """Rows, and where they come from in words: a path or Hub name, the split, and the part of it that was taken.

    Attributes:
        places: where each row stands in its source, counted from 1 like lines; None for all rows in order.
    """

    rows: list[Record]
    source: str
    places: tuple[int, ...] | None = None

    def first(self, count: int) -> "Records":
        """Return the first ``count`` rows, and say so in the source; all rows where there are no more."""
        if count >= len(self.rows):
            return self
        return self._part(range(count), f"{self.source} (rows 0-{count - 1} of {len(self.rows)})")

    def hold_out(self, share: float, *, seed: int) -> tuple["Records", "Records"]:
        """Return the rows to train on and those held out, each in the order of the source.

        Args:
            share: of the rows, to hold out.
            seed: chooses them.

        Raises:
            UserError: one of both parts would be empty.
        """
        total = len(self.rows)
        number = round(share * total)
        if not 0 < number < total:
            raise UserError(
                f"eval_fraction: {share:g} of the {total} rows of {self.source} is {number} rows, and there must be one"
                " to evaluate on and one to train on; choose another share, or name a file with --eval_file"
            )
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
        held_out = f"{100 * share:g} % of {self.source}, {number} rows, seed {seed}"
        return (
            self._part(sorted(order[number:]), f"{self.source} without {number} rows that seed {seed} holds out"),
            self._part(sorted(order[:number]), held_out),
        )

    def _part(self, indices: Sequence[int], source: str) -> "Records":
        places = tuple(range(1, len(self.rows) + 1)) if self.places is None else self.places
        return Records([self.rows[i] for i in indices], source, tuple(places[i] for i in indices))


def build_examples(task: Task, records: Records) -> list[Example]:
    """Build every record's example; a UserError names the source and the row, counted from 1 like lines."""
    examples = []
    for place, row in zip(records.places or range(1, len(records.rows) + 1), records.rows, strict=True):
        try:
            examples.append(replace(task.build(row), place=place))
        except UserError as error:
            raise UserError(f"{records.source}, row {place}: task {task.name}: {error}") from error
    return examples


def load_records(task: Task, split: str, *, data_dir: str | None, file: str | None) -> Records:
    """Load one split of a task: from ``file`` if given, else from ``data_dir`` if given, else from the Hub.

    Args:
        task: whose folders and Hub name are looked up.
        split: "train", "validation" or "test"; a missing validation split falls back to dev, then test.
        data_dir: a folder with ``<task>/<split>.jsonl[.gz]``, ``<split>.jsonl[.gz]``, or one saved by ``save_to_disk``.
        file: one .jsonl or .jsonl.gz file.

    Raises:
        UserError: nothing was found, or what was found cannot be read.
    """
    if file is not None:
        return Records(read_jsonl(Path(file)), file)
    names = _SPLIT_NAMES.get(split, (split,))
    if data_dir is not None:
        return _from_folder(task, names, Path(data_dir))
    return _from_hub(task, names)


def read_jsonl(path: Path) -> list[Record]:
    """Read a .jsonl or .jsonl.gz file: one JSON object a line.

    Raises:
        UserError: the file is absent, empty, not UTF-8 or damaged, or a line (named) is not a JSON object.
    """
    if not path.name.lower().endswith(_SUFFIXES):
        raise UserError(f"{path}: only {' and '.join(_SUFFIXES)} files can be read (one JSON object a line)")
    try:
        lines = _read_text(path).split("\n")  # splitlines() would also cut at U+2028, which JSON allows in a text
    except UnicodeDecodeError as error:
        if error.object.startswith(b"\x1f\x8b"):
            raise UserError(f"{path}: is compressed: give it the name {path.name}.gz, or unpack it") from error
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from error
    except (OSError, EOFError) as error:  # EOFError: a gzip file that ends too early
        raise UserError(f"{path}: cannot be read: {reason(error)}") from error
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise UserError(f"{path}: the file is empty; it must hold one JSON object a line")
    return [_parse(path, number, line) for number, line in enumerate(lines, start=1)]


def _read_text(path: Path) -> str:
    # utf-8-sig: editors on Windows put a byte order mark at the start of a UTF-8 file.
    if path.name.lower().endswith(".gz"):
        with gzip.open(path, "rt", encoding="utf-8-sig") as stream:
            return stream.read()
    return path.read_text(encoding="utf-8-sig")


def _parse(path: Path, number: int, line: str) -> Record:
    line = line.removeprefix("\ufeff")  # files with byte order marks, one behind the other
    if number == 1 and line.strip() in ("[", "{"):
        raise UserError(f"{path}: is one JSON document over many lines; write one object a line, as in JSON Lines")
    if not line.strip():
        raise UserError(f"{path}:{number}: the line is empty; delete it (only the end of the file may be empty lines)")
    row = parse_json(line, f"{path}:{number}", constants=True)
    if not isinstance(row, dict):
        raise UserError(f"{path}:{number}: expected a JSON object with named fields, found {line.strip()[:60]}")
    return row


def _from_folder(task: Task, names: tuple[str, ...], folder: Path) -> Records:
    if not folder.is_dir():
        raise UserError(f"--data_dir {folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    for place in _places(task, folder):
        for name in names:
            for suffix in _SUFFIXES:
                path = place / f"{name}{suffix}"
                if os.path.lexists(path):  # a link that leads nowhere is told, not passed over
                    return Records(read_jsonl(path), str(path))
            saved = _saved_split(place, name)
            if saved is not None:
                return saved
    place = next(_places(task, folder))
    found = ", ".join(sorted(path.name for path in place.iterdir())[:12]) or "nothing"
    raise UserError(
        f"--data_dir {folder}: no {' or '.join(f'{name}.jsonl' for name in names)} (or .gz) for task {task.name}, "
        f"neither there nor in {' or '.join(f'{name}/' for name in task.folders)}; {place} holds {found}"
        f"{'' if 'train' in names else '; --eval_fraction holds training rows out instead'}"
    )


def _places(task: Task, folder: Path) -> Iterator[Path]:
    """Yield the existing folders to look into, the task's own before the one that may hold any task."""
    for name in task.folders:
        if (folder / name).is_dir():
            yield folder / name
    yield folder


def _saved_split(place: Path, name: str) -> Records | None:
    """Return a split saved by ``datasets``: a DatasetDict's, or a single Dataset's that says it is this split."""
    if (place / name / "state.json").exists():  # written by save_to_disk for every Dataset, also within a dict
        return Records(_saved(place / name).to_list(), str(place / name))
    if (place / "state.json").exists():
        saved = _saved(place)
        if str(saved.split) == name:
            return Records(saved.to_list(), f"{place} (saved {name} split)")
    return None


def _saved(folder: Path) -> datasets.Dataset:
    try:
        saved: datasets.Dataset = datasets.load_from_disk(str(folder))
        return saved
    except Exception as error:
        # As with the Hub: damage shows as whatever error the library or Arrow meets first.
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"--data_dir: {folder} is not a readable saved data set ({first}): save it again") from error


def _from_hub(task: Task, names: tuple[str, ...]) -> Records:
    path, config = task.hub
    remedy = "give a local copy with --data_dir, or files with --train_file / --eval_file"
    if not path:
        raise UserError(f"task {task.name} is not on the Hugging Face Hub: {remedy}")
    title = f"{path}/{config}" if config else path
    try:
        splits = datasets.load_dataset(path, config)
    except Exception as error:
        # The library raises a dozen unrelated types (HTTP, cache, offline mode, moved data set). The user's way out is
        # always the same.
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot load {title} from the Hugging Face Hub ({first}): {remedy}") from error
    for name in names:
        if name in splits:
            return Records(splits[name].to_list(), f"Hugging Face Hub {title}, {name} split")
    raise UserError(f"{title} has no split {' or '.join(names)}; it has {', '.join(splits)}: {remedy}")
