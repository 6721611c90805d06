"""Llama shapes of known sizes, written to disk with random weights, one layer per file: nothing is ever held whole."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

# name: hidden size, layers, feed-forward size, attention heads, key/value heads; the vocabulary is 32,000.
SHAPES = {
    "tiny": (32, 2, 48, 4, 2),
    "0.1b": (768, 12, 2048, 12, 12),
    "0.4b": (1024, 24, 2816, 16, 16),
    "1.1b": (2048, 22, 5632, 32, 4),  # TinyLlama
    "3b": (3200, 26, 8640, 32, 32),  # OpenLLaMA 3B
    "7b": (4096, 32, 11008, 32, 32),  # Llama 2 7B
}
VOCABULARY = 32_000


def config_of(size: str) -> dict[str, object]:
    """Return the ``config.json`` of a shape."""
    hidden, layers, feed_forward, heads, kv_heads = SHAPES[size]
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": hidden,
        "intermediate_size": feed_forward, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def tensors_of(size: str) -> list[dict[str, tuple[int, ...]]]:
    """Return the shapes of all tensors, file by file."""
    hidden, layers, feed_forward, heads, kv_heads = SHAPES[size]
    kv = hidden // heads * kv_heads
    files: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (VOCABULARY, hidden)}]
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        files.append(
            {
                f"{prefix}self_attn.q_proj.weight": (hidden, hidden),
                f"{prefix}self_attn.k_proj.weight": (kv, hidden),
                f"{prefix}self_attn.v_proj.weight": (kv, hidden),
                f"{prefix}self_attn.o_proj.weight": (hidden, hidden),
                f"{prefix}mlp.gate_proj.weight": (feed_forward, hidden),
                f"{prefix}mlp.up_proj.weight": (feed_forward, hidden),
                f"{prefix}mlp.down_proj.weight": (hidden, feed_forward),
                f"{prefix}input_layernorm.weight": (hidden,),
                f"{prefix}post_attention_layernorm.weight": (hidden,),
            }
        )
    files.append({"model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)})
    return files


def num_parameters(size: str) -> int:
    return sum(torch.Size(shape).numel() for file in tensors_of(size) for shape in file.values())


def largest_tensor(size: str) -> int:
    return max(torch.Size(shape).numel() for file in tensors_of(size) for shape in file.values())


def write_model(folder: Path, size: str) -> Path:
    """Write a checkpoint in bf16 and a byte tokenizer; a folder that is complete already is left alone."""
    target = folder / f"llama-{size}"
    if (target / "config.json").is_file():
        return target
    target.mkdir(parents=True, exist_ok=True)
    files = tensors_of(size)
    generator, index = torch.Generator().manual_seed(0), {}
    for number, shapes in enumerate(files):
        name = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        tensors = {key: _random(shape, generator) for key, shape in shapes.items()}
        save_file(tensors, target / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
    total = 2 * num_parameters(size)
    (target / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    byte_tokenizer().save_pretrained(target)
    (target / "config.json").write_text(json.dumps(config_of(size), indent=1))
    return target


def read_once(model: Path) -> None:
    """Read all weights from end to end, which brings them into the page cache if they fit."""
    for file in model.glob("*.safetensors"):
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass


def write_rows(path: Path, length: int) -> None:
    """Write rows of exactly ``length`` tokens of the byte tokenizer, half of them supervised."""
    row = {"prompt": "a" * (length // 2), "completion": "b" * (length - length // 2 - 1)}
    path.write_text("\n".join([json.dumps(row)] * 64) + "\n")


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)


def byte_tokenizer():  # type: ignore[no-untyped-def]
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: number for number, name in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
