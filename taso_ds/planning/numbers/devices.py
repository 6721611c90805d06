"""Speeds and sizes of the hardware a plan is made for: documented defaults, each of which a flag can replace."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from taso_ds.errors import UserError, nearest

GB = 1e9


@dataclass(frozen=True)
class Device:
    """One accelerator, or one CPU rank.

    Attributes:
        memory_gb: of the device; ``reserve`` is the share of it that a plan leaves free.
        tflops: dense bf16 peak of the data sheet; for ``cpu`` what was measured, with ``efficiency`` 1.
        fp32_tflops: the same in fp32, which torch multiplies without tensor cores unless told otherwise.
        efficiency: share of the peak that a fine-tuning step reaches in its matrix products.
        dequantized_per_s: quantized weights that are expanded to 16 bits in a second, in 1e9.
        link_gb_per_s: between the devices of one node, per device and direction.
        host_link_gb_per_s: between a device and its host, per device.
        nvme_gb_per_s: from a node's local disks to its host.
        runtime_gb: what the driver, the libraries and the collective buffers hold beside tensors.
        is_host: the device's memory is the host's, and collectives do not overlap with compute.
    """

    name: str
    memory_gb: float
    reserve: float
    tflops: float
    fp32_tflops: float
    efficiency: float
    dequantized_per_s: float
    link_gb_per_s: float
    host_link_gb_per_s: float
    nvme_gb_per_s: float
    runtime_gb: float
    is_host: bool = False

    @property
    def usable_bytes(self) -> float:
        """Bytes that a run's tensors may take."""
        return (1.0 - self.reserve) * self.memory_gb * GB


# Reserve: published runs of 70B shapes under ZeRO-3 took up to 23 % more than is predicted, which is what an allocator
# holds and no tensor uses. Peaks and links: data sheets, the table in docs/scale.md has them. A100: 312 TFLOP/s bf16,
# NVLink 3 600 GB/s both ways, PCIe 4 x16. H100 SXM: 989 TFLOP/s, NVLink 4 900 GB/s, PCIe 5. Links at about 80 % of the
# data sheet, which is what an all-gather of nccl-tests reaches; host links at about 65 %, for copies that are not all
# from pinned memory. Efficiency: Qwen-72B LoRA under ZeRO-3 on 4 A100 (Qwen README) is 50 % of the peak, Llama-2-7B on
# one A100 (LLaMA-Factory) 38 %. Dequantization: Llama-2-7B LoRA on an A100-40 takes 88 ms more per micro-batch in NF4
# than in bf16 (litgpt's tables: 3.83 and 2.36 min per 1 000), for two uses of 6.5e9 weights: 147e9 a second, a quarter
# of the memory's speed; the others in proportion to theirs (1 555, 2 039 and 3 350 GB/s).
DEVICES = {
    "a100-40": Device("a100-40", 40.0, 0.2, 312.0, 19.5, 0.45, 147.0, 240.0, 20.0, 6.0, 1.0),
    "a100-80": Device("a100-80", 80.0, 0.2, 312.0, 19.5, 0.45, 193.0, 240.0, 20.0, 6.0, 1.0),
    "h100": Device("h100", 80.0, 0.2, 989.0, 67.0, 0.40, 317.0, 360.0, 40.0, 6.0, 1.0),
    "cpu": Device("cpu", 16.0, 0.0, 0.05, 0.05, 1.0, 1.0, 2.0, 10.0, 2.0, 0.0, is_host=True),
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


def get_device(name: str, *, tflops: float | None = None, **values: float | None) -> Device:
    """Return a device of the table.

    Args:
        tflops: a measured throughput, which replaces peak and efficiency.
        values: replace the attributes of the same name, where they are not None.
    """
    if name not in DEVICES:
        raise UserError(f"device: {name!r} is not one of {', '.join(DEVICES)}{nearest(name, list(DEVICES))}")
    given: dict[str, Any] = {key: value for key, value in values.items() if value is not None}
    if tflops is not None:
        given |= {"tflops": tflops, "fp32_tflops": tflops, "efficiency": 1.0}
    return dataclasses.replace(DEVICES[name], **given)


def get_network(name: str, *, gb_per_s: float | None = None) -> Network:
    """Return a network of the table; ``gb_per_s`` is a measured bandwidth."""
    if name not in NETWORKS:
        raise UserError(f"network: {name!r} is not one of {', '.join(NETWORKS)}{nearest(name, list(NETWORKS))}")
    network = NETWORKS[name]
    return network if gb_per_s is None else dataclasses.replace(network, gb_per_s=gb_per_s)
