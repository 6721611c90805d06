"""What takes time: products in two precisions, weights that are expanded, weights that come from elsewhere."""

from dataclasses import replace

import pytest
from counted_models import counted, llama, llama_7b

from taso_ds.planning.numbers.devices import get_device, get_network
from taso_ds.planning.numbers.model_shape import ModelShape
from taso_ds.planning.numbers.speed import (
    StepTime,
    dequantize_seconds,
    fetched_bytes,
    host_seconds,
    step_flops,
    step_seconds,
)
from taso_ds.planning.numbers.strategy import Limits, Strategy, Workload

A100, NETWORK = get_device("a100-80"), get_network("ib-400")


def step(shape: ModelShape, strategy: Strategy, work: Workload) -> StepTime:
    return step_seconds(shape, strategy, work, A100, NETWORK)


@pytest.mark.parametrize("bits", [4, 8])
def test_each_use_of_a_quantized_weight_expands_it(bits: int) -> None:
    shape, work = llama_7b(), Workload(max_seq_length=1024)
    plain, quantized = step(shape, Strategy(0), work), step(shape, Strategy(0, bits=bits), work)
    assert quantized.total - plain.total == pytest.approx(2 * shape.quantized / 193e9)
    again = dequantize_seconds(shape, Strategy(0, bits=bits, gradient_checkpointing=True), A100)
    assert again == pytest.approx(1.5 * quantized.dequantize)


def test_dequantization_is_what_litgpt_measured() -> None:
    """7B on an A100-40, one row, no recomputation: 3.83 min per 1000 in NF4, 2.36 in bf16. And 13B: 6.55, 3.19."""
    from transformers import LlamaConfig

    device = get_device("a100-40")
    assert dequantize_seconds(llama_7b(), Strategy(0, bits=4), device) == pytest.approx(1.47 * 60 / 1000, rel=0.01)
    larger = counted(
        LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40)
    )
    assert dequantize_seconds(larger, Strategy(0, bits=4), device) == pytest.approx(3.36 * 60 / 1000, rel=0.2)


def test_fp32_has_its_own_peak_and_twice_the_bytes() -> None:
    shape, work = llama_7b(), Workload(gpus_per_node=8)
    bf16, fp32 = step(shape, Strategy(3), work), step(shape, Strategy(3), replace(work, bf16=False))
    assert fp32.compute == pytest.approx(bf16.compute * 312.0 / 19.5)
    no_reuse = Strategy(3, limits=Limits(max_reuse_distance=0))
    assert fetched_bytes(shape, no_reuse, 4) == 2 * fetched_bytes(shape, no_reuse)


def test_training_everything_computes_the_weights_gradients() -> None:
    base = counted(llama())
    shape = replace(base, trainable=base.parameters, trains_base=True)
    work = Workload(max_seq_length=16, micro_batch_size=1)
    more = step_flops(shape, work, checkpointing=False) - step_flops(base, work, checkpointing=False)
    assert more == 16 * 2 * (base.active + base.output)


def test_disks_and_host_links_take_their_time() -> None:
    work = Workload(gpus_per_node=4)
    cpu, nvme = Strategy(3, place="cpu"), Strategy(3, place="nvme")
    # each of 4 ranks fetches a quarter, over its own link at 20 GB/s; the disks serve all four at 6 GB/s
    assert host_seconds(cpu, work, A100, fetched=8e9) == pytest.approx(2e9 / 20e9)
    assert host_seconds(nvme, work, A100, fetched=8e9) == pytest.approx(2e9 / 20e9 + 8e9 / 6e9)
    assert host_seconds(Strategy(3), work, A100, fetched=8e9) == 0.0
    for way in (cpu, nvme):
        slow = step(llama_7b(), way, work)
        assert slow.total == pytest.approx(max(slow.compute, slow.gather) + slow.host + slow.reduce)
