"""A fresh process that opens an export with peft or transformers alone and compares logits with the live model's.

Run as ``python -m taso_ds.methods.prove SPEC.json``; prints one JSON object. Nothing of this package touches the model
there: the base, or the whole model with its tokenizer, comes from transformers, the adapter from peft. So what passes
here works for anyone.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from taso_ds.errors import UserError
from taso_ds.files.atomic import writing

# Relative error of logits that are the same sums in another order, layer after layer: never more in fp32; in bf16 what
# one hidden element does that is rounded to its other neighbour, be it the only one.
_ROUNDING = {"float32": 1e-4, "bfloat16": 2.0**-7}
# Relative error of logits after every adapted weight was rounded once more.
MERGE_ROUNDING = {"float32": 1e-4, "bfloat16": 6e-2}
# How many times further apart than two roundings of the same adapter the file and the live model may be.
_ROUNDINGS = 3.0
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK")


@dataclass(frozen=True)
class Proof:
    """What the fresh process found.

    Attributes:
        error: ``‖opened − live‖ / ‖live‖`` of the probe's logits.
        effect: ``‖live − base‖ / ‖live‖``, what the adapter does; 0 would prove an unchanged adapter. None for a whole
            model, which is opened without its base.
        tolerance: largest error that is rounding: three times the distance between the exported adapter (or model)
            computed in the model's dtype and computed in fp32, and at least 1e-4, in bf16 2⁻⁷. Thirty layers of bf16
            move logits by some percent. PEFT's file has the scaling folded in: at least the rounding of its dtype, of
            the effect.
            Experts are merged by peft in every forward: then at least what a merge may differ by.
    """

    error: float
    effect: float | None
    tolerance: float

    def __str__(self) -> str:
        effect = "" if self.effect is None else f", the adapter moves them by {self.effect:.1e}"
        return f"logits differ by {self.error:.1e} (tolerance {self.tolerance:.1e}){effect}"


def probe_logits(model: nn.Module, rows: Sequence[list[int]]) -> list[Tensor]:
    """Return the logits of each row run alone: fp32, on the CPU; ``(tokens, vocabulary)`` or ``(labels,)``."""
    probed: list[Tensor] = []
    device = next(model.parameters()).device
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row], device=device)).logits[0]
            probed.append(logits.float().cpu())
    return probed


def relative_distance(values: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Return ``‖values − wanted‖ / ‖wanted‖`` over all tensors together."""
    differences = torch.cat([(one - other).flatten() for one, other in zip(values, wanted, strict=True)])
    return float(differences.norm() / torch.cat([value.flatten() for value in wanted]).norm())


@dataclass(frozen=True)
class Export:
    """What was exported, and how anyone would open it.

    Attributes:
        folder: the adapter, or the whole model.
        source: the adapter's base; None where ``folder`` is a whole model.
        head: whether the base ends in a classification head, which has ``num_labels`` outputs.
        dtype: ``float32`` or ``bfloat16``.
        quantization: what ``BitsAndBytesConfig`` needs to quantize the base as the run did.
    """

    folder: str
    source: str | None
    revision: str
    trust_remote_code: bool
    head: bool
    num_labels: int
    dtype: str
    quantization: dict[str, object] | None
    pad_id: int


@dataclass(frozen=True)
class Comparison:
    """What the fresh process says.

    Attributes:
        error: ``‖opened − live‖ / ‖live‖`` of the logits.
        effect: ``‖live − base‖ / ‖live‖``; None for a whole model.
        rounding: distance between the export computed in the model's dtype and in fp32.
        stored_rounding: what rounding the stored tensors to their dtype may move.
        different: tensors that the library did not take up as they stand in the file.
        merges: whether peft merges experts in every forward.
    """

    error: float
    effect: float | None
    rounding: float
    stored_rounding: float
    different: list[str]
    merges: bool

    def tolerance(self, dtype: str) -> float:
        """Return the largest error that is rounding."""
        least = (MERGE_ROUNDING if self.merges else _ROUNDING)[dtype]
        return max(least, _ROUNDINGS * self.rounding, self.stored_rounding)


