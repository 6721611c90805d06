"""A digest by which a run and a region file recognize their base. It covers the adapted weights, not a folder."""

import hashlib

from torch import nn

from taso_ds.adapters.fused_experts import ExpertMatrix
from taso_ds.adapters.targets import Targets
from taso_ds.distributed.zero import checksum, full_shape
from taso_ds.models.load import BaseModel
from taso_ds.models.stored_weights import StoredWeights, stored_weights


def base_fingerprint(base: BaseModel, targets: Targets) -> str:
    """Return the digest of a loaded base. The checkpoint of a quantized base is opened for it. A collective."""
    with stored_weights(base, targets) as stored:
        return fingerprint(targets, stored)


def fingerprint(targets: Targets, stored: StoredWeights | None = None) -> str:
    """Return a digest of the target weights. A collective.

    It does not depend on how the weights are sharded, nor on whether they were loaded in fp32 or bf16.

    Args:
        targets: of the loaded model.
        stored: the open checkpoint of a quantized base. The digest is then of the weights in it, so it is the same
            whether a run quantizes the base or not.
    """
    if stored is None:
        weights = _weights(targets)
        shapes, sums = [full_shape(weight) for weight in weights.values()], checksum(list(weights.values()))
        names = list(weights)
    else:
        shapes, sums = [stored.stored_shape(name) for name in targets], stored.checksums()
        names = list(targets)
    lines = [f"{name} {tuple(shape)} {value}" for name, shape, value in zip(names, shapes, sums, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _weights(targets: Targets) -> dict[str, nn.Parameter]:
    """Return the parameters that hold the targets. A fused one comes once, by its own name."""
    return {
        name.rpartition(".")[0] if isinstance(target.matrix, ExpertMatrix) else name: target.parameter
        for name, target in targets.items()
    }
