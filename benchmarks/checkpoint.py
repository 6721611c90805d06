"""Size of a checkpoint and the time it takes beside training, for the adapter of a 7B base.

python benchmarks/checkpoint.py --size 7b --stage 3

Two ranks train the adapter by itself, in regions drawn at random on the base's shapes; the base is not loaded, for a
checkpoint does not hold it. Every save is a whole one: gathered, written, flushed to the disk, renamed. The last line
is one JSON object.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import ranks
import shapes
import torch
from torch import Tensor, nn

from taso_ds.adapters.adapter import TasoAdapter
from taso_ds.adapters.selection import CoreRegion
from taso_ds.distributed import comm, engine, process_group
from taso_ds.distributed.ds_config import read_ds_config, resolve_ds_config
from taso_ds.training.checkpoint import Checkpoints
from taso_ds.training.progress import Progress
from taso_ds.training.saver import Saver

CORE_FRACTION = 0.1


def random_regions(size: str) -> dict[str, CoreRegion]:
    """Return core regions of the method's size for every linear of the blocks."""
    generator, regions = torch.Generator().manual_seed(0), {}

    def some(length: int) -> Tensor:
        return torch.randperm(length, generator=generator)[: int(CORE_FRACTION * length)].sort().values

    for file in shapes.tensors_of(size):
        for name, shape in file.items():
            if name.startswith("model.layers.") and len(shape) == 2:
                rows, cols = shape
                regions[name.removesuffix(".weight")] = CoreRegion(
                    some(rows), some(cols), out_features=rows, in_features=cols
                )
    return regions


class Alone(nn.Module):
    """An adapter without a base: its loss is the mean square of all its entries."""

    def __init__(self, adapter: TasoAdapter) -> None:
        super().__init__()
        self.taso_adapter = adapter

    def forward(self) -> Tensor:
        dense: Tensor = self.taso_adapter()
        return dense.float().square().mean()


def work(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and save on one rank."""
    process_group.init()
    engine.quiet_deepspeed()
    regions = random_regions(arguments.size)
    adapter = TasoAdapter(regions, structure="union", rank=1, scaling=1.0, seed=0, dtype=torch.bfloat16)
    zero = resolve_ds_config(
        read_ds_config(f"zero{arguments.stage}.json"),
        micro_batch_size=1, grad_accum_steps=1, world_size=comm.world_size(), bf16=True, max_grad_norm=1.0,
    )  # fmt: skip
    model = Alone(adapter)
    live = engine.training_engine(model, torch.optim.AdamW(model.parameters(), lr=1e-3), zero)
    seconds, sizes = [], []
    with tempfile.TemporaryDirectory(prefix="taso_checkpoint_") as name:
        saver = Saver(live, Checkpoints(Path(name)), regions=regions, limit=2)
        for step in range(1, arguments.saves + 1):
            live.backward(live(), scale_wrt_gas=True)
            engine.step(live)
            comm.barrier()
            started = time.perf_counter()
            saver.save(Progress(step, 100, step, {}, 2, arguments.stage, 8, "", "", {}, [], 0))
            seconds.append(time.perf_counter() - started)
            if comm.is_main():
                newest = Checkpoints(Path(name)).newest().path
                assert newest is not None
                sizes.append(sum(file.stat().st_size for file in newest.iterdir()))
    return {
        "size": arguments.size,
        "stage": arguments.stage,
        "trained_parameters": sum(adapter.num_compact),
        "checkpoint_mb": max(sizes, default=0) / 1e6,
        "save_s": statistics.median(seconds),
        "slowest_save_s": max(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="7b", help=f"of {', '.join(shapes.SHAPES)}")
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)  # set on the ranks
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.result is not None:
        found = work(arguments)
        if comm.is_main():
            arguments.result.write_text(json.dumps(found))
        process_group.leave()
        return
    flags = ["--size", arguments.size, "--stage", str(arguments.stage), "--saves", str(arguments.saves)]
    print(json.dumps(ranks.launch(Path(__file__), flags)))


if __name__ == "__main__":
    main()
