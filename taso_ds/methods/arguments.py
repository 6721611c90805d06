"""What is trained."""

from dataclasses import dataclass

from taso_ds.adapters.choices import STRUCTURES
from taso_ds.adapters.compensation import parse_rho
from taso_ds.errors import UserError
from taso_ds.flags.flag import arg, is_positive, require, require_one_of
from taso_ds.methods.table import METHODS


@dataclass(frozen=True)
class AdapterArguments:
    """What is trained: TASO's adapters, or a baseline. Method sections 3 and 4."""

    method: str = arg("taso", "taso, or the baselines lora (the peft library) and full.")
    structure: str = arg("union", "union: whole core rows plus whole core columns; intersection: their block only.")
    rank: int = arg(1, "Rank of each branch (of the LoRA with --method lora).")
    alpha: float | None = arg(None, "Scaling is alpha / rank; default: alpha = rank.")
    rho: str = arg("mask", "Pruned share for the learning rate: mask (1 - p), parameters, a number, or off.")
    target_modules: list[str] | None = arg(None, "Names of the linears to adapt; default: all inside the blocks.")
    adapt_experts: bool = arg(False, "Take in the experts that a mixture of experts keeps in fused parameters.")

    def __post_init__(self) -> None:
        require_one_of("method", self.method, list(METHODS))
        require_one_of("structure", self.structure, list(STRUCTURES))
        require(self.rank > 0, "rank", self.rank, "a positive number")
        require(self.alpha is None or is_positive(self.alpha), "alpha", self.alpha, "positive and finite")
        parse_rho(self.rho)
        if self.adapt_experts and not METHODS[self.method]().adapts_experts:
            raise UserError(f"adapt_experts: --method {self.method} does not adapt single experts; drop the flag")

    @property
    def scaling(self) -> float:
        """``s = alpha / rank``."""
        return 1.0 if self.alpha is None else self.alpha / self.rank
