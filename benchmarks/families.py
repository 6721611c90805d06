"""The families of transformers' models, each as a tiny model with random weights: nothing is downloaded.

A family is a model type; its configuration is that of its class with every size it knows replaced by a small one. So a
line here says only what a family wants otherwise. Weights are initialised far wider than those of real models, so that
gradients reach every matrix with some strength.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shapes import byte_tokenizer

VOCABULARY = 320
# Of the vocabulary, for models that put images and the like into their text.
_PLACEHOLDER = VOCABULARY - 1

# What configurations call their sizes, and what these are here.
_SIZES: dict[int, str] = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input unpadded_vocab_size",
    128: "max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length",
    64: "lru_width",
    48: "intermediate_size ffn_dim ffn_hidden_size n_inner dff hidden_dim d_ff decoder_ffn_dim encoder_ffn_dim d_inner"
    " dense_intermediate_size intermediate_size_mlp shared_intermediate_size",
    32: "hidden_size d_model n_embd dim emb_dim word_embed_proj_dim embedding_size embedding_dim pooler_hidden_size"
    " input_embedding_size output_embedding_size moe_intermediate_size shared_expert_intermediate_size"
    " moe_shared_expert_intermediate_size expert_ffn_hidden_size image_size sliding_window attention_window_size"
    " window_size local_attention attention_chunk_size chunk_size mamba_chunk_size",
    16: "kv_lora_rank q_lora_rank o_lora_rank mamba_d_state ssm_state_size state_size global_head_dim patch_size"
    " true_hidden_size intra_bottleneck_size index_topk",
    8: "head_dim v_head_dim qk_rope_head_dim qk_nope_head_dim linear_key_head_dim linear_value_head_dim mamba_head_dim"
    " index_head_dim kv_channels swa_head_dim swa_v_head_dim d_kv d_head mamba_dt_rank time_step_rank mamba_n_heads"
    " mamba_d_head mamba_num_heads mamba_headdim hidden_size_per_layer_input laurel_rank attention_head_size"
    " adapter_rank",
    4: "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads"
    " num_experts n_routed_experts num_local_experts moe_num_experts linear_num_value_heads index_n_heads rotary_dim"
    " swa_num_attention_heads linear_num_heads zero_expert_num",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_key_value_heads depth"
    " num_experts_per_tok num_experts_per_token linear_num_key_heads moe_topk moe_k num_kv_heads type_vocab_size"
    " swa_num_key_value_heads o_groups",
    1: "n_group topk_group n_groups mamba_n_groups num_expert_group mamba_ngroups",
}  # fmt: skip
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class Family:
    """One row: a model type, and what it wants otherwise than the sizes above.

    Attributes:
        name: the model type, and in brackets what tells several rows of a type apart.
        kind: ``text``, ``encoder`` (a classification head), ``multimodal`` (used with text alone), or ``seq2seq``,
            ``speech`` and ``vision``, which are other models altogether.
    """

    name: str
    changes: dict[str, Any]
    kind: str

    @property
    def model_type(self) -> str:
        return self.name.partition(" ")[0]


def _shrunk(config_class: Any, changes: dict[str, Any]) -> Any:
    default = config_class()
    known = default.to_dict()
    values: dict[str, Any] = {
        name: size for size, names in _SIZES.items() for name in names.split() if isinstance(known.get(name), int)
    }
    values |= {name: 0.0 for name, value in known.items() if "drop" in name and isinstance(value, float)}
    values |= {name: _PLACEHOLDER for name in known if name.endswith(("_token_id", "_token_index"))} | _TOKENS
    if "initializer_range" in known:
        values["initializer_range"] = 0.2
    inner = {name: getattr(default, name, None) for name in config_class.sub_configs}
    values |= {name: _shrunk(type(one), changes.get(name, {})).to_dict() for name, one in inner.items() if one}
    return config_class(**values | {name: value for name, value in changes.items() if name not in inner})


def build(family: Family, *, device: str = "cpu") -> Any:
    """Return the model of a family with random weights."""
    import torch
    from transformers import (
        CONFIG_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        AutoModelForImageTextToText,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
        AutoModelForSpeechSeq2Seq,
    )

    kinds: dict[str, Any] = {
        "text": AutoModelForCausalLM,
        "encoder": AutoModelForSequenceClassification,
        "multimodal": AutoModelForImageTextToText,
        "seq2seq": AutoModelForSeq2SeqLM,
        "speech": AutoModelForSpeechSeq2Seq,
        "vision": AutoModelForImageClassification,
    }
    torch.manual_seed(0)
    with torch.device(device):
        model = kinds[family.kind].from_config(_shrunk(CONFIG_MAPPING[family.model_type], family.changes)).eval()
    for parameter in model.parameters():
        if device != "meta" and not parameter.any():  # as biases start, and scales behind which no gradient would reach
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def write(family: Family, folder: Path) -> Path:
    """Write a family's model and a byte tokenizer as ``from_pretrained`` wants them."""
    build(family).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


_MLA = {"num_key_value_heads": 4}
_LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention"]}
_BLOCKS: dict[str, Any] = {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2}

