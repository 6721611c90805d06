"""Which base, and how it is loaded."""

from dataclasses import dataclass

from taso_ds.errors import UserError
from taso_ds.flags.flag import SCHEDULE, arg, require_one_of

HEADS = ("auto", "lm", "classification")


@dataclass(frozen=True)
class ModelArguments:
    """The base model: which one, and how it is loaded."""

    model_name_or_path: str | None = arg(
        None, "Folder or Hub id of the base; default: the embedded SmolLM2-135M.", path=True, first=True
    )
    model_revision: str = arg("main", "Hub revision of the base.")
    gguf_file: str | None = arg(None, "GGUF file inside model_name_or_path; dequantized once into the cache.")
    tokenizer_name: str | None = arg(None, "Folder or Hub id of the tokenizer; default: the base's.", path=True)
    head: str = arg("auto", "lm, classification, or auto: a classification head if the base has no LM head.")
    attn_implementation: str | None = arg(
        None, "Attention kernel as transformers names it (sdpa, flash_attention_2).", effect=SCHEDULE
    )
    trust_remote_code: bool = arg(False, "Run model code that comes with the checkpoint.")
    load_in_4bit: bool = arg(
        False, "Quantize the base as it loads: NF4, statistics quantized too (bitsandbytes).", planned=True
    )
    load_in_8bit: bool = arg(False, "Quantize the base as it loads: LLM.int8() (bitsandbytes).", planned=True)
    bf16: bool = arg(True, "Train and score in bfloat16; --no_bf16 for fp32.")
    fp16: bool = arg(False, "Not supported; named here to say so.", hidden=True)

    def __post_init__(self) -> None:
        require_one_of("head", self.head, HEADS)
        if self.load_in_4bit and self.load_in_8bit:
            raise UserError("load_in_4bit and load_in_8bit are both on: pass one of them")
        if self.fp16 and self.bf16:
            raise UserError("fp16 and bf16 are both on: pass --bf16 alone, or --no_bf16 for fp32")
        if self.fp16:
            raise UserError("fp16 is not supported (its loss scaling skips steps): use --bf16, or --no_bf16 for fp32")
