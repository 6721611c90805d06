"""The process that opens an export as anyone would, with peft or transformers alone, and compares logits.

``prove`` starts it as ``python -m taso_ds.methods.fresh_process SPEC.json``; it prints one JSON object. Nothing of this
package touches the model here: transformers brings the base, or the whole model with its tokenizer, and peft brings the
adapter. What passes here therefore works for anyone.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from taso_ds.methods.probe import MERGE_ROUNDING, ROUNDING, probe_logits, relative_distance

if TYPE_CHECKING:  # transformers loads when the process opens something
    from transformers import PreTrainedModel

# How many times further apart than two roundings of the same adapter the file and the live model may be.
_ROUNDINGS = 3.0


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
        least = (MERGE_ROUNDING if self.merges else ROUNDING)[dtype]
        return max(least, _ROUNDINGS * self.rounding, self.stored_rounding)


def main(spec_file: str) -> None:
    """Open what the file describes, compare, and print a ``Comparison``."""
    spec = json.loads(Path(spec_file).read_text())
    export, rows = Export(**spec["export"]), spec["rows"]
    live = [value for _, value in sorted(load_file(spec["live"]).items(), key=lambda item: int(item[0]))]
    compare = _open_model if export.source is None else _open_adapter
    print(json.dumps(asdict(compare(export, rows, live))))


def _open_model(export: Export, rows: Sequence[list[int]], live: Sequence[Tensor]) -> Comparison:
    """Compare a whole model. Transformers is told its folder and nothing else; the tokenizer must open too."""
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
    """Compare an adapter, which peft puts on a base that transformers loads."""
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict
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
            vars(module).update(support_avx512bf16_for_cpu=False)
    before = probe_logits(base, rows)
    opened = PeftModel.from_pretrained(base, export.folder, autocast_adapter_dtype=False).eval()
    adapted = [parameter for name, parameter in opened.named_parameters() if ".lora_" in name]
    for parameter in adapted:
        parameter.data = parameter.data.to(getattr(torch, export.dtype))  # peft takes fp32 where it sees int8 weights
    stored = load_file(Path(export.folder) / "adapter_model.safetensors")
    held = get_peft_model_state_dict(opened, save_embedding_layers=False)
    settings = opened.peft_config["default"]
    assert isinstance(settings, LoraConfig)
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


def _from_pretrained(export: Export, source: str, **options: object) -> "tuple[PreTrainedModel, list[str]]":
    """Return a model, and the names of the tensors that only the checkpoint or only the model has."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    model_class = AutoModelForSequenceClassification if export.head else AutoModelForCausalLM
    both: object = model_class.from_pretrained(
        source,
        dtype=getattr(torch, export.dtype),
        trust_remote_code=export.trust_remote_code,
        output_loading_info=True,
        **options,
    )
    model, loaded = cast("tuple[PreTrainedModel, Mapping[str, list[str]]]", both)  # which its annotation leaves out
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return model.eval(), sorted(name for kind in kinds for name in loaded[kind])


def _same(stored: Tensor | None, held: Tensor | None) -> bool:
    """Say whether the model holds what the file does, in the model's dtype."""
    return stored is not None and held is not None and torch.equal(stored.to(held.dtype), held)


if __name__ == "__main__":
    main(sys.argv[1])
