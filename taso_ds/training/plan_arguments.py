"""The flags of ``launch/plan.py``: the hardware to plan for."""

from collections.abc import Sequence
from dataclasses import dataclass

from taso_ds.config import GROUPS, RunConfig
from taso_ds.errors import UserError
from taso_ds.flags import arg, parse_groups
from taso_ds.planning.devices import DEVICES, NETWORKS, get_device, get_network


@dataclass(frozen=True)
class PlanArguments:
    """The hardware to plan for. Every flag of ``launch/train.py`` is understood beside these."""

    device: str = arg("a100-80", f"One of {', '.join(DEVICES)}.")
    device_memory_gb: float | None = arg(None, "Memory of one device; default: the device's own.")
    device_tflops: float | None = arg(None, "Measured throughput of one device, instead of peak times efficiency.")
    host_memory_gb: float = arg(1000.0, "Memory of one node.")
    nodes: int = arg(1, "Number of nodes.")
    gpus_per_node: int = arg(8, "Devices of a node, one rank each.")
    network: str = arg("ib-400", f"Between nodes: one of {', '.join(NETWORKS)}.")
    network_gb_per_s: float | None = arg(None, "Measured all-gather bandwidth of one node, instead of the network's.")
    supervised_share: float = arg(1.0, "Share of the tokens that are supervised, where logits are computed.")
    json: str | None = arg(None, "Write all strategies as JSON to this file.")
    plot: str | None = arg(None, "Draw step time against nodes into this PNG.")

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "host_memory_gb", "device_memory_gb", "device_tflops"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"{name}: {value!r} is not positive and finite")
        if not 0.0 < self.supervised_share <= 1.0:
            raise UserError(f"supervised_share: {self.supervised_share!r} is not in (0, 1]")
        get_device(self.device)
        get_network(self.network)


def parse_plan(argv: Sequence[str] | None = None, *, description: str = "") -> tuple[RunConfig, PlanArguments]:
    """Parse a run's flags and the hardware's.

    Raises:
        UserError: unknown flag, or a value that cannot work.
    """
    *groups, plan = parse_groups((*GROUPS, PlanArguments), argv, description=description)
    return RunConfig(*groups), plan
