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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

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


def probe_logits(model: Any, rows: Sequence[list[int]]) -> list[Tensor]:
    """Return the logits of each row run alone: fp32, on the CPU; ``(tokens, vocabulary)`` or ``(labels,)``."""
    found = []
    device = next(model.parameters()).device
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row], device=device)).logits[0]
            found.append(logits.float().cpu())
    return found


def relative_distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Return ``‖found − wanted‖ / ‖wanted‖`` over all tensors together."""
    differences = torch.cat([(one - other).flatten() for one, other in zip(found, wanted, strict=True)])
    return float(differences.norm() / torch.cat([value.flatten() for value in wanted]).norm())


def prove_export(
    folder: Path,
    *,
    source: str | None,
    revision: str,
    trust_remote_code: bool,
    head: bool,
    num_labels: int,
    dtype: str,
    quantization: dict[str, Any] | None,
    pad_id: int,
    rows: Sequence[list[int]],
    live: Sequence[Tensor],
) -> Proof:
    """Re-open an adapter or a model in a fresh process and compare.

    Args:
        source: the adapter's base; None when ``folder`` is a whole model.
        quantization: what ``BitsAndBytesConfig`` needs to quantize the base as the run did.

    Raises:
        UserError: when the process fails, the logits differ by more than rounding, or the adapter does nothing.
    """
    library = "transformers" if source is None else "peft"
    with writing(Path(tempfile.gettempdir())), tempfile.TemporaryDirectory(prefix="taso_proof_") as place:
        save_file({str(number): value for number, value in enumerate(live)}, Path(place) / "live.safetensors")
        spec = Path(place) / "spec.json"
        spec.write_text(
            json.dumps(
                {
                    "folder": str(folder.absolute()), "source": source, "revision": revision,
                    "trust_remote_code": trust_remote_code, "head": head, "num_labels": num_labels, "dtype": dtype,
                    "quantization": quantization, "pad_id": pad_id, "rows": list(rows),
                    "live": str(Path(place) / "live.safetensors"),
                }
            )
        )  # fmt: skip
        environment = {key: value for key, value in os.environ.items() if key not in _RANK_VARIABLES}
        environment["CUDA_VISIBLE_DEVICES"] = ""
        done = subprocess.run(
            [sys.executable, "-m", "taso_ds.methods.prove", str(spec)],
            capture_output=True, text=True, env=environment, check=False,
        )  # fmt: skip
    if done.returncode:
        raise UserError(f"export: {folder} does not open with {library}: {what_was_raised(done.stderr)}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    if found["different"]:
        raise UserError(f"export: {folder}: {library} did not take up {found['different'][0]} as it stands in the file")
    proof = Proof(found["error"], found["effect"], tolerance(found, dtype))
    if not proof.error <= proof.tolerance:
        raise UserError(
            f"export: {folder} opened with {library} differs from the live model by {proof.error:.2e} of its logits,"
            f" more than the rounding of {dtype} ({proof.tolerance:.1e})"
        )
    if proof.effect == 0.0:
        raise UserError(f"export: {folder} changes nothing: its logits equal the base's")
    return proof


def tolerance(found: Mapping[str, Any], dtype: str) -> float:
    """Return the largest error that is rounding, of what the fresh process found."""
    least = (MERGE_ROUNDING if found["merges"] else _ROUNDING)[dtype]
    return max(least, _ROUNDINGS * found["rounding"], found["stored_rounding"])


def what_was_raised(stderr: str) -> str:
    """Return what the last exception of a traceback said, all its lines."""
    lines = stderr.strip().splitlines() or ["no output"]
    starts = [number for number, line in enumerate(lines) if re.match(r"[A-Za-z_][\w.]*: ", line)]
    return " ".join(lines[starts[-1] :] if starts else lines[-1:])


def _main(spec_file: str) -> None:
    spec = json.loads(Path(spec_file).read_text())
    live = [value for _, value in sorted(load_file(spec["live"]).items(), key=lambda item: int(item[0]))]
    print(json.dumps(_open_model(spec, live) if spec["source"] is None else _open_adapter(spec, live)))


def _open_model(spec: dict[str, Any], live: Sequence[Tensor]) -> dict[str, Any]:
    """Compare a whole model, of which transformers is told nothing but its folder; its tokenizer must open too."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(spec["folder"], trust_remote_code=spec["trust_remote_code"])
    model, loaded = _from_pretrained(spec, spec["folder"])
    found = probe_logits(model, spec["rows"])
    return {
        "error": relative_distance(found, live),
        "effect": None,
        "rounding": relative_distance(probe_logits(model.float(), spec["rows"]), found),
        "stored_rounding": 0.0,
        "different": sorted(name for keys in loaded.values() for name in keys),
        "merges": False,
    }


def _open_adapter(spec: dict[str, Any], live: Sequence[Tensor]) -> dict[str, Any]:
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import BitsAndBytesConfig

    options: dict[str, Any] = {"revision": spec["revision"]}
    if spec["quantization"]:
        options["quantization_config"] = BitsAndBytesConfig(**spec["quantization"])
    if spec["head"]:
        options |= {"num_labels": spec["num_labels"], "pad_token_id": spec["pad_id"]}
    base, _ = _from_pretrained(spec, spec["source"], **options)
    for module in base.modules():
        # bitsandbytes would repack weights for a kernel that rounds more than any other, on some processors only.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    before = probe_logits(base, spec["rows"])
    opened = PeftModel.from_pretrained(base, spec["folder"], autocast_adapter_dtype=False).eval()
    adapted = [parameter for name, parameter in opened.named_parameters() if ".lora_" in name]
    for parameter in adapted:
        parameter.data = parameter.data.to(getattr(torch, spec["dtype"]))  # peft takes fp32 where it sees int8 weights
    stored = load_file(Path(spec["folder"]) / "adapter_model.safetensors")
    held = get_peft_model_state_dict(opened, save_embedding_layers=False)
    different = [name for name in {*stored, *held} if not _same(stored.get(name), held.get(name))]
    settings: Any = opened.peft_config["default"]
    after = probe_logits(opened, spec["rows"])
    for parameter in adapted:
        parameter.data = parameter.data.float()
    effect = relative_distance(before, live)
    return {
        "error": relative_distance(after, live),
        "effect": effect,
        "rounding": relative_distance(probe_logits(opened, spec["rows"]), after),
        "stored_rounding": effect * max(torch.finfo(tensor.dtype).eps for tensor in stored.values()),
        "different": sorted(different),
        "merges": bool(settings.target_parameters),
    }


def _from_pretrained(spec: dict[str, Any], source: str, **options: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    model_class: Any = AutoModelForSequenceClassification if spec["head"] else AutoModelForCausalLM
    model, loaded = model_class.from_pretrained(
        source,
        dtype=getattr(torch, spec["dtype"]),
        trust_remote_code=spec["trust_remote_code"],
        output_loading_info=True,
        **options,
    )
    return model.eval(), {name: loaded[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}


def _same(stored: Tensor | None, held: Tensor | None) -> bool:
    """Say whether the model holds what the file does, in the model's dtype."""
    return stored is not None and held is not None and torch.equal(stored.to(held.dtype), held)


if __name__ == "__main__":
    _main(sys.argv[1])
