"""Speeds and sizes of the hardware a plan is made for: documented defaults, each of which a flag can replace."""

import dataclasses
from dataclasses import dataclass

from taso_ds.errors import UserError, nearest

GB = 1e9


@dataclass(frozen=True)
class Device:
    """One accelerator, or one CPU rank.

    Attributes:
        memory_gb: usable by one rank.
        tflops: dense bf16 peak of the data sheet; for ``cpu`` what was measured, with ``efficiency`` 1.
        efficiency: share of the peak that a fine-tuning step reaches in its matrix products.
        link_gb_per_s: between the devices of one node, per device and direction.
        host_link_gb_per_s: between a device and its host, per device.
        runtime_gb: what the driver, the libraries and the collective buffers hold beside tensors.
        is_host: the device's memory is the host's, and collectives do not overlap with compute.
    """

    name: str
    memory_gb: float
    tflops: float
    efficiency: float
    link_gb_per_s: float
    host_link_gb_per_s: float
    runtime_gb: float
    is_host: bool = False


# A100: 312 TFLOP/s bf16, NVLink 3 600 GB/s both ways, PCIe 4 x16. H100 SXM: 989 TFLOP/s, NVLink 4 900 GB/s, PCIe 5.
# Links at about 80 % of the data sheet, which is what an all-gather of nccl-tests reaches. Efficiency: Qwen-72B LoRA
# under ZeRO-3 on 4 A100 (Qwen README) is 50 % of the peak, Llama-2-7B on one A100 (LLaMA-Factory) 38 %.
DEVICES = {
    "a100-40": Device("a100-40", 40.0, 312.0, 0.45, 240.0, 20.0, 1.0),
    "a100-80": Device("a100-80", 80.0, 312.0, 0.45, 240.0, 20.0, 1.0),
    "h100": Device("h100", 80.0, 989.0, 0.40, 360.0, 40.0, 1.0),
    "cpu": Device("cpu", 16.0, 0.05, 1.0, 2.0, 10.0, 0.0, is_host=True),
}


@dataclass(frozen=True)
class Network:
    """What connects the nodes: bytes per second into and out of one node, and the wait before the first byte."""

    name: str
    gb_per_s: float
    latency_s: float


# ib-400 and ib-200: one adapter per GPU, eight in a node, as in DGX nodes, at 80 %. ib-100 and ethernet: one per node;
# TCP reaches about 70 % of an Ethernet.
NETWORKS = {
    "ib-400": Network("ib-400", 8 * 50.0 * 0.8, 2e-5),
    "ib-200": Network("ib-200", 8 * 25.0 * 0.8, 2e-5),
    "ib-100": Network("ib-100", 12.5 * 0.8, 2e-5),
    "ethernet-100": Network("ethernet-100", 12.5 * 0.7, 1e-4),
    "ethernet-25": Network("ethernet-25", 3.125 * 0.7, 1e-4),
    "ethernet-10": Network("ethernet-10", 1.25 * 0.7, 1e-4),
}


def get_device(name: str, *, memory_gb: float | None = None, tflops: float | None = None) -> Device:
    """Return a device of the table; ``tflops`` is a measured throughput and replaces peak and efficiency."""
    if name not in DEVICES:
        raise UserError(f"device: {name!r} is not one of {', '.join(DEVICES)}{nearest(name, list(DEVICES))}")
    device = DEVICES[name]
    if memory_gb is not None:
        device = dataclasses.replace(device, memory_gb=memory_gb)
    if tflops is not None:
        device = dataclasses.replace(device, tflops=tflops, efficiency=1.0)
    return device


def get_network(name: str, *, gb_per_s: float | None = None) -> Network:
    if name not in NETWORKS:
        raise UserError(f"network: {name!r} is not one of {', '.join(NETWORKS)}{nearest(name, list(NETWORKS))}")
    network = NETWORKS[name]
    return network if gb_per_s is None else dataclasses.replace(network, gb_per_s=gb_per_s)