def prove_export(export: Export, *, rows: Sequence[list[int]], live: Sequence[Tensor]) -> Proof:
    """Re-open an export in a fresh process and compare.

    Args:
        rows: probes, as tokens.
        live: the live model's logits on each of them.

    Raises:
        UserError: when the process fails, the logits differ by more than rounding, or the adapter does nothing.
    """
    folder, source, dtype = export.folder, export.source, export.dtype
    library = "transformers" if source is None else "peft"
    with writing(Path(tempfile.gettempdir())), tempfile.TemporaryDirectory(prefix="taso_proof_") as place:
        spec, stored = Path(place) / "spec.json", Path(place) / "live.safetensors"
        save_file({str(number): value for number, value in enumerate(live)}, stored)
        described = asdict(export) | {"folder": str(Path(folder).absolute())}
        spec.write_text(json.dumps({"export": described, "rows": list(rows), "live": str(stored)}))
        environment = {key: value for key, value in os.environ.items() if key not in _RANK_VARIABLES}
        environment["CUDA_VISIBLE_DEVICES"] = ""
        done = subprocess.run(
            [sys.executable, "-m", "taso_ds.methods.prove", str(spec)],
            capture_output=True, text=True, env=environment, check=False,
        )  # fmt: skip
    if done.returncode:
        raise UserError(f"export: {folder} does not open with {library}: {what_was_raised(done.stderr)}")
    comparison = Comparison(**json.loads(done.stdout.strip().splitlines()[-1]))
    if comparison.different:
        raise UserError(
            f"export: {folder}: {library} did not take up {comparison.different[0]} as it stands in the file"
        )
    proof = Proof(comparison.error, comparison.effect, comparison.tolerance(dtype))
    if not proof.error <= proof.tolerance:
        raise UserError(
            f"export: {folder} opened with {library} differs from the live model by {proof.error:.2e} of its logits,"
            f" more than the rounding of {dtype} ({proof.tolerance:.1e})"
        )
    if proof.effect == 0.0:
        raise UserError(f"export: {folder} changes nothing: its logits equal the base's")
    return proof


def what_was_raised(stderr: str) -> str:
    """Return what the last exception of a traceback said, all its lines."""
    lines = stderr.strip().splitlines() or ["no output"]
    starts = [number for number, line in enumerate(lines) if re.match(r"[A-Za-z_][\w.]*: ", line)]
    return " ".join(lines[starts[-1] :] if starts else lines[-1:])


def _main(spec_file: str) -> None:
    spec = json.loads(Path(spec_file).read_text())
    export, rows = Export(**spec["export"]), spec["rows"]
    live = [value for _, value in sorted(load_file(spec["live"]).items(), key=lambda item: int(item[0]))]
    compare = _open_model if export.source is None else _open_adapter
    print(json.dumps(asdict(compare(export, rows, live))))


def _open_model(export: Export, rows: Sequence[list[int]], live: Sequence[Tensor]) -> Comparison:
    """Compare a whole model, of which transformers is told nothing but its folder; its tokenizer must open too."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(export.folder, trust_remote_code=export.trust_remote_code)
    model, unlike = _from_pretrained(export, export.folder)
    logits = probe_logits(model, rows)
    return Comparison(
        error=relative_distance(logits, live),
        effect=None,
        rounding=relative_distance(probe_logits(model.float(), rows), logits),
        stored_rounding=0.0,
        different=unlike,
        merges=False,
    )


def _open_adapter(export: Export, rows: Sequence[list[int]], live: Sequence[Tensor]) -> Comparison:
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import BitsAndBytesConfig

    assert export.source is not None
    options: dict[str, object] = {"revision": export.revision}
    if export.quantization:
        options["quantization_config"] = BitsAndBytesConfig(**export.quantization)
    if export.head:
        options |= {"num_labels": export.num_labels, "pad_token_id": export.pad_id}
    base, _ = _from_pretrained(export, export.source, **options)
    for module in base.modules():
        # bitsandbytes would repack weights for a kernel that rounds more than any other, on some processors only.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    before = probe_logits(base, rows)
    opened = PeftModel.from_pretrained(base, export.folder, autocast_adapter_dtype=False).eval()
    adapted = [parameter for name, parameter in opened.named_parameters() if ".lora_" in name]
    for parameter in adapted:
        parameter.data = parameter.data.to(getattr(torch, export.dtype))  # peft takes fp32 where it sees int8 weights
    stored = load_file(Path(export.folder) / "adapter_model.safetensors")
    held = get_peft_model_state_dict(opened, save_embedding_layers=False)
    settings: Any = opened.peft_config["default"]
    after = probe_logits(opened, rows)
    for parameter in adapted:
        parameter.data = parameter.data.float()
    effect = relative_distance(before, live)
    return Comparison(
        error=relative_distance(after, live),
        effect=effect,
        rounding=relative_distance(probe_logits(opened, rows), after),
        stored_rounding=effect * max(torch.finfo(tensor.dtype).eps for tensor in stored.values()),
        different=sorted(name for name in {*stored, *held} if not _same(stored.get(name), held.get(name))),
        merges=bool(settings.target_parameters),
    )


def _from_pretrained(export: Export, source: str, **options: object) -> tuple[Any, list[str]]:
    """Return a model, and the names of what its checkpoint and the model do not share."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    model_class: Any = AutoModelForSequenceClassification if export.head else AutoModelForCausalLM
    model, loaded = model_class.from_pretrained(
        source,
        dtype=getattr(torch, export.dtype),
        trust_remote_code=export.trust_remote_code,
        output_loading_info=True,
        **options,
    )
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return model.eval(), sorted(name for kind in kinds for name in loaded[kind])


def _same(stored: Tensor | None, held: Tensor | None) -> bool:
    """Say whether the model holds what the file does, in the model's dtype."""
    return stored is not None and held is not None and torch.equal(stored.to(held.dtype), held)


if __name__ == "__main__":
    _main(sys.argv[1])