_DENSE: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "ministral": {"head_dim": 8},
    "ministral3": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0], "intermediate_size": [48, 48, 64, 64],
    },
    "gemma4_text": {"global_head_dim": 16},
    "vaultgemma": {},
    "phi": {},
    "phi3": {},
    "opt": {},
    "gpt2": {},
    "openai-gpt": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gpt_neox": {},
    "gpt_neox_japanese": {},
    "gptj": {},
    "codegen": {},
    "bloom": {},
    "falcon": {},
    "falcon (40B)": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "mpt": {},
    "stablelm": {},
    "starcoder2": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "cohere": {},
    "cohere2": {},
    "granite": {},
    "granite_swa": {},
    "glm": {},
    "glm4": {},
    "internlm3": {},
    "smollm3": {},
    "exaone4": {},
    "ernie4_5": {},
    "hunyuan_v1_dense": {"head_dim": 8},
    "seed_oss": {},
    "nemotron": {"num_key_value_heads": 2},
    "persimmon": {},
    "biogpt": {},
    "xglm": {},
    "ctrl": {},
    "apertus": {},
    "arcee": {},
    "helium": {},
    "bitnet": {},
    "diffllama": {},
    "minicpm3": _MLA,
    "cwm": {},
    "nanochat": {},
    "youtu": _MLA,
    "jais2": {},
    "hyperclovax": {},
    "iquestcoder": {},
    "doge": {},
    "hrm_text": {},
    "modernbert-decoder": {},
    "xlnet": {},
}  # fmt: skip
_MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "gpt_oss": {},
    "olmoe": {},
    "flex_olmo": {},
    "granitemoe": {},
    "granitemoeshared": {},
    "phimoe": {},
    "jetmoe": {},
    "deepseek_v2": _MLA | {"num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "deepseek_v3": _MLA | {"first_k_dense_replace": 1},
    "deepseek_v32": _MLA,
    "deepseek_v4": {},
    "glm4_moe": {"first_k_dense_replace": 1},
    "glm4_moe_lite": _MLA,
    "glm_moe_dsa": _MLA,
    "llama4_text": {},
    "ernie4_5_moe": {},
    "hunyuan_v1_moe": {"head_dim": 8},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "minimax": {"layer_types": ["linear_attention", "full_attention"]},
    "minimax_m2": {},
    "afmoe": {},
    "exaone_moe": {},
    "longcat_flash": _MLA,
    "aria_text": {},
    "solar_open": {},
    "mimo_v2_flash": {},
    "cohere2_moe": {},
    "laguna": {},
    "hy_v3": {},
}
_STATE_SPACE: dict[str, dict[str, Any]] = {
    "mamba": {},
    "falcon_mamba": {},
    "mamba2": {"num_heads": 8},
    "falcon_h1": {"mamba_d_ssm": 64},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "zamba": _BLOCKS,
    "zamba2": _BLOCKS,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "nemotron_h": {},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "rwkv": {"attention_hidden_size": 32},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "qwen3_next": _LINEAR_AND_FULL,
    "qwen3_5_text": _LINEAR_AND_FULL,
    "qwen3_5_moe_text": _LINEAR_AND_FULL,
    "olmo_hybrid": {},
    "kimi_linear": _MLA | _LINEAR_AND_FULL,
}
_ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {},
    "roberta-prelayernorm": {},
    "xlm-roberta": {},
    "camembert": {},
    "distilbert": {},
    "albert": {},
    "electra": {},
    "deberta": {},
    "deberta-v2": {},
    "mpnet": {},
    "modernbert": {},
    "eurobert": {},
    "nomic_bert": {},
    "gte": {},
    "ernie": {},
    "roformer": {},
    "rembert": {},
    "convbert": {},
    "squeezebert": {},
    "mobilebert": {},
    "megatron-bert": {},
    "big_bird": {"attention_type": "original_full"},
    "longformer": {"attention_window": 8},
    "funnel": {"block_sizes": [1, 1]},
    "fnet": {},
    "xlm": {},
    "esm": {"vocab_size": VOCABULARY},
    "layoutlm": {},
}
_MULTIMODAL: dict[str, dict[str, Any]] = {
    "gemma3": {},
    "llava": {},
    "qwen2_vl": {
        "vision_config": {"embed_dim": 32},
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
    },
    "qwen3_vl": {
        "vision_config": {"out_hidden_size": 32, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    },
    "mistral3": {},
}


def _group(kind: str, table: dict[str, dict[str, Any]]) -> tuple[Family, ...]:
    return tuple(Family(name, changes, kind) for name, changes in table.items())


GROUPS: dict[str, tuple[Family, ...]] = {
    "Dense decoders": _group("text", _DENSE),
    "Mixtures of experts": _group("text", _MIXTURES),
    "State-space, recurrent and hybrid decoders": _group("text", _STATE_SPACE),
    "Encoders, with a classification head": _group("encoder", _ENCODERS),
    "Models of images and text, used with text": _group("multimodal", _MULTIMODAL),
    "Other models": (Family("t5", {}, "seq2seq"), Family("whisper", {}, "speech"), Family("vit", {}, "vision")),
}
FAMILIES = tuple(family for group in GROUPS.values() for family in group)
