"""What a search may choose, what it adds to make scoring fit, and what it says when nothing does."""

from dataclasses import replace

import pytest
from counted_models import llama_7b

from taso_ds.config import GROUPS
from taso_ds.errors import UserError
from taso_ds.flags.flag import flags_of
from taso_ds.planning.arguments import PlanArguments
from taso_ds.planning.numbers.advice import advice
from taso_ds.planning.numbers.command import decided_flags
from taso_ds.planning.numbers.devices import get_device, get_network
from taso_ds.planning.numbers.plan import Hardware, assess
from taso_ds.planning.numbers.report import candidate_table, describe_strategy
from taso_ds.planning.numbers.search import Freedom, assess_scoring, fastest, strategies, variants
from taso_ds.planning.numbers.speed import scoring_seconds, sum_seconds
from taso_ds.planning.numbers.strategy import Limits, Strategy, Workload

ONE = Workload(max_seq_length=512, micro_batch_size=1, calibration_batch_size=1)


def hardware(memory_gb: float, *, reserve: float = 0.0, host_gb: float = 1000.0) -> Hardware:
    return Hardware(get_device("a100-80", memory_gb=memory_gb, reserve=reserve), get_network("ib-400"), host_gb)


def test_scoring_that_does_not_fit_gets_the_cheapest_remedy() -> None:
    """7B on one 24 GB device: 13.5 GB of weights and 25.9 GB of sums."""
    shape, strategy = llama_7b(), Strategy(0)
    plain = assess(shape, strategy, ONE, hardware(24.0))
    assert plain.misfit is not None
    assert (plain.misfit.phase, plain.misfit.largest) == ("score", "accumulators")
    found = assess_scoring(shape, strategy, ONE, hardware(24.0), Freedom())
    assert found.misfit is None
    others = [
        assess(shape, strategy, replace(ONE, calibration_passes=passes, calibration_offload=offload), hardware(24.0))
        for passes in (1, 2, 3, 4, 6, 8, 12, 16)
        for offload in (False, True)
    ]
    fitting = [other.seconds["score"] for other in others if other.misfit is None]
    assert found.seconds["score"] == min(fitting)
    flags = decided_flags(found)
    assert "--calibration_passes" in flags or "--calibration_offload" in flags
    assert "passes" in describe_strategy(found) or "sums-on-host" in describe_strategy(found)


def test_a_small_host_leaves_passes() -> None:
    found = assess_scoring(llama_7b(), Strategy(0), ONE, hardware(24.0, host_gb=20.0), Freedom())
    assert found.misfit is None
    assert found.work.calibration_passes > 1
    assert not found.work.calibration_offload


@pytest.mark.parametrize(
    ("freedom", "work"),
    [
        (Freedom(passes=False), replace(ONE, calibration_passes=2)),
        (Freedom(sums_on_host=False), replace(ONE, calibration_offload=True)),
        (Freedom(passes=False, sums_on_host=False), ONE),
    ],
)
def test_what_the_user_gave_is_kept(freedom: Freedom, work: Workload) -> None:
    for memory_gb in (15.0, 24.0):
        found = assess_scoring(llama_7b(), Strategy(0), work, hardware(memory_gb), freedom)
        if not freedom.passes:
            assert found.work.calibration_passes == work.calibration_passes
        if not freedom.sums_on_host:
            assert found.work.calibration_offload == work.calibration_offload


def test_sums_on_the_host_cost_time_and_passes_cost_backward_passes() -> None:
    shape, device, network = llama_7b(), get_device("a100-80"), get_network("ib-400")
    on_host = replace(ONE, calibration_offload=True)
    # Each gradient in bf16 over the host link at 20 GB/s, and 12 bytes touched at 20 GB/s for each sum.
    expected = shape.targets * (2 / 20e9 + 12 / 20e9)
    assert sum_seconds(shape, on_host, device, network) == pytest.approx(expected)
    assert sum_seconds(shape, ONE, device, network) == 0.0
    times = [
        scoring_seconds(shape, Strategy(0), replace(ONE, calibration_passes=passes), device, network)
        for passes in (1, 2, 4)
    ]
    assert 1.3 * times[0] < times[1] < 2.0 * times[0]  # one whole forward more, half a backward
    assert times[1] < times[2] < 2.0 * times[1]


def test_advice_names_the_largest_term_and_what_helps_against_it() -> None:
    shape = llama_7b()
    fixed = Freedom(bits=(16,), checkpointing=(True,), passes=False, sums_on_host=False)
    sums = assess_scoring(shape, Strategy(0, gradient_checkpointing=True), ONE, hardware(24.0), fixed).misfit
    assert sums is not None
    assert advice(sums) == "most of it accumulators: --calibration_offload cpu or --calibration_passes N"
    weights = assess(shape, Strategy(0), ONE, hardware(8.0)).misfit
    assert weights is not None
    assert "most of it weights: more devices" in advice(weights)
    long = assess(shape, Strategy(0), replace(ONE, max_seq_length=16384, scores=False), hardware(80.0)).misfit
    assert long is not None
    assert "most of it activations: a shorter --max_seq_length" in advice(long)
    host = assess(shape, Strategy(1), replace(ONE, gpus_per_node=8), hardware(80.0, host_gb=50.0)).misfit
    assert host is not None
    assert "most of it checkpoint: --ds_config zero3.json" in advice(host)
    small = Strategy(3, place="nvme", limits=Limits(prefetch_bucket=0, nvme_buffer=1_000_000))
    buffers = assess(shape, small, ONE, hardware(80.0)).misfit
    assert buffers is not None
    assert "131,072,000 numbers, buffer_size is 1,000,000" in buffers.reason
    assert advice(buffers).startswith("a DeepSpeed JSON of your own with a larger buffer_size")


