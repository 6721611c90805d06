"""The plan against a real run on two ranks: the peak of a run is predicted.

One small size, whose resident memory wanders by some percent from run to run, hence the wide tolerance;
``benchmarks/plan_check.py`` measures more and larger ones, within 10 %.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, environment

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow, pytest.mark.timeout(600)]


def test_predicted_peak_of_a_run(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "plan_check.py"), "--sizes", "0.1b", "--stages", "3"]
    command += ["--length", "64", "--rows", "1", "--tolerance", "0.2", "--folder", str(tmp_path)]
    variables = environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=550)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
