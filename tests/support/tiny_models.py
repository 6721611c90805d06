"""Tiny random models and a tokenizer, made here and now: nothing is downloaded, and a seed decides every number.

Initialised far wider than real models (0.2, not 0.02), so that gradients reach every matrix with some strength.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

VOCABULARY = 320
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")  # ids 0 to 2; then the 256 bytes
LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


_SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BLOCKS: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
# 4 heads share 2 key/value heads, so that k_proj and v_proj are (16, 32).
_DECODER: dict[str, Any] = {
    **_SPECIAL, **_BLOCKS, "vocab_size": VOCABULARY, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "initializer_range": 0.2, "attention_dropout": 0.0,
}  # fmt: skip
_EXPERTS: dict[str, Any] = _DECODER | {"num_experts_per_tok": 2}


def llama(*, tied: bool = False, layers: int = 2, seed: int = 0, **sizes: Any) -> Any:
    """A Llama, of other ``sizes`` where a test names them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = _DECODER | {"intermediate_size": 48, "num_hidden_layers": layers, "tie_word_embeddings": tied} | sizes
    return LlamaForCausalLM(LlamaConfig(**config)).eval()


def mixtral(*, experts: int = 4, seed: int = 0) -> Any:
    """A Mixtral with 4 experts a layer, 2 of them for each token."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    return MixtralForCausalLM(MixtralConfig(**_EXPERTS, intermediate_size=48, num_local_experts=experts)).eval()


def qwen3_moe(*, dense_layers: tuple[int, ...] = (), seed: int = 0) -> Any:
    """A Qwen3-MoE with 4 experts a layer, 2 of them for each token, and no dense layer but those named."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    more = {"num_experts": 4, "head_dim": 8, "mlp_only_layers": list(dense_layers)}
    config = Qwen3MoeConfig(**(_EXPERTS | more), intermediate_size=48, moe_intermediate_size=48)
    return Qwen3MoeForCausalLM(config).eval()


def qwen2_moe(*, seed: int = 0) -> Any:
    """A Qwen2-MoE with 4 experts a layer, 2 of them for each token, and one more that every token passes."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(seed)
    widths = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}
    config = Qwen2MoeConfig(**(_EXPERTS | widths), intermediate_size=48, num_experts=4)
    return Qwen2MoeForCausalLM(config).eval()


def gpt_oss(*, seed: int = 0) -> Any:
    """A gpt-oss: experts stored as (in, out), with biases, gate and up interleaved."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(seed)
    model = GptOssForCausalLM(GptOssConfig(**_EXPERTS, intermediate_size=48, num_local_experts=4, head_dim=8))
    for name, parameter in model.named_parameters():
        if name.endswith("proj_bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def phimoe(*, seed: int = 0) -> Any:
    """A PhiMoE, whose routers are linears that return the experts they chose."""
    from transformers import PhimoeConfig, PhimoeForCausalLM

    torch.manual_seed(seed)
    return PhimoeForCausalLM(PhimoeConfig(**_EXPERTS, intermediate_size=48, num_local_experts=4)).eval()


def gemma3(*, seed: int = 0) -> Any:
    """A Gemma 3 with a vision tower, whose linears have names of the text model's."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(seed)
    sizes = _BLOCKS | {"intermediate_size": 48}
    text = _DECODER | sizes | {"head_dim": 8}
    config = Gemma3Config(
        text_config=text, vision_config=sizes | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4,
        image_token_index=300, boi_token_index=301, eoi_token_index=302,
    )  # fmt: skip
    return Gemma3ForConditionalGeneration(config).eval()


def hrm() -> Any:
    """A model whose checkpoints hold one tensor of each attention, which transformers splits."""
    from transformers import HrmTextConfig, HrmTextForCausalLM

    sizes = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    config = HrmTextConfig(**(_BLOCKS | sizes), vocab_size=33, intermediate_size=16)
    torch.manual_seed(0)
    return HrmTextForCausalLM(config)


def gpt2(*, seed: int = 0) -> Any:
    """A GPT-2, whose linears are ``Conv1D``: fused q, k, v, and weights stored as (in_features, out_features)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        **_SPECIAL, vocab_size=VOCABULARY, n_positions=128, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2,
        resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def opt(*, seed: int = 0) -> Any:
    """An OPT, whose forward passes over its body: it calls the decoder inside it."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(seed)
    config = OPTConfig(
        **_SPECIAL, **_BLOCKS, vocab_size=VOCABULARY, word_embed_proj_dim=32, ffn_dim=48, max_position_embeddings=128,
        init_std=0.2, dropout=0.0,
    )  # fmt: skip
    return OPTForCausalLM(config).eval()


def falcon(*, new: bool = False, seed: int = 0) -> Any:
    """A Falcon as the 7B (one key for all queries) or, ``new``, the 40B: it adds to results of linears in place."""
    from transformers import FalconConfig, FalconForCausalLM

    torch.manual_seed(seed)
    config = FalconConfig(
        **_SPECIAL, **_BLOCKS, vocab_size=VOCABULARY, ffn_hidden_size=48, num_kv_heads=2, new_decoder_architecture=new,
        max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    return FalconForCausalLM(config).eval()


def albert(*, seed: int = 0) -> Any:
    """An ALBERT, without dropout: one block, called three times."""
    from transformers import AlbertConfig, AlbertForMaskedLM

    torch.manual_seed(seed)
    config = AlbertConfig(
        vocab_size=VOCABULARY, embedding_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=128, initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    return AlbertForMaskedLM(config).eval()


def bert(*, num_labels: int = 2, seed: int = 0) -> Any:
    """A BERT with a sequence classification head, without dropout."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        **(_BLOCKS | {"num_labels": num_labels}), vocab_size=VOCABULARY, intermediate_size=48,
        max_position_embeddings=128, initializer_range=0.2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        pad_token_id=0,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def byte_tokenizer(*, types: bool = False) -> Any:
    """A tokenizer of bytes: three special tokens, then one token per byte. ``types`` adds token types (BERT)."""
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: number for number, name in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"] if types else ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_input_names=names
    )


def save(model: Any, folder: Path) -> Path:
    """Write the model and its tokenizer as ``from_pretrained`` wants them."""
    model.save_pretrained(folder)
    byte_tokenizer(types=type(model).__name__.startswith("Bert")).save_pretrained(folder)
    return folder


def token_batch(
    *, rows: int = 3, length: int = 12, prompt: int = 4, seed: int = 0, vocabulary: int = VOCABULARY
) -> dict[str, torch.Tensor]:
    """A language-model batch: random tokens, the first ``prompt`` of each row unsupervised, the last row shorter."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, :prompt] = -100
    mask = torch.ones_like(ids)
    ids[-1, -3:], labels[-1, -3:], mask[-1, -3:] = 0, -100, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
