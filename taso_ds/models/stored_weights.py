"""The weights of a quantized base as its checkpoint holds them.

The fingerprint recognizes the base by them, and scoring may use them in place of the quantized ones. Neither needs the
whole model in 16 bits at once: a fingerprint is a sum over ranges, and scoring takes one matrix at a time.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from taso_ds.adapters.targets import MatrixShape, Targets
from taso_ds.distributed import comm, zero
from taso_ds.files.safetensors_ranges import SafetensorsCheckpoint, has_checkpoint, open_checkpoint
from taso_ds.models.load import BaseModel
from taso_ds.models.stored_names import stored_keys

_CHUNK = 1 << 22


class StoredWeights:
    """Target weights in an open checkpoint.

    Args:
        checkpoint: open as long as this is used.
        keys: the checkpoint's key of each target.
        shapes: of the targets before they were quantized, which is how the checkpoint stores them.
    """

    def __init__(
        self, checkpoint: SafetensorsCheckpoint, keys: Mapping[str, str], shapes: Mapping[str, MatrixShape]
    ) -> None:
        self._checkpoint = checkpoint
        self._keys = keys
        self._shapes = shapes

    def read(self, name: str) -> Tensor:
        """Return one weight as ``(out_features, in_features)`` in its stored dtype, on this rank's device."""
        weight = self._checkpoint.read(self._keys[name]).to(comm.device())
        return weight.t() if self._shapes[name].transposed else weight

    def stored_shape(self, name: str) -> torch.Size:
        return self._checkpoint.tensors[self._keys[name]].shape

    def checksums(self) -> list[int]:
        """Return what ``zero.checksum`` returns for the weights loaded in 16 bits; ranks share the reading.

        A collective.
        """
        sums = torch.zeros(len(self._keys), dtype=torch.int64)
        for number, key in enumerate(self._keys.values()):
            stored = self._checkpoint.tensors[key]
            size = -(-stored.numel // comm.world_size())
            end = min(size * (comm.rank() + 1), stored.numel)
            for start in range(size * comm.rank(), end, _CHUNK):
                part = torch.empty(min(_CHUNK, end - start), dtype=stored.dtype)
                self._checkpoint.read_into(part, key, first=start)
                sums[number] += zero.weighted_bits(part, start)
        on_device = sums.to(comm.device())
        comm.sum_everywhere(on_device)
        return [int(value) for value in on_device]


@contextmanager
def stored_weights(base: BaseModel, targets: Targets) -> Iterator[StoredWeights | None]:
    """Open the checkpoint of a quantized base. The model itself holds all weights of any other base.

    Yields:
        None when the base is not quantized, or its files do not hold the targets one by one.
    """
    spec = base.spec
    folder = None if spec.quantization is None else _folder(spec.source, spec.arguments.model_revision)
    if folder is None or not has_checkpoint(folder):
        yield None
        return
    shapes = targets.within(spec.meta).shapes  # of the matrices before they were quantized, as they are stored
    with open_checkpoint(folder) as checkpoint:
        stored = stored_keys(base.model, checkpoint)
        keys = {name: stored.get(f"{name}.weight") for name in targets}
        found = {name: key for name, key in keys.items() if key is not None}
        yield StoredWeights(checkpoint, found, shapes) if len(found) == len(targets) else None


def _folder(source: str, revision: str) -> Path:
    """Return the folder of the files: the source itself, or the folder of the Hub's cache that loading has filled."""
    from huggingface_hub import try_to_load_from_cache

    if Path(source).is_dir():
        return Path(source)
    config = try_to_load_from_cache(source, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else Path(source)
