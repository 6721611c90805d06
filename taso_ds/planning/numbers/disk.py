"""Bytes a run writes into its folder, by cause.

``t`` trainable parameters, ``D`` entries of the expanded adapter, ``w`` bytes of each, ``E`` the sum of rows and
columns of all adapted matrices, ``p`` the share of them that is core, ``k`` element fractions of the ladder:

- **Adapter.** The compact file ``w·t`` and its indices ``8·p·E``, PEFT's file ``w·D``; LoRA's alone is ``w·t``. Full
  fine-tuning writes the model, ``w·P``.
- **Core regions.** Scores, int32 counts for the ladder and fp32 sums, ``(4·k + 4)·E``, and the indices again.
- **Checkpoints.** Trained state only: fp32 master and two moments, ``12·t``, and int32 indices, in each.
"""

from taso_ds.planning.numbers.model_shape import ModelShape


def disk_bytes(
    shape: ModelShape, *, element: int, edges: int, core_fraction: float, ladder: int, checkpoints: int
) -> dict[str, float]:
    """Return what a run leaves on disk; small JSON files left out.

    Args:
        element: bytes of a trained number.
        edges: ``E``; 0 for what has no regions.
        ladder: ``k``.
        checkpoints: how many are on disk at a time.
    """
    indices = 8.0 * core_fraction * edges
    return {
        "adapter": float(element * (shape.trainable + shape.adapter_dense)) + indices,
        "core regions": 4.0 * (ladder + 1) * edges + indices,
        "checkpoints": (12.0 * shape.trainable + indices / 2) * checkpoints,
    }
