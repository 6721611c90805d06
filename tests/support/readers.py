"""Everything that reads a file of a user's, with a valid file of each kind: what hostile bytes are thrown at.

A new reader is one entry in ``READERS``: ``test_readers.py`` mutates its file a little in every test run, and
``fuzz/fuzz_readers.py`` for as long as one likes.
"""

import dataclasses
import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from configs import zero_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from taso_ds.adapters.adapter import TasoAdapter
from taso_ds.adapters.peft_format import load_adapter, peft_tensors, save_adapter
from taso_ds.adapters.region_file import RegionFile, load_region_file, save_region_file
from taso_ds.adapters.selection import cut_region, score_rows_and_cols
from taso_ds.config import GROUPS
from taso_ds.data.records import read_jsonl
from taso_ds.data.tasks import TASKS
from taso_ds.distributed.ds_config import read_ds_config
from taso_ds.errors import UserError
from taso_ds.files.safetensors_ranges import open_checkpoint
from taso_ds.files.tensors import CHECKSUM
from taso_ds.flags.file import read_yaml, typed
from taso_ds.training.checkpoint import MANIFEST, MARKER, PROGRESS, STATE, Checkpoints, resolve_checkpoint
from taso_ds.training.progress import Progress, read_progress

LADDER = (0.05, 0.1)


@dataclass(frozen=True)
class Reader:
    """One kind of file.

    Attributes:
        file: its name inside the folder that ``write`` and ``read`` are given.
        write: makes a valid one.
        read: reads it and looks at everything it says; a fault of the file is a ``UserError``.
        header: of a safetensors file mutate the header's text only: what else is mutated seldom gets past it.
    """

    file: str
    write: Callable[[Path], None]
    read: Callable[[Path], object]
    header: bool = False


def write_regions(folder: Path) -> None:
    scores = {"block.0.q": score_rows_and_cols(torch.arange(42.0).view(6, 7), LADDER)}
    save_region_file(folder / "core_regions.safetensors", RegionFile(scores, {"seed": 0}, "abc"))


def read_regions(folder: Path) -> None:
    file = load_region_file(folder / "core_regions.safetensors")
    ladder = next(iter(file.scores.values())).ladder
    if ladder:
        file.cut(element_fraction=ladder[0], core_fraction=0.3, source="here")


def write_adapter(folder: Path) -> None:
    scores = score_rows_and_cols(torch.arange(42.0).view(6, 7), LADDER)
    region = cut_region(scores, element_fraction=0.05, core_fraction=0.3)
    adapter = TasoAdapter({"q": region}, structure="union", rank=1, scaling=1.0, seed=0, dtype=torch.float32)
    flat = torch.arange(1.0, adapter.flat.numel() + 1)
    save_adapter(folder, adapter, flat, config={"peft_type": "LORA"}, head={"score.weight": torch.ones(2)})


def read_adapter(folder: Path) -> None:
    adapter, _ = load_adapter(folder)
    peft_tensors(adapter, adapter.flat.detach())


