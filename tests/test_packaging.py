"""The wheel: what ``pip install`` puts on a machine that has no checkout."""

import json
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "taso_ds", "launch", "ds_configs")
ENTRY_POINTS = {
    "taso": "taso_ds.__main__:main",
    "taso-train": "taso_ds.launch.train:main",
    "taso-calibrate": "taso_ds.launch.calibrate:main",
    "taso-evaluate": "taso_ds.launch.evaluate:main",
    "taso-export": "taso_ds.launch.export:main",
    "taso-plan": "taso_ds.launch.plan:main",
    "taso-doctor": "taso_ds.launch.doctor:main",
    "taso-slurm": "taso_ds.launch.slurm:main",
}

# Runs in an environment with the wheel and nothing else. Resolving a DeepSpeed JSON needs neither torch nor DeepSpeed.
PROBE = """
import importlib.util, json
from importlib.metadata import distribution
from taso_ds.distributed.ds_config import read_ds_config, resolve_ds_config, shipped_ds_configs
run = dict(micro_batch_size=1, grad_accum_steps=1, world_size=1, bf16=True, max_grad_norm=1.0, nvme_path="/disk")
stages = [resolve_ds_config(read_ds_config(file.name), **run).stage
          for file in shipped_ds_configs()]
scripts = {entry.name: entry.value for entry in distribution("taso_ds").entry_points}
missing = [value for value in scripts.values() if importlib.util.find_spec(value.partition(":")[0]) is None]
print(json.dumps({"stages": stages, "scripts": scripts, "missing": missing}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def major_version(tool: str) -> int:
    """Return the installed major version, 0 if there is none; importing setuptools would replace distutils."""
    try:
        return int(version(tool).partition(".")[0])
    except PackageNotFoundError:
        return 0


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build from a copy, so that no build folder is left in the checkout."""
    for tool, oldest in (("pip", 23), ("setuptools", 77)):
        if major_version(tool) < oldest:
            pytest.skip(f"building the wheel offline needs {tool} {oldest} or newer in this environment")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "-w", out)
    log = run(sys.executable, "-m", "pip", "-v", "wheel", *options, ".", cwd=source)
    assert "deprecat" not in log.lower(), log
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"taso_ds"}
    expected = {"taso_ds/constraints.txt"}
    expected |= {f"taso_ds/ds_configs/{path.name}" for path in (ROOT / "ds_configs").glob("*.json")}
    for folder, inside in (("taso_ds", "taso_ds"), ("launch", "taso_ds/launch")):
        modules = [path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.py")]
        expected |= {f"{inside}/{module.as_posix()}" for module in modules}
    assert expected <= set(names), sorted(expected - set(names))


def test_installed_wheel_finds_its_configurations_and_commands(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "bare")
    python = tmp_path / "bare" / "bin" / "python"
    install = ("install", "--no-deps", "--no-index", wheel)
    run(sys.executable, "-m", "pip", "--python", python, *install, cwd=tmp_path)
    found = json.loads(run(python, "-I", "-c", PROBE, cwd=tmp_path))
    assert found == {"stages": [0, 1, 2, 3, 3, 3, 3, 3], "scripts": ENTRY_POINTS, "missing": []}
    for script in ENTRY_POINTS:
        assert (tmp_path / "bare" / "bin" / script).is_file()
    _ask_the_doctor(tmp_path / "bare" / "bin")


def _ask_the_doctor(folder: Path) -> None:
    """Where nothing but the wheel is installed, the doctor still says so, with the versions of the wheel itself."""
    done = subprocess.run([folder / "taso-doctor", "--json", "-"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr[-2000:]
    findings = {finding["check"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert (findings["python"]["status"], "not compared" in findings["python"]["found"]) == ("fail", True)
    assert (findings["torch"]["status"], findings["torch"]["found"]) == ("fail", "not installed")
    assert findings["torch"]["remedy"].startswith("pip install 'torch>=")
    assert findings["accelerator"]["status"] == "fail"
    assert findings["output folder"]["status"] == "ok"
