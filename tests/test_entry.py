"""What a launch script sets before torch makes its first tensor."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PROGRAM = """
from taso_ds.entry import run_script

def huge() -> str:
    import torch
    kept = torch.ones(1 << 26, dtype=torch.uint8)
    rollup = open("/proc/self/smaps_rollup").read()
    return rollup.split("AnonHugePages:")[1].split()[0]

run_script(huge)
"""


@pytest.mark.skipif(
    not SETTING.is_file() or "[madvise]" not in SETTING.read_text(), reason="huge pages are not for those who ask"
)
@pytest.mark.parametrize(
    ("given", "at_least", "at_most"), [({}, 1 << 15, 1 << 17), ({"THP_MEM_ALLOC_ENABLE": "0"}, 0, 0)]
)
def test_host_tensors_lie_in_huge_pages_unless_the_user_says_no(
    given: dict[str, str], at_least: int, at_most: int
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"} | given
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    assert at_least <= int(done.stdout.split()[-1]) <= at_most, done.stdout  # kB
