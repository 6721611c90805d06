"""``launch/doctor.py`` as a user starts it: the table, the JSON, the exit code, and flags it refuses."""

import json
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, call_main, environment, finish, free_port, start

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

CHECKS = (
    "python", "torch", "deepspeed", "transformers", "peft", "bitsandbytes", "datasets", "safetensors", "accelerator",
    "C++ compiler", "ninja", "libaio", "build folder", "output folder", "output space", "file system", "open files",
    "locked memory", "core files", "shared memory", "master port", "hostname", "interface", "Slurm", "HF Hub",
    "HF cache", "HF cache space",
)  # fmt: skip


def rows(report: str) -> dict[str, dict[str, str]]:
    return {finding["check"]: finding for finding in json.loads(report)["findings"]}


def test_table_and_json_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    finished = call_main("doctor", ["--master_port", str(free_port()), "--json", "doctor.json"])
    report = json.loads(Path("doctor.json").read_text())
    found = rows(Path("doctor.json").read_text())
    assert [check for check in found if check != "build lock"] == [*CHECKS]
    table = dict(zip(found, finished.lines, strict=False))
    for check, line in table.items():
        assert line.startswith(f"{found[check]['status']:<6}{check} ")
        assert found[check]["found"] in line
        assert (f" -> {found[check]['remedy']}" in line) == (found[check]["status"] != "ok")
    counts = report["counts"]
    assert finished.lines[-1] == f"doctor: {counts['ok']} ok, {counts['warn']} warn, {counts['fail']} fail"
    assert report["passed"] == (counts["fail"] == 0)
    assert finished.code == (1 if counts["fail"] else 0)
    assert [path.name for path in tmp_path.iterdir()] == ["doctor.json"]


def test_a_job_that_would_break(tmp_path: Path, llama_folder: Path) -> None:
    """Everything at once, in a process whose files may not grow, with nothing but JSON on stdout."""
    (tmp_path / "hostfile").write_text("127.0.0.1 slots=2\nno-such-node.invalid slots=2\n")
    flags = ["--model_name_or_path", llama_folder, "--output_dir", "runs/new", "--save_total_limit", "3", "--json", "-"]
    flags += ["--hostfile", "hostfile", "--ds_config", "zero3_nvme.json", "--max_seq_length", "64"]
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        process = subprocess.Popen(
            [sys.executable, ROOT / "launch" / "doctor.py", *map(str, flags), "--master_port", str(port)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
            env=environment() | {"NCCL_SOCKET_IFNAME": "=no0"},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
        )  # fmt: skip
        finished = finish(process)
    assert finished.code == 1, finished.err
    found = rows(finished.out)
    for check in ("master port", "hosts resolve", "output folder", "output space", "NVMe folder", "interface"):
        assert found[check]["status"] == "fail", found[check]
    assert found["model"]["status"] == "ok"
    assert "but no file may exceed 10.0 kB" in found["output space"]["found"]
    assert found["NVMe folder"]["remedy"] == "pass --nvme_path FOLDER"
    assert "2 ranks need 138 MB" in found["shared memory"]["found"]  # 66 MiB each
    assert [path.name for path in tmp_path.iterdir()] == ["hostfile"]


def test_planned_checkpoints(tmp_path: Path, llama_folder: Path) -> None:
    """Trained numbers × 12 bytes × checkpoints, one more while it is written, counted as a run counts them."""
    flags: list[str | Path] = ["--model_name_or_path", llama_folder, "--output_dir", tmp_path / "run"]
    flags += ["--max_seq_length", "64"]
    dry = ["--task", "sst2", "--dry_run", "--max_steps", "1", "--method", "lora", *flags]
    printed = next(line for line in call_main("train", dry).succeeded().lines if line.startswith("parameters: "))
    trained = int(printed.split()[1].replace(",", ""))
    flags += ["--method", "lora"]  # no indices
    done = call_main("doctor", [*flags, "--save_total_limit", "999", "--json", "-"])
    assert f"checkpoints {12 * trained * 1000 / 1e6:.1f} MB" in rows(done.out)["output space"]["found"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--hostfil hosts", "unknown flag '--hostfil'"),
        ("--master_port 0", "master_port: 0 is not in [1, 65535]"),
        ("--master_port http", "invalid int value"),
        ("--ds_config zeroo3.json", "nearest: 'zero3.json'"),
        ("--rank 0", "rank: 0 is not a positive number"),
        ("--json /proc/doctor.json", "json: cannot write /proc/doctor.json"),
    ],
)
def test_bad_flags(flags: str, words: str) -> None:
    finished = call_main("doctor", flags.split())
    assert finished.code == 2
    (line,) = finished.errors
    assert words in line


def test_a_hostfile_that_is_not_there_and_a_model_that_is_not_there(tmp_path: Path) -> None:
    flags = ["--hostfile", str(tmp_path / "hosts"), "--model_name_or_path", str(tmp_path / "model"), "--json", "-"]
    finished = call_main("doctor", [*flags, "--master_port", str(free_port())])
    assert finished.code == 1
    found = rows(finished.out)
    assert (found["hostfile"]["status"], found["model"]["status"]) == ("fail", "fail")
    assert str(tmp_path / "hosts") in found["hostfile"]["found"]


def test_help_needs_no_torch(tmp_path: Path) -> None:
    finished = start("doctor", ["--help"], cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1").succeeded()
    assert "--hostfile" in finished.out
    loaded = {line.split("|")[-1].strip() for line in finished.err.splitlines() if line.startswith("import time:")}
    assert "taso_ds.doctor.arguments" in loaded
    assert not {"torch", "transformers", "deepspeed", "numpy"} & loaded


@pytest.mark.parametrize("error", ["ImportError", "OSError"])
def test_a_torch_that_does_not_load(tmp_path: Path, error: str) -> None:
    """The installation is what is broken: every check that can speak does."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(f"raise {error}('libtorch_cpu.so: cannot open')\n")
    path = f"{tmp_path}:{environment().get('PYTHONPATH', ROOT)}"
    flags = ["--json", "-", "--master_port", str(free_port()), "--model_name_or_path", "any"]
    finished = start("doctor", flags, cwd=tmp_path, PYTHONPATH=path)
    assert finished.code == 1, finished.err
    found = rows(finished.out)
    assert "libtorch_cpu.so: cannot open" in found["accelerator"]["found"]
    assert "libtorch_cpu.so: cannot open" in found["model"]["found"]
    assert found["master port"]["status"] == "ok"


def test_a_hub_model_that_is_only_half_in_the_cache(tmp_path: Path, llama_folder: Path) -> None:
    """Its config.json has been looked at once; a job on a node without network needs the weights too."""
    stored = tmp_path / "hub" / "models--some--llama"
    snapshot = stored / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("0" * 40)
    shutil.copy(llama_folder / "config.json", snapshot)
    flags = ["--model_name_or_path", "some/llama", "--max_seq_length", "64", "--json", "-"]
    flags += ["--master_port", str(free_port())]
    half = start("doctor", flags, cwd=tmp_path, HF_HOME=str(tmp_path))
    assert half.code == 1, half.err
    assert rows(half.out)["model"]["status"] == "ok"
    assert rows(half.out)["model weights"]["status"] == "fail"
    assert rows(half.out)["model weights"]["remedy"].startswith("hf download some/llama")
    (snapshot / "model.safetensors").touch()
    whole = start("doctor", flags, cwd=tmp_path, HF_HOME=str(tmp_path))
    assert rows(whole.out)["model weights"]["status"] == "ok"
