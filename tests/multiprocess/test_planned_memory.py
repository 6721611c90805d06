"""The plan against real runs on two ranks: peaks are predicted within 10 %; ``benchmarks/plan_check.py`` has more."""

import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, environment

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where each shape is written once."""
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("flags", [[], ["--load_in_4bit"]], ids=["bf16", "nf4"])
@pytest.mark.parametrize("stage", ["2", "3"])
@pytest.mark.parametrize("size", ["0.1b", "0.4b"])
def test_the_peak_of_a_run_is_predicted(models: Path, size: str, stage: str, flags: list[str]) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "plan_check.py"), "--sizes", size, "--stages", stage, *flags]
    command += ["--tolerance", "0.1", "--folder", str(models)]
    variables = environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=550)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
