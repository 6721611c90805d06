"""What a plan decides about: how the base is spread and stored, and the work it is for."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Limits:
    """What DeepSpeed may keep gathered and reserve, in elements: the resolved ``zero_optimization`` section."""

    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    prefetch_bucket: int = 50_000_000
    reduce_bucket: int = 20_000_000

    def packed(self) -> "Limits":
        """Return the limits of ``zero3_nf4.json``: as many weights, four of which are one stored bf16 number."""
        return Limits(
            self.max_live_parameters // 4, self.max_reuse_distance // 4, self.prefetch_bucket // 4, self.reduce_bucket
        )


@dataclass(frozen=True)
class Strategy:
    """How the base is spread and stored.

    Attributes:
        offload: at stage 3, keep the partitions (and the optimizer) in host memory.
        hpz: at stage 3, a second partition of the base inside every node.
    """

    stage: int
    offload: bool = False
    load_in_4bit: bool = False
    gradient_checkpointing: bool = False
    hpz: bool = False
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        assert self.stage == 3 or not (self.offload or self.hpz), self


@dataclass(frozen=True)
class Workload:
    """What is run on how many ranks; ``supervised_share`` is the part of the positions that logits are computed at."""

    nodes: int = 1
    gpus_per_node: int = 1
    max_seq_length: int = 512
    micro_batch_size: int = 4
    grad_accum_steps: int = 1
    calibration_samples: int = 128
    calibration_batch_size: int = 4
    calibration_passes: int = 1
    calibration_offload: bool = False
    supervised_share: float = 1.0
    bf16: bool = True
    scores: bool = True

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def element(self) -> int:
        return 2 if self.bf16 else 4

    @property
    def scoring_batches(self) -> int:
        """Scoring micro-batches of one rank."""
        return -(-self.calibration_samples // (self.calibration_batch_size * self.world_size))
