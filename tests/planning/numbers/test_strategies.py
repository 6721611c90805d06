"""The proposal: what fits is proposed, the fastest of it, with a command line that parses."""

import shlex
from dataclasses import replace

import pytest
from counted_models import counted, llama, llama_7b

from taso_ds.config import parse_run_config
from taso_ds.planning.numbers.command import command_line, decided_flags
from taso_ds.planning.numbers.devices import get_device, get_network
from taso_ds.planning.numbers.plan import Hardware, assess, scaling
from taso_ds.planning.numbers.search import fastest, strategies
from taso_ds.planning.numbers.speed import fetched_bytes, gather_seconds, step_flops, step_seconds
from taso_ds.planning.numbers.strategy import Limits, Strategy, Workload


def hardware(memory_gb: float, host_memory_gb: float = 1000.0, network: str = "ib-400") -> Hardware:
    return Hardware(get_device("a100-80", memory_gb=memory_gb), get_network(network), host_memory_gb)


@pytest.mark.parametrize(
    ("memory_gb", "stage", "checkpointing"),
    # Inside a node gathering hides behind compute, recomputing does not: stage 3 comes before checkpointing.
    [(80.0, 1, False), (25.0, 3, False), (14.6, 3, True)],
)
def test_the_less_memory_the_more_is_spread(memory_gb: float, stage: int, checkpointing: bool) -> None:
    work = Workload(gpus_per_node=8, max_seq_length=1024, micro_batch_size=2, calibration_batch_size=2)
    ways = [way for way in strategies(work, limits=Limits()) if not way.quantized]
    best = fastest([assess(llama_7b(), way, work, hardware(memory_gb)) for way in ways])
    assert best is not None
    assert (best.strategy.stage, best.strategy.gradient_checkpointing) == (stage, checkpointing)
    assert best.device_bytes <= 0.8 * memory_gb * 1e9


def test_nothing_fits_is_said() -> None:
    work = Workload(gpus_per_node=8, max_seq_length=1024)
    found = [assess(llama_7b(), way, work, hardware(1.5)) for way in strategies(work, limits=Limits())]
    assert fastest(found) is None
    assert all("GB on the device" in str(one.why_not) for one in found)
    small_host = assess(llama_7b(), Strategy(2), work, hardware(80.0, host_memory_gb=50.0))
    assert "load needs 107.8 GB on the host" in str(small_host.why_not)  # 8 ranks × 13.5 GB


def test_hpz_gathers_inside_the_node() -> None:
    """Across a slow network ZeRO-3 waits for P bytes twice a step; with hpZ a frozen base never crosses it."""
    shape, work = llama_7b(), Workload(nodes=4, gpus_per_node=8, max_seq_length=512, micro_batch_size=1)
    device, network = get_device("a100-80"), get_network("ethernet-25")
    plain, hpz = (step_seconds(shape, way, work, device, network) for way in (Strategy(3), Strategy(3, hpz=True)))
    assert hpz.gather < plain.gather / 20
    one_node = step_seconds(shape, Strategy(3), replace(work, nodes=1), device, network)
    assert hpz.gather == pytest.approx(one_node.gather)
    points = scaling(shape, Strategy(3), work, Hardware(device, network, 1000.0), [1, 2, 4])
    assert points[0].zero3_s == points[0].hpz_s
    assert points[2].zero3_s > 5 * points[2].hpz_s


def test_operations_are_counted_longhand() -> None:
    shape = counted(llama())
    work = Workload(max_seq_length=16, micro_batch_size=1, calibration_batch_size=1, supervised_share=0.5)
    # per token 2A forward + 2A backward, 7·l·a·L attention; the output layer at half of the positions
    expected = 16 * (4 * shape.active + 7 * 2 * 64 * 16) + 4 * 320 * 64 * 8
    assert step_flops(shape, work, checkpointing=False) == expected
    scored = step_flops(shape, work, checkpointing=False, scored=True)
    assert scored == expected + 2 * shape.targets * 16
    again = step_flops(shape, work, checkpointing=True)
    assert again == expected + 16 * (2 * shape.active + 2 * 2 * 64 * 16)


def test_gathers_move_both_passes_less_what_stays() -> None:
    shape = llama_7b()
    assert fetched_bytes(shape, Strategy(3)) == 2 * 2 * shape.parameters - 2 * 0.5e9
    alone = gather_seconds(Strategy(3), Workload(), get_device("a100-80"), get_network("ib-400"), fetched=1e9)
    assert alone == 0.0


def test_the_command_line_parses() -> None:
    work = Workload(nodes=2, gpus_per_node=8)
    best = assess(llama_7b(), Strategy(3, gradient_checkpointing=True), work, hardware(80.0))
    line = command_line(work, "launch/train.py", [*decided_flags(best), "--task", "gsm8k", "--rank", "2"])
    words = shlex.split(line)
    assert words[:6] == ["deepspeed", "--hostfile", "hostfile", "--num_nodes", "2", "--num_gpus"]
    config = parse_run_config(words[words.index("launch/train.py") + 1 :])
    assert (config.run.ds_config, config.training.gradient_checkpointing, config.adapter.rank) == (
        "zero3.json",
        True,
        2,
    )


def test_every_node_reads_the_whole_base_for_its_second_copy() -> None:
    shape, work = llama_7b(), Workload(nodes=4, gpus_per_node=8)
    hardware = Hardware(get_device("a100-80"), get_network("ib-400"), 1000.0)
    once, twice = (assess(shape, Strategy(3, hpz=hpz), work, hardware).seconds["load"] for hpz in (False, True))
    assert twice == pytest.approx(4 * once)
