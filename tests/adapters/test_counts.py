"""Trainable parameters of published models, against the paper's 2.06M and against sums by hand.

Models stand on the meta device: only their shapes matter. For one matrix, at p = 0.1 and rank 1:
union = (out + in) + (⌊out/10⌋ + ⌊in/10⌋), intersection = ⌊out/10⌋ + ⌊in/10⌋, LoRA of rank r = r (out + in).
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from taso_ds.adapters.targets import find_targets


@dataclass(frozen=True)
class Published:
    """A published model's sizes and what is expected of it."""

    kind: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    union: int
    lora_1: int
    intersection: int


MODELS = {
    # Per block, out + in: q, o 4096 each; k, v 2048 + 2·128 = 2304 each; gate, up, down 13056 each: 51968.
    # Tenths: q, o 204 + 204; k, v 25 + 204; gate, up, down 1100 + 204: 408·2 + 229·2 + 1304·3 = 5186.
    # × 36 blocks: LoRA r = 1 is 1,870,848, the intersection 186,696 and the union their sum, 2,057,544: the paper's
    # 2.06M. × 32: LoRA r = 32 is 59,867,136, the paper's 59.87M.
    "Qwen2.5-3B": Published(
        "Qwen2", 2048, 11008, 36, 16, 2, 151936, True, union=2_057_544, lora_1=1_870_848, intersection=186_696
    ),
    # q, k, v, o 8192 each; gate, up, down 15104 each: 78080; × 32 = 2,498,560 (× 32 again: 79.95M).
    # Tenths: 4 · (409 + 409) + 3 · (1100 + 409) = 3272 + 4527 = 7799; × 32 = 249,568. Sum 2,748,128 = 2.748M.
    "Llama-2-7B": Published(
        "Llama", 4096, 11008, 32, 32, 32, 32000, False, union=2_748_128, lora_1=2_498_560, intersection=249_568
    ),
    # q, o 8192; k, v 4096 + 1024 = 5120; gate, up, down 4096 + 14336 = 18432: 81920; × 32 = 2,621,440 (83.89M).
    # Tenths: 2 · 818 + 2 · (102 + 409) + 3 · (1433 + 409) = 1636 + 1022 + 5526 = 8184; × 32 = 261,888. Sum 2.883M.
    "Llama-3.1-8B": Published(
        "Llama", 4096, 14336, 32, 32, 8, 128256, False, union=2_883_328, lora_1=2_621_440, intersection=261_888
    ),
    # q, o 7168; k, v 3584 + 512 = 4096; gate, up, down 3584 + 18944 = 22528: 90112; × 28 = 2,523,136 (80.74M).
    # Tenths: 2 · 716 + 2 · (51 + 358) + 3 · (1894 + 358) = 1432 + 818 + 6756 = 9006; × 28 = 252,168. Sum 2.775M.
    "Qwen2.5-7B": Published(
        "Qwen2", 3584, 18944, 28, 28, 4, 152064, False, union=2_775_304, lora_1=2_523_136, intersection=252_168
    ),
}  # fmt: skip
IN_MILLIONS = {  # method section 3: union | LoRA r = 32
    "Qwen2.5-3B": ("2.058", "59.87"),
    "Llama-2-7B": ("2.748", "79.95"),
    "Llama-3.1-8B": ("2.883", "83.89"),
    "Qwen2.5-7B": ("2.775", "80.74"),
}


def on_meta(model: Published) -> nn.Module:
    import transformers

    config_class: Any = getattr(transformers, f"{model.kind}Config")
    config = config_class(
        hidden_size=model.hidden, intermediate_size=model.intermediate, num_hidden_layers=model.layers,
        num_attention_heads=model.heads, num_key_value_heads=model.kv_heads, vocab_size=model.vocabulary,
        tie_word_embeddings=model.tied,
    )  # fmt: skip
    with torch.device("meta"):
        built: nn.Module = getattr(transformers, f"{model.kind}ForCausalLM")(config)
    return built


@pytest.mark.parametrize("name", list(MODELS))
def test_published_counts(name: str) -> None:
    published = MODELS[name]
    targets = find_targets(on_meta(published))
    assert len(targets) == 7 * published.layers

    def total(structure: str) -> int:
        return targets.count(structure, rank=1, core_fraction=0.1)

    lora = targets.edges
    assert total("union") == published.union
    assert total("intersection") == published.intersection
    assert lora == published.lora_1
    assert published.union == published.lora_1 + published.intersection
    union, lora_32 = IN_MILLIONS[name]
    assert f"{total('union') / 1e6:.3f}" == union
    assert f"{32 * lora / 1e6:.2f}" == lora_32
    if name == "Qwen2.5-3B":
        assert 32 * lora == 59_867_136
