"""The plan's own flags: the hardware to plan for, and what the user has decided about the run."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from taso_ds.config import GROUPS, RunConfig
from taso_ds.errors import UserError
from taso_ds.flags.command_line import given_names, parse_groups
from taso_ds.flags.flag import arg, check_new_file, require
from taso_ds.planning.numbers.devices import DEVICES, NETWORKS, Device, Network, get_device, get_network

if TYPE_CHECKING:
    from taso_ds.planning.numbers.plan import Hardware  # needs torch, and --help does not


def _defaults(attribute: str) -> str:
    return ", ".join(f"{getattr(device, attribute):g} on {name}" for name, device in DEVICES.items())


@dataclass(frozen=True)
class PlanArguments:
    """The hardware to plan for. Every flag of a run is understood beside these."""

    device: str = arg("a100-80", f"One of {', '.join(DEVICES)}.")
    device_memory_gb: float | None = arg(None, "Memory of one device; default: the device's own.", unit="GB")
    reserve: float | None = arg(None, f"Share of it to leave free; default: {_defaults('reserve')}.", unit="share")
    device_tflops: float | None = arg(
        None, "Measured throughput of one device, instead of peak times efficiency.", unit="TFLOPS"
    )
    efficiency: float | None = arg(
        None, f"Achieved share of the peak; default: {_defaults('efficiency')}.", unit="share"
    )
    link_gb_per_s: float | None = arg(
        None, f"Between devices of a node; default: {_defaults('link_gb_per_s')}.", unit="GB/s"
    )
    host_link_gb_per_s: float | None = arg(
        None, f"Device and host; default: {_defaults('host_link_gb_per_s')}.", unit="GB/s"
    )
    nvme_gb_per_s: float | None = arg(
        None, f"Local disks of a node; default: {_defaults('nvme_gb_per_s')}.", unit="GB/s"
    )
    host_memory_gb: float = arg(1000.0, "Memory of one node.", unit="GB")
    nodes: int = arg(1, "Number of nodes.", unit="nodes")
    gpus_per_node: int = arg(8, "Devices of a node, one rank each.", unit="devices")
    network: str = arg("ib-400", f"Between nodes: one of {', '.join(NETWORKS)}.")
    network_gb_per_s: float | None = arg(
        None, "Measured all-gather bandwidth of one node, instead of the network's.", unit="GB/s"
    )
    supervised_share: float = arg(
        1.0, "Share of the tokens that are supervised, where logits are computed.", unit="share"
    )
    json: str | None = arg(None, "Write all strategies as JSON to this file.", path=True)
    plot: str | None = arg(None, "Draw step time against nodes into this PNG.", path=True)

    def __post_init__(self) -> None:
        for name in (
            *("nodes", "gpus_per_node", "host_memory_gb", "device_memory_gb", "device_tflops", "link_gb_per_s"),
            *("host_link_gb_per_s", "nvme_gb_per_s", "network_gb_per_s"),
        ):
            value = getattr(self, name)
            require(value is None or 0 < value < float("inf"), name, value, "positive and finite")
        for name in ("supervised_share", "efficiency"):
            value = getattr(self, name)
            require(value is None or 0.0 < value <= 1.0, name, value, "in (0, 1]")
        require(self.reserve is None or 0.0 <= self.reserve < 1.0, "reserve", self.reserve, "in [0, 1)")
        if self.device_tflops is not None and self.efficiency is not None:
            raise UserError("efficiency: device_tflops is what was measured, and needs none; drop one of them")
        check_new_file("json", self.json)
        check_new_file("plot", self.plot)
        self.hardware()

    def hardware(self) -> "Hardware":
        """Return what the run gets: the tables' numbers, and those given in their place."""
        from taso_ds.planning.numbers.plan import Hardware

        device: Device = get_device(
            self.device,
            tflops=self.device_tflops,
            memory_gb=self.device_memory_gb,
            reserve=self.reserve,
            efficiency=self.efficiency,
            link_gb_per_s=self.link_gb_per_s,
            host_link_gb_per_s=self.host_link_gb_per_s,
            nvme_gb_per_s=self.nvme_gb_per_s,
        )
        network: Network = get_network(self.network, gb_per_s=self.network_gb_per_s)
        return Hardware(device, network, self.host_memory_gb)


def parse_plan(
    argv: Sequence[str] | None = None, *, description: str = ""
) -> tuple[RunConfig, PlanArguments, frozenset[str]]:
    """Parse a run's flags and the hardware's; also returns the names of those that were given.

    Raises:
        UserError: unknown flag, or a value that cannot work.
    """
    *groups, plan = parse_groups((*GROUPS, PlanArguments), argv, description=description, own=PlanArguments)
    given = given_names(sys.argv[1:] if argv is None else argv)
    return RunConfig(*groups, given=given), plan, given
