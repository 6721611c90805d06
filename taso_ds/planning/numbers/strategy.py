"""What a plan decides about: how the base is spread and stored, and the work it is for."""

from dataclasses import dataclass, field, replace

# Where ZeRO-3 keeps partitions between uses.
PLACES = ("device", "cpu", "nvme")


@dataclass(frozen=True)
class Limits:
    """What DeepSpeed may keep gathered and reserve, in elements: the resolved ``zero_optimization`` section.

    Attributes:
        nvme_buffer: the largest partition that can be on NVMe.
        nvme_buffers: how many of them are in host memory, reserved.
    """

    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    prefetch_bucket: int = 50_000_000
    reduce_bucket: int = 20_000_000
    nvme_buffer: int = 100_000_000
    nvme_buffers: int = 5

    def packed(self) -> "Limits":
        """Return the limits of ``zero3_nf4.json``: as many weights, four of which are one stored bf16 number."""
        return replace(
            self,
            max_live_parameters=self.max_live_parameters // 4,
            max_reuse_distance=self.max_reuse_distance // 4,
            prefetch_bucket=self.prefetch_bucket // 4,
        )


@dataclass(frozen=True)
class Strategy:
    """How the base is spread and stored.

    Attributes:
        place: at stage 3, where the partitions are between uses.
        bits: 4 (NF4) or 8 (LLM.int8) of a quantized base; 16 for one in the engine's dtype.
        hpz: at stage 3, a second partition of the base inside every node.
        ds_config: the DeepSpeed JSON that says so; None for the shipped one.
    """

    stage: int
    place: str = "device"
    bits: int = 16
    gradient_checkpointing: bool = False
    hpz: bool = False
    limits: Limits = field(default_factory=Limits)
    ds_config: str | None = None

    def __post_init__(self) -> None:
        assert self.stage == 3 or not (self.offloads or self.hpz), self
        assert self.place in PLACES, self
        assert self.bits in (4, 8, 16), self

    @property
    def offloads(self) -> bool:
        return self.place != "device"

    @property
    def quantized(self) -> bool:
        return self.bits < 16

    @property
    def uses(self) -> int:
        """How often a micro-batch uses each weight: forward, backward, and the forward again with checkpointing."""
        return 3 if self.gradient_checkpointing else 2


@dataclass(frozen=True)
class Workload:
    """What is run on how many ranks.

    Attributes:
        supervised_share: the part of the positions that logits are computed at.
        steps: optimizer steps that scoring is weighed against.
    """

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
    proves: bool = True
    steps: int = 1000

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

    @property
    def has_accumulators(self) -> bool:
        """Whether scoring sums over time: a single micro-batch is selected from as it arrives."""
        return self.scoring_batches > 1
