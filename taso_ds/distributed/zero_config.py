"""What the run tells DeepSpeed, as one value: the resolved dict, and what other rooms ask of it."""

from dataclasses import dataclass
from pathlib import Path

from taso_ds.distributed.ds_config_values import Section, number_of, section_of

# Ways to move partitions that compute with the weights on the way.
_ALTERS_BITS = ("zero_quantized_weights", "use_all_reduce_for_fetch_params")


@dataclass(frozen=True)
class ZeroConfig:
    """A DeepSpeed configuration that leaves nothing open; ``resolve_ds_config`` makes it.

    Attributes:
        raw: the whole dict, for DeepSpeed itself and for the record. Nobody changes it.
    """

    raw: Section

    @property
    def section(self) -> Section:
        """The ``zero_optimization`` section."""
        return section_of(self.raw, "zero_optimization")

    @property
    def stage(self) -> int:
        return number_of(self.section, "stage")

    @property
    def bf16(self) -> bool:
        """Whether the engine computes in bfloat16, with fp32 masters of what is trained."""
        return bool(section_of(self.raw, "bf16")["enabled"])

    @property
    def parameter_place(self) -> str:
        """Where the partitions of parameters rest: ``"none"`` (on the device), ``"cpu"`` or ``"nvme"``."""
        return str(self._offload.get("device", "none")) if self.stage == 3 else "none"

    @property
    def nvme_folder(self) -> Path | None:
        """The folder that parameters are offloaded to; None where no disk is used."""
        return Path(str(self._offload["nvme_path"])) if self.parameter_place == "nvme" else None

    @property
    def has_second_shards(self) -> bool:
        """Whether each node keeps a second copy of the partitions (ZeRO++ hpZ)."""
        return self.stage == 3 and number_of(self.section, "zero_hpz_partition_size", 1) > 1

    @property
    def alters_bits(self) -> str | None:
        """The key by which ZeRO computes with weights as it moves them; None when it moves them as they are."""
        return next((name for name in _ALTERS_BITS if self.section.get(name)), None)

    @property
    def _offload(self) -> Section:
        return section_of(self.section, "offload_param")
