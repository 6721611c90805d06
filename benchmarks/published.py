"""Figures that others published for their own trainers, and what the plan predicts for the same runs.

Gradient checkpointing is each recipe's default unless its table says otherwise. The band within which predictions must
stay is a test's (``tests/planning/numbers/test_published.py``); docs/scale.md has the table.
"""

from dataclasses import dataclass, replace
from typing import Any

from taso_ds.config import parse_run_config
from taso_ds.models.spec import BaseSpec
from taso_ds.planning.count_model import count_model
from taso_ds.planning.numbers.devices import get_device, get_network
from taso_ds.planning.numbers.memory import phase_usage
from taso_ds.planning.numbers.model_shape import ModelShape
from taso_ds.planning.numbers.speed import step_seconds
from taso_ds.planning.numbers.strategy import Strategy, Workload

GIB = 2**30 / 1e9


@dataclass(frozen=True)
class Published:
    """A published measurement.

    Attributes:
        memory_gb: per device, in 1e9 bytes; None where not given.
        tokens_per_s: per device; None where not given.
        fp8: whether products are in 8-bit floats, which a plan does not know.
    """

    what: str
    shape: dict[str, Any]
    strategy: Strategy
    work: Workload
    device: str
    memory_gb: float | None
    tokens_per_s: float | None
    source: str
    fp8: bool = False


@dataclass(frozen=True)
class Comparison:
    """One published row beside its prediction."""

    entry: Published
    memory_gb: float
    tokens_per_s: float

    @property
    def name(self) -> str:
        entry = self.entry
        return f"{entry.what}, {entry.work.world_size}×{entry.device} ({entry.source})"

    @property
    def memory_deviation(self) -> float | None:
        published = self.entry.memory_gb
        return None if published is None else self.memory_gb / published - 1.0

    @property
    def speed_deviation(self) -> float | None:
        published = self.entry.tokens_per_s
        return None if published is None else self.tokens_per_s / published - 1.0

    def as_json(self) -> dict[str, Any]:
        return {
            "what": self.name,
            "memory_gb": self.memory_gb,
            "memory_published_gb": self.entry.memory_gb,
            "tokens_per_s": self.tokens_per_s,
            "tokens_per_s_published": self.entry.tokens_per_s,
        }


