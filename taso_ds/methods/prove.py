"""The proof of an export: a fresh process opens it without this package, and its logits equal the live model's."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from taso_ds.errors import UserError
from taso_ds.files.atomic import writing
from taso_ds.methods.fresh_process import Comparison, Export

_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK")


@dataclass(frozen=True)
class Proof:
    """What the fresh process found.

    Attributes:
        error: ``‖opened − live‖ / ‖live‖`` of the probe's logits.
        effect: ``‖live − base‖ / ‖live‖``, what the adapter does; 0 would prove an unchanged adapter. None for a whole
            model, which is opened without its base.
        tolerance: the largest error that is rounding. It is three times the distance between the exported adapter (or
            model) computed in the model's dtype and computed in fp32, because thirty layers of bf16 move logits by some
            percent. It is at least 1e-4 (2⁻⁷ in bf16). PEFT's file has the scaling folded in, so it is at least the
            rounding of the file's dtype times the effect. peft merges experts in every forward; with experts it is at
            least what a merge may differ by.
    """

    error: float
    effect: float | None
    tolerance: float

    def __str__(self) -> str:
        effect = "" if self.effect is None else f", the adapter moves them by {self.effect:.1e}"
        return f"logits differ by {self.error:.1e} (tolerance {self.tolerance:.1e}){effect}"


def prove_export(export: Export, *, rows: Sequence[list[int]], live: Sequence[Tensor]) -> Proof:
    """Open an export again in a fresh process and compare its logits with the live model's.

    Args:
        rows: probes, as tokens.
        live: the live model's logits on each of them.

    Raises:
        UserError: when the process fails, the logits differ by more than rounding, or the adapter does nothing.
    """
    done = _open_afresh(export, rows, live)
    folder, library = export.folder, "transformers" if export.source is None else "peft"
    if done.returncode:
        raise UserError(f"export: {folder} does not open with {library}: {what_was_raised(done.stderr)}")
    comparison = Comparison(**json.loads(done.stdout.strip().splitlines()[-1]))
    if comparison.different:
        raise UserError(
            f"export: {folder}: {library} did not take up {comparison.different[0]} as it stands in the file"
        )
    proof = Proof(comparison.error, comparison.effect, comparison.tolerance(export.dtype))
    if not proof.error <= proof.tolerance:
        raise UserError(
            f"export: {folder} opened with {library} differs from the live model by {proof.error:.2e} of its logits,"
            f" more than the rounding of {export.dtype} ({proof.tolerance:.1e})"
        )
    if proof.effect == 0.0:
        raise UserError(f"export: {folder} changes nothing: its logits equal the base's")
    return proof


def _open_afresh(
    export: Export, rows: Sequence[list[int]], live: Sequence[Tensor]
) -> "subprocess.CompletedProcess[str]":
    """Run the fresh process, which prints a ``Comparison``."""
    with writing(Path(tempfile.gettempdir())), tempfile.TemporaryDirectory(prefix="taso_proof_") as place:
        spec, stored = Path(place) / "spec.json", Path(place) / "live.safetensors"
        save_file({str(number): value for number, value in enumerate(live)}, stored)
        described = asdict(export) | {"folder": str(Path(export.folder).absolute())}
        spec.write_text(json.dumps({"export": described, "rows": list(rows), "live": str(stored)}))
        environment = {key: value for key, value in os.environ.items() if key not in _RANK_VARIABLES}
        environment["CUDA_VISIBLE_DEVICES"] = ""
        return subprocess.run(
            [sys.executable, "-m", "taso_ds.methods.fresh_process", str(spec)],
            capture_output=True, text=True, env=environment, check=False,
        )  # fmt: skip


def what_was_raised(stderr: str) -> str:
    """Return what the last exception of a traceback said, all its lines."""
    lines = stderr.strip().splitlines() or ["no output"]
    starts = [number for number, line in enumerate(lines) if re.match(r"[A-Za-z_][\w.]*: ", line)]
    return " ".join(lines[starts[-1] :] if starts else lines[-1:])