def write_checkpoint(folder: Path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.tensor(True)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_indexed_checkpoint(folder: Path) -> None:
    write_checkpoint(folder)
    (folder / "model.safetensors").rename(folder / "part.safetensors")  # under its own name it would be read instead
    index = {"metadata": {"total_size": 31}, "weight_map": dict.fromkeys("abc", "part.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def read_checkpoint(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        for name in checkpoint.tensors:
            checkpoint.read(name)


def write_ds_config(folder: Path) -> None:
    (folder / "ds.json").write_text(
        json.dumps(
            {
                "train_batch_size": "auto", "gradient_clipping": 1.0, "bf16": {"enabled": "auto"},
                "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}, "data_types": {"grad_accum_dtype": "fp32"},
                "zero_optimization": {
                    "stage": 3, "overlap_comm": True, "reduce_bucket_size": 5e8, "zero_hpz_partition_size": "auto",
                    "offload_param": {"device": "cpu", "pin_memory": True},
                },
            }
        )
    )  # fmt: skip


def read_ds(folder: Path) -> None:
    zero_config(read_ds_config(str(folder / "ds.json")), micro=4, accumulation=2, world_size=8, bf16=True)


def write_rows(folder: Path) -> None:
    rows = [
        {"prompt": "a:", "completion": " b"},
        {"sentence1": "a", "sentence2": "b", "sentence": "c", "question": "d", "word": "e", "label": 1, "answer": True},
        {"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B", "label": 2.5},
        {"question": "q", "choices": ["x", "y"], "label": 1, "support": "s", "correct_answer": "c"}
        | {f"distractor{number}": "d" for number in (1, 2, 3)},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(folder: Path) -> None:
    for row in read_jsonl(folder / "rows.jsonl"):
        for task in TASKS.values():
            try:
                task.build(row)
            except UserError:
                continue  # of one task: the others may take the row


def write_yaml(folder: Path) -> None:
    values = {"rank": 2, "learning_rate": 1e-3, "bf16": False, "rho": "off", "target_modules": ["q", "v"], "task": "x"}
    (folder / "run.yaml").write_text(yaml.safe_dump(values))


def read_configuration(folder: Path) -> None:
    typed(read_yaml(str(folder / "run.yaml")), GROUPS, "run.yaml")


SAVED = "step-00000001"


def write_saved(folder: Path) -> None:
    record = Progress(
        step=1, total_steps=2, optimizer_steps=1, config={"rank": 1}, world_size=1, zero_stage=0, global_batch_size=4,
        base="abc", data="def", before={"loss": 1.0}, recent_losses=[1.0], rollbacks=0,
    )  # fmt: skip
    progress = json.dumps(dataclasses.asdict(record))
    files = {STATE: lambda path: path.touch(), PROGRESS: lambda path: path.write_text(progress)}
    Checkpoints(folder).write(1, files, limit=1)


def read_saved(folder: Path) -> None:
    """With a digest of the manifest as it is: the one there would hide all else."""
    checkpoint = folder / SAVED
    (checkpoint / MARKER).write_text(hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest())
    resolve_checkpoint(checkpoint)


READERS: dict[str, Reader] = {
    "core regions": Reader("core_regions.safetensors", write_regions, read_regions),
    "adapter": Reader("taso_adapter.safetensors", write_adapter, read_adapter),
    "weights": Reader("model.safetensors", write_checkpoint, read_checkpoint),
    "index of weights": Reader("model.safetensors.index.json", write_indexed_checkpoint, read_checkpoint),
    "DeepSpeed JSON": Reader("ds.json", write_ds_config, read_ds),
    "rows": Reader("rows.jsonl", write_rows, read_rows),
    "manifest of a checkpoint": Reader(f"{SAVED}/{MANIFEST}", write_saved, read_saved),
    "record of a checkpoint": Reader(f"{SAVED}/{PROGRESS}", write_saved, lambda folder: read_progress(folder / SAVED)),
    "configuration": Reader("run.yaml", write_yaml, read_configuration),
}


READERS |= {f"header of {name}": replace(READERS[name], header=True) for name in ("core regions", "adapter", "weights")}
DATA = "data"  # what follows the header of a valid file


def valid_files(reader: Reader, folder: Path) -> list[bytes]:
    """Return valid contents of a reader's file; where there is a checksum, also without it: it hides all else."""
    reader.write(folder)
    path = folder / reader.file
    contents = [path.read_bytes()]
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            metadata = {key: value for key, value in file.metadata().items() if key != CHECKSUM}
        save_file(load_file(path), path, metadata=metadata)
        contents.append(path.read_bytes())
    if not reader.header:
        return contents
    (length,) = struct.unpack("<Q", contents[-1][:8])
    (folder / DATA).write_bytes(contents[-1][8 + length :])
    return [contents[-1][8 : 8 + length]]


def read_bytes(reader: Reader, folder: Path, content: bytes) -> bool:
    """Read these bytes with a reader; False when it refused them as it should."""
    if reader.header:
        content = struct.pack("<Q", len(content)) + content + (folder / DATA).read_bytes()
    (folder / reader.file).write_bytes(content)
    try:
        reader.read(folder)
    except UserError:
        return False
    return True