def _llama(hidden: int, layers: int, feed_forward: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": feed_forward, "vocab_size": vocabulary,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }  # fmt: skip


_7B = _llama(4096, 32, 11008, 32, 32, 32_000)
_13B = _llama(5120, 40, 13824, 40, 40, 32_000)
_70B = _llama(8192, 80, 28672, 64, 8, 32_000)
_70B_3 = _llama(8192, 80, 28672, 64, 8, 128_256)
_72B = _llama(8192, 80, 24576, 64, 64, 152_064)
_72B_2 = _llama(8192, 80, 29568, 64, 8, 152_064)
_WHOLE, _SHARDED = Strategy(0, gradient_checkpointing=True), Strategy(3, gradient_checkpointing=True)
_PLAIN = Strategy(0)


def _work(gpus: int, rows: int, length: int) -> Workload:
    return Workload(gpus_per_node=gpus, micro_batch_size=rows, max_seq_length=length, scores=False)


def _nf4(strategy: Strategy) -> Strategy:
    return replace(strategy, bits=4)


# litgpt's rows are as long as the longest of Alpaca, 1304 tokens of Llama 2; its times are of shorter ones. FSDP of
# fsdp_qlora is planned as ZeRO-3, one row per device; torchtune's README names a batch of 2 in total tokens per second.
PUBLISHED = (
    Published("Llama-2-7B LoRA", _7B, _WHOLE, _work(1, 4, 1024), "a100-80", 17.0, 2954.0, "LLaMA-Factory wiki"),
    Published("Llama-2-7B LoRA, 4-bit", _7B, _nf4(_WHOLE), _work(1, 4, 1024), "a100-80", 9.0, 2415.0,
              "LLaMA-Factory wiki"),
    Published("Llama-2-7B LoRA, mb 1", _7B, _PLAIN, _work(1, 1, 1304), "a100-40", 21.3, None, "litgpt"),
    Published("Llama-2-7B LoRA, NF4, mb 1", _7B, _nf4(_PLAIN), _work(1, 1, 1304), "a100-40", 13.8, None, "litgpt"),
    Published("Llama-2-13B LoRA, mb 1", _13B, _PLAIN, _work(1, 1, 1304), "a100-40", 38.1, None, "litgpt"),
    Published("Llama-2-13B LoRA, NF4, mb 1", _13B, _nf4(_PLAIN), _work(1, 1, 1304), "a100-40", 22.6, None, "litgpt"),
    Published("Llama-2-70B LoRA ZeRO-3, bs 8", _70B, _SHARDED, _work(8, 8, 2048), "h100", 64.0, None, "PEFT docs"),
    Published("Llama-2-70B QLoRA ZeRO-3, bs 2", _70B, _nf4(_SHARDED), _work(2, 2, 2048), "a100-40", 36.6, None,
              "PEFT docs"),
    Published("Llama-2-70B QLoRA FSDP", _70B, _nf4(_SHARDED), _work(8, 1, 2048), "a100-40", None, 390.0, "fsdp_qlora"),
    Published("Llama-2-70B QLoRA FSDP", _70B, _nf4(_SHARDED), _work(4, 1, 2048), "h100", None, 786.0, "fsdp_qlora"),
    Published("Llama-3.1-70B LoRA FSDP, bs 2", _70B_3, _SHARDED, _work(8, 2, 2048), "a100-80", 27.6 * GIB, 3497.0 / 8,
              "torchtune"),
    Published("Qwen-72B LoRA ZeRO-3, 2048", _72B, _SHARDED, _work(4, 1, 2048), "a100-80", 229 / 4, 358.0,
              "Qwen README"),
    Published("Qwen-72B LoRA ZeRO-3, 8192", _72B, _SHARDED, _work(4, 1, 8192), "a100-80", 289 / 4, 406.0,
              "Qwen README"),
    Published("Qwen-72B QLoRA int4, 2048", _72B, _nf4(_WHOLE), _work(1, 1, 2048), "a100-80", 64.0, 275.0,
              "Qwen README"),
    Published("Qwen2-72B LoRA ZeRO-3, 8000", _72B_2, _SHARDED, _work(8, 1, 8000), "a100-80", None, 0.394 * 8000 / 8,
              "DeepSpeed#6507"),
    Published("Llama-2-7B LoRA, FP8, 4096", _7B, _PLAIN, _work(8, 1, 4096), "h100", None, 24_824.0, "NeMo 24.12",
              fp8=True),
    Published("Llama-2-13B LoRA, FP8, 4096", _13B, _PLAIN, _work(8, 1, 4096), "h100", None, 14_629.0, "NeMo 24.12",
              fp8=True),
    Published("Llama-2-70B LoRA, FP8, 4096", _70B, _SHARDED, _work(8, 1, 4096), "h100", None, 2_621.0, "NeMo 24.12",
              fp8=True),
)  # fmt: skip


def count_llama(values: dict[str, Any]) -> ModelShape:
    """Count a Llama of these sizes with adapters on all its linears."""
    from transformers import LlamaConfig

    config = parse_run_config(["--model_name_or_path", "llama", "--task", "completion"])
    base = BaseSpec(config.model, "llama", LlamaConfig(**values, architectures=["LlamaForCausalLM"]), head=False)
    return count_model(config, base, base.targets(config.adapter.target_modules, experts=config.adapter.adapt_experts))


def compare_published() -> list[Comparison]:
    """Predict every published row."""
    shapes: dict[str, ModelShape] = {}
    found = []
    for entry in PUBLISHED:
        key = str(entry.shape)
        shape = shapes[key] if key in shapes else shapes.setdefault(key, count_llama(entry.shape))
        device = get_device(entry.device)
        step = step_seconds(shape, entry.strategy, entry.work, device, get_network("ib-400")).total
        speed = entry.work.micro_batch_size * entry.work.max_seq_length / step
        found.append(Comparison(entry, _peak_gb(shape, entry), speed))
    return found


def _peak_gb(shape: ModelShape, entry: Published) -> float:
    """Predict the peak of somebody else's trainer, whose loss holds the logits of all positions at once.

    Of each there are two bytes as computed, four in fp32 and four of their gradient.
    """
    phases = phase_usage(shape, entry.strategy, entry.work, get_device(entry.device))
    logits = 10.0 * shape.vocabulary * entry.work.micro_batch_size * entry.work.max_seq_length
    phases["train"] = replace(phases["train"], device={**phases["train"].device, "loss": logits})
    return max(usage.device_bytes for usage in phases.values()) / 1e9


def in_words(predicted: float, published: float | None) -> str:
    """Return a prediction, and where there is one the published figure and the deviation."""
    if published is None:
        return f"{predicted:,.1f}"
    return f"{predicted:,.1f} / {published:,.1f} {predicted / published - 1:+.0%}"
