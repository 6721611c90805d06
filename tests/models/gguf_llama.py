"""A tiny Llama in a GGUF file, its matrices in 8 bits (Q8_0: 32 weights share a scale), as llama.cpp writes one."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tiny_models

_IN_BLOCKS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write(path: Path, model: Any) -> None:
    """Write a model of ``tiny_models.llama`` with a byte tokenizer."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, config.vocab_size)
    for name, tensor in model.state_dict().items():
        short, value = name.removesuffix(".weight"), tensor.numpy()
        if short in _OUTSIDE:
            place = _OUTSIDE[short]
        else:
            _, _, number, module = short.split(".", 3)
            place = f"blk.{number}.{_IN_BLOCKS[module]}"
            value = _interleaved(value, module, config)
        if value.ndim == 1:
            writer.add_tensor(f"{place}.weight", value)
        else:
            packed = gguf.quants.quantize(np.ascontiguousarray(value), gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{place}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any, vocabulary: int) -> None:
    tokens = [token for token, _ in sorted(tiny_models.byte_tokenizer().get_vocab().items(), key=lambda item: item[1])]
    tokens.append("ab")
    tokens += [f"<unused{number}>" for number in range(vocabulary - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)


def _interleaved(value: Any, module: str, config: Any) -> Any:
    """llama.cpp rotates neighbouring rows of queries and keys, transformers rows half a head apart."""
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}.get(module)
    if heads is None:
        return value
    return value.reshape(heads, 2, value.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(value.shape)
