"""The plan against what others published: it stays within the bands that docs/scale.md states."""

import re
from pathlib import Path

import pytest
from published import Comparison, compare_published, in_words

from taso_ds.planning.numbers.devices import DEVICES

MEMORY, SPEED = (-0.25, 0.15), (-0.35, 0.35)
DOCS = (Path(__file__).resolve().parents[3] / "docs" / "scale.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def rows() -> list[Comparison]:
    return compare_published()


def test_memory_is_within_the_band(rows: list[Comparison]) -> None:
    deviations = {row.name: row.memory_deviation for row in rows if row.memory_deviation is not None}
    assert len(deviations) == 12
    assert not {name: found for name, found in deviations.items() if not MEMORY[0] <= found <= MEMORY[1]}


def test_speed_is_within_the_band(rows: list[Comparison]) -> None:
    deviations = {
        row.name: row.speed_deviation for row in rows if row.speed_deviation is not None and not row.entry.fp8
    }
    assert len(deviations) == 9
    assert not {name: found for name, found in deviations.items() if not SPEED[0] <= found <= SPEED[1]}


def test_the_documented_table_is_what_is_predicted(rows: list[Comparison]) -> None:
    for row in rows:
        for predicted, published in (
            (row.memory_gb, row.entry.memory_gb),
            (row.tokens_per_s, row.entry.tokens_per_s),
        ):
            if published is not None:
                assert in_words(predicted, published).replace("-", "−") in DOCS, row.name


def test_the_documented_devices_are_the_tables() -> None:
    lines = {match[1]: match[0] for match in re.finditer(r"^\| `([\w-]+)` \|.*$", DOCS, re.MULTILINE)}
    for name, device in DEVICES.items():
        numbers = [float(word) for word in re.findall(r"[\d.]+", lines[name].split("|", 2)[2])]
        assert numbers == [
            device.memory_gb, device.reserve, device.tflops, device.fp32_tflops, device.efficiency,
            device.dequantized_per_s, device.link_gb_per_s, device.host_link_gb_per_s, device.nvme_gb_per_s,
        ]  # fmt: skip
