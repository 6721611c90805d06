"""A live run to its checkpoints and back: what is trained, the moments, the core regions, where the run stands."""

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from taso_ds.adapters.selection import CoreRegion
from taso_ds.distributed import comm, zero
from taso_ds.distributed.engine import Engine
from taso_ds.distributed.trained_state import KINDS, optimizer_steps, read_state, write_state
from taso_ds.errors import UserError
from taso_ds.files.atomic import write_flushed
from taso_ds.files.tensors import read_tensors, stream_tensors, write_tensors
from taso_ds.training import agreement
from taso_ds.training.checkpoint import PROGRESS, STATE, Checkpoints
from taso_ds.training.progress import Progress, Saved, read_progress

log = logging.getLogger(__name__)

_REGIONS = "core_regions.safetensors"
_KIND = "taso_checkpoint_regions"


class Saver:
    """Saves and restores the trained state of one engine.

    Args:
        regions: core regions in use; empty for methods without.
        limit: checkpoints to keep.
    """

    def __init__(
        self,
        engine: Engine,
        checkpoints: Checkpoints,
        *,
        regions: Mapping[str, CoreRegion],
        limit: int,
    ) -> None:
        self._engine = engine
        self._checkpoints = checkpoints
        self._regions = {
            f"{name}.{side}": getattr(region, side).to(torch.int32)
            for name, region in regions.items()
            for side in ("rows", "cols")
        }
        self._limit = limit
        self._names: dict[str, nn.Parameter] = {
            name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad
        }

    @property
    def digest(self) -> int:
        """Digest of what is trained: names, shapes and core regions."""
        shapes = (f"{name} {tuple(zero.full_shape(value))}".encode() for name, value in self._names.items())
        bounds = (name.encode() + value.numpy().tobytes() for name, value in self._regions.items())
        return agreement.digest([*shapes, *bounds])

    def save(self, progress: Progress) -> None:
        """Write the checkpoint of ``progress.step`` on rank 0, with Adam's own number of steps. A collective.

        Raises:
            UserError: on every rank, when it cannot be written; the previous one stays the latest.
        """
        started = time.perf_counter()
        progress = dataclasses.replace(progress, optimizer_steps=optimizer_steps(self._engine))
        values = (value for _, _, value in read_state(self._engine, self._names))

        def write() -> Path:
            writers: dict[str, Callable[[Path], None]] = {
                STATE: lambda path: stream_tensors(path, self._shapes(), values),
                PROGRESS: lambda path: write_flushed(path, json.dumps(dataclasses.asdict(progress), indent=2) + "\n"),
            }
            if self._regions:
                writers[_REGIONS] = lambda path: write_tensors(path, self._regions, {"kind": _KIND})
            return self._checkpoints.write(progress.step, writers, limit=self._limit)

        path = _while_all_send(values, write)
        if comm.is_main():
            size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
            log.info("checkpoint: %s (%.1f MB in %.2f s)", path, size, time.perf_counter() - started)

    def last(self) -> Saved:
        """Return the newest complete checkpoint, of which there is one. Rank 0 only."""
        newest = self._checkpoints.newest().path
        assert newest is not None, "there is one of step 0"
        return Saved(newest, read_progress(newest))

    def restore(self, saved: Saved) -> None:
        """Bring the engine to a complete checkpoint. A collective; only rank 0 has to see the files.

        Raises:
            UserError: on every rank, when it belongs to another run.
        """
        checkpoint, steps = saved.path, saved.progress.optimizer_steps
        comm.on_main(lambda: self._check(checkpoint))
        if not comm.is_main():
            write_state(self._engine, self._names, _nothing, steps=steps)
            return
        with safe_open(checkpoint / STATE, framework="pt") as file:
            write_state(
                self._engine,
                self._names,
                lambda kind, name: file.get_tensor(f"{kind}/{name}"),
                steps=steps,
            )

    def _shapes(self) -> dict[str, torch.Size]:
        return {
            f"{kind}/{name}": zero.full_shape(parameter) for name, parameter in self._names.items() for kind in KINDS
        }

    def _check(self, checkpoint: Path) -> None:
        """Compare names, shapes and regions with this run's."""
        try:
            with safe_open(checkpoint / STATE, framework="pt") as file:
                shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{checkpoint / STATE}: not a readable safetensors file ({error})") from error
        if shapes != self._shapes():
            different = sorted(shapes.items() ^ self._shapes().items())[0][0]
            raise UserError(f"resume: {checkpoint} trains other parameters than this run ({different})")
        if not self._regions:
            return
        tensors, _ = read_tensors(checkpoint / _REGIONS, kind=_KIND)
        if tensors.keys() != self._regions.keys() or any(
            not torch.equal(tensors[name], value) for name, value in self._regions.items()
        ):
            raise UserError(f"resume: {checkpoint} was trained in other core regions than those of the run folder")


def _while_all_send(values: Iterator[Tensor], write: Callable[[], Path]) -> Path:
    """Run ``write``, which reads ``values``, on rank 0 while every rank takes part in sending them. A collective."""
    path: Path | None = None
    failure: UserError | None = None
    if comm.is_main():
        try:
            path = write()
        except UserError as error:
            failure = error
    for _ in values:  # on rank 0 what a failed write left
        pass

    def result() -> Path:
        if failure is not None:
            raise failure
        assert path is not None
        return path

    return comm.on_main(result)


def _nothing(kind: str, name: str) -> Tensor:
    raise AssertionError("only rank 0 reads a checkpoint")
