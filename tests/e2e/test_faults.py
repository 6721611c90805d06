"""Ranks killed at random points of real runs, as many as a test run can afford; ``benchmarks/faults.py`` takes more."""

import json
import subprocess
import sys

import pytest
from launching import ROOT, environment

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

FAULTS = 7


def test_every_run_recovers_bit_by_bit() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "faults.py"), "--n", str(FAULTS), "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=850)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["injected"], found["recovered_identical"], found["hung"]) == (FAULTS, FAULTS, 0)
    assert found["slowest_end_s"] <= 30.0