def test_freedom_bounds_the_strategies() -> None:
    work = Workload(nodes=2, gpus_per_node=8)
    bound = strategies(work, limits=Limits(), freedom=Freedom(bits=(8,), checkpointing=(True,)))
    assert {(way.bits, way.gradient_checkpointing) for way in bound} == {(8, True)}
    assert not any(way.place == "nvme" for way in bound)
    disk = [way for way in strategies(work, limits=Limits(), freedom=Freedom(nvme=True)) if way.place == "nvme"]
    assert all(way.limits.prefetch_bucket == 0 for way in disk)
    assert not any(way.hpz for way in strategies(work, limits=Limits(), freedom=Freedom(hpz=False)))
    theirs = Strategy(2, ds_config="mine.json")
    assert variants(theirs, Freedom(bits=(16,))) == [theirs, replace(theirs, gradient_checkpointing=True)]
    assert decided_flags(assess(llama_7b(), theirs, ONE, hardware(80.0)))[:2] == ["--ds_config", "mine.json"]


def test_a_share_of_the_device_is_left_free() -> None:
    shape, strategy = llama_7b(), Strategy(0)
    peak = assess(shape, strategy, ONE, hardware(80.0)).device_bytes / 1e9
    assert assess(shape, strategy, ONE, hardware(1.05 * peak)).misfit is None
    assert assess(shape, strategy, ONE, hardware(1.05 * peak, reserve=0.1)).misfit is not None
    assert assess(shape, strategy, ONE, hardware(1.12 * peak, reserve=0.1)).misfit is None
    assert get_device("a100-80").reserve == 0.2
    assert get_device("cpu").reserve == 0.0


def test_the_table_has_a_column_wide_enough() -> None:
    found = [
        assess_scoring(llama_7b(), way, ONE, hardware(24.0), Freedom()) for way in strategies(ONE, limits=Limits())
    ]
    lines = candidate_table(found)
    start = lines[0].index("device GB")
    assert all(line[: start - 1].strip() and line[start - 1] == " " for line in lines)
    assert fastest(found) is not None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"network_gb_per_s": 0.0}, "network_gb_per_s: 0.0 is not positive"),
        ({"link_gb_per_s": -1.0}, "link_gb_per_s: -1.0 is not positive"),
        ({"host_link_gb_per_s": 0.0}, "host_link_gb_per_s: 0.0 is not positive"),
        ({"nvme_gb_per_s": float("inf")}, "nvme_gb_per_s: inf is not positive and finite"),
        ({"efficiency": 1.5}, r"efficiency: 1.5 is not in \(0, 1\]"),
        ({"reserve": 1.0}, r"reserve: 1.0 is not in \[0, 1\)"),
        ({"nodes": 0}, "nodes: 0 is not positive"),
        ({"device": "a10"}, "device: 'a10' is not one of"),
        ({"efficiency": 0.5, "device_tflops": 100.0}, "drop one of them"),
    ],
)
def test_hardware_that_cannot_be(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PlanArguments(**values)  # type: ignore[arg-type]


def test_flags_replace_the_tables_numbers() -> None:
    found = PlanArguments(
        efficiency=0.3, link_gb_per_s=20.0, host_link_gb_per_s=12.0, nvme_gb_per_s=3.0, network_gb_per_s=1.0,
        reserve=0.2,
    ).hardware()  # fmt: skip
    device = found.device
    assert (device.efficiency, device.link_gb_per_s, device.host_link_gb_per_s) == (0.3, 20.0, 12.0)
    assert (device.nvme_gb_per_s, device.usable_bytes, found.network.gb_per_s) == (3.0, 64e9, 1.0)
    assert PlanArguments(device_tflops=100.0).hardware().device.efficiency == 1.0


def test_long_scoring_is_weighed_against_the_steps() -> None:
    """A remedy that scores for minutes does not pay in a run of a few steps."""
    shape, work = llama_7b(), replace(ONE, steps=10)
    found = assess_scoring(shape, Strategy(0), work, hardware(24.0), Freedom())
    assert found.step_and_scoring == pytest.approx(found.step.total + found.seconds["score"] / 10)
    quick = replace(
        found, seconds={**found.seconds, "score": 0.0}, step=replace(found.step, total=2 * found.step.total)
    )
    assert fastest([found, quick]) is quick
    many = [replace(one, work=replace(one.work, steps=100_000)) for one in (found, quick)]
    assert fastest(many) is many[0]


def test_the_plan_decides_the_flags_that_say_so() -> None:
    planned = {name for name, flag in flags_of(GROUPS).items() if flag.is_planned}
    work = replace(ONE, calibration_passes=2, calibration_offload=True)
    ways = [Strategy(3, bits=bits, gradient_checkpointing=True) for bits in (4, 8)]
    found = [assess(llama_7b(), way, work, hardware(80.0)) for way in ways]
    words = {word for candidate in found for word in decided_flags(candidate) if word.startswith("--")}
    assert words == {f"--{name}" for name in planned}
    assert all(decided_flags(candidate, given=planned) == [] for candidate in found)
