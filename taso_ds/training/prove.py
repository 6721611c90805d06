"""A fresh process that opens an exported adapter with peft alone and compares logits with those of the live model.

Run as ``python -m taso_ds.training.prove SPEC.json``; prints one JSON object. Nothing of this package touches the model
there: the base comes from transformers, the adapter from peft, so what passes here works for anyone.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from taso_ds.adapters.files import writing
from taso_ds.errors import UserError

# Relative error of fp32 logits that are the same sums in another order, layer after layer.
_FP32_ROUNDING = 1e-4
# Relative error of logits after every adapted weight was rounded once more.
MERGE_ROUNDING = {"float32": 1e-4, "bfloat16": 6e-2}
# How many times further apart than two roundings of the same adapter the file and the live model may be.
_ROUNDINGS = 3.0
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK")


@dataclass(frozen=True)
class Proof:
    """What the fresh process found.

    Attributes:
        error: ``‖peft − live‖ / ‖live‖`` of the probe's logits.
        effect: ``‖live − base‖ / ‖live‖``, what the adapter does; 0 would prove an unchanged adapter.
        tolerance: largest error that is rounding: three times the distance between the exported adapter computed in the
            model's dtype and computed in fp32, and at least 1e-4. Thirty layers of bf16 move logits by some percent.
            Experts are merged by peft in every forward: then at least what a merge may differ by.
    """

    error: float
    effect: float
    tolerance: float


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
    adapter: Path,
    *,
    source: str,
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
    """Re-open ``adapter`` in a fresh process and compare.

    Args:
        quantization: what ``BitsAndBytesConfig`` needs to quantize the base as the run did.

    Raises:
        UserError: when the process fails, the logits differ by more than rounding, or the adapter does nothing.
    """
    with writing(Path(tempfile.gettempdir())), tempfile.TemporaryDirectory(prefix="taso_proof_") as folder:
        save_file({str(number): value for number, value in enumerate(live)}, Path(folder) / "live.safetensors")
        spec = Path(folder) / "spec.json"
        spec.write_text(
            json.dumps(
                {
                    "adapter": str(adapter.absolute()), "source": source, "revision": revision,
                    "trust_remote_code": trust_remote_code, "head": head, "num_labels": num_labels, "dtype": dtype,
                    "quantization": quantization, "pad_id": pad_id, "rows": list(rows),
                    "live": str(Path(folder) / "live.safetensors"),
                }
            )
        )  # fmt: skip
        environment = {key: value for key, value in os.environ.items() if key not in _RANK_VARIABLES}
        environment["CUDA_VISIBLE_DEVICES"] = ""
        done = subprocess.run(
            [sys.executable, "-m", "taso_ds.training.prove", str(spec)],
            capture_output=True, text=True, env=environment, check=False,
        )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"export: {adapter} does not open with peft: {last}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    if found["different"]:
        raise UserError(f"export: {adapter}: peft did not take up {found['different'][0]} as it stands in the file")
    merged = MERGE_ROUNDING[dtype] if found["merges"] else _FP32_ROUNDING
    proof = Proof(found["error"], found["effect"], max(merged, _ROUNDINGS * found["rounding"]))
    if not proof.error <= proof.tolerance:
        raise UserError(
            f"export: {adapter} opened with peft differs from the live model by {proof.error:.2e} of its logits,"
            f" more than the rounding of {dtype} ({proof.tolerance:.1e})"
        )
    if proof.effect == 0.0:
        raise UserError(f"export: {adapter} changes nothing: its logits equal the base's")
    return proof


def _main(spec_file: str) -> None:
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

    spec = json.loads(Path(spec_file).read_text())
    options: dict[str, Any] = {
        "dtype": getattr(torch, spec["dtype"]),
        "revision": spec["revision"],
        "trust_remote_code": spec["trust_remote_code"],
    }
    if spec["quantization"]:
        options["quantization_config"] = BitsAndBytesConfig(**spec["quantization"])
    if spec["head"]:
        options |= {"num_labels": spec["num_labels"], "pad_token_id": spec["pad_id"]}
    model_class: Any = AutoModelForSequenceClassification if spec["head"] else AutoModelForCausalLM
    base = model_class.from_pretrained(spec["source"], **options).eval()
    for module in base.modules():
        # bitsandbytes would repack weights for a kernel that rounds more than any other, on some processors only.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    live = [value for _, value in sorted(load_file(spec["live"]).items(), key=lambda item: int(item[0]))]
    before = probe_logits(base, spec["rows"])
    opened = PeftModel.from_pretrained(base, spec["adapter"], autocast_adapter_dtype=False).eval()
    adapted = [parameter for name, parameter in opened.named_parameters() if ".lora_" in name]
    for parameter in adapted:
        parameter.data = parameter.data.to(options["dtype"])  # peft takes fp32 where it sees int8 weights
    stored = load_file(Path(spec["adapter"]) / "adapter_model.safetensors")
    held = get_peft_model_state_dict(opened, save_embedding_layers=False)
    different = [name for name in {*stored, *held} if not _same(stored.get(name), held.get(name))]
    settings: Any = opened.peft_config["default"]
    after = probe_logits(opened, spec["rows"])
    for parameter in adapted:
        parameter.data = parameter.data.float()
    found = {
        "error": relative_distance(after, live),
        "effect": relative_distance(before, live),
        "rounding": relative_distance(probe_logits(opened, spec["rows"]), after),
        "different": sorted(different),
        "merges": bool(settings.target_parameters),
    }
    print(json.dumps(found))


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


if __name__ == "__main__":
    _main(sys.argv[1])
