"""A disk that fills up during a run: one line that names the file, exit code 2, and no file that is half written."""

import json
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from launching import Finished, call_main
from mistakes import GOOD, assert_one_line, unchanged
from safetensors.torch import load_file

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the system refuse every byte of a file beyond ``size``, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A disk of 300 kB; skips where it cannot be mounted."""
    folder = tmp_path_factory.mktemp("disk")
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a disk of its own needs the right to mount one")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def assert_whole(folder: Path) -> None:
    """Every file that is there can be read to its end, and nothing temporary is."""
    for path in folder.rglob("*"):
        assert not path.name.startswith("."), path
        if path.suffix == ".json":
            json.loads(path.read_text())
        if path.suffix == ".jsonl":
            assert [json.loads(line) for line in path.read_text().splitlines()]
            assert path.read_text().endswith("\n")
        if path.suffix == ".safetensors":
            load_file(path)
        if path.suffix == ".png":
            assert path.read_bytes().endswith(b"IEND\xaeB`\x82")


def train(llama_folder: Path, flags: str) -> Finished:
    return call_main("train", f"{GOOD} {flags}".format(llama=llama_folder).split())


@pytest.mark.parametrize(
    ("size", "flags", "file"),
    [
        (500, "", "run.json"),
        (8_000, "", "core_regions.safetensors"),
        (8_000, "--method lora --max_steps 60", "metrics.jsonl"),
        (8_000, "--method lora --rank 16", "checkpoints"),
    ],
)
def test_no_room_for_a_file(size: int, flags: str, file: str, llama_folder: Path, desk: Path) -> None:
    """The process group exists before the limit is set: DeepSpeed's own shared memory counts as a file."""
    call_main("train", f"{GOOD} --dry_run".format(llama=llama_folder).split()).succeeded()
    from taso_ds.distributed import process_group

    process_group.init()
    with largest_file(size):
        finished = train(llama_folder, flags)
    assert_one_line(finished, "cannot write", "run", file)
    assert_whole(desk / "run")
    left = {"run"} if size > 500 else set()  # what stays empty goes
    assert {path.name for path in desk.iterdir()} == {"train.jsonl", "eval.jsonl", *left}


@pytest.mark.parametrize(("size", "file"), [(5_000, "bytes"), (100_000, "run/model")])
def test_no_room_for_a_whole_model(size: int, file: str, llama_folder: Path, desk: Path) -> None:
    """Neither for the copies it is assembled from, nor for the model itself."""
    train(llama_folder, "").succeeded()
    with unchanged(desk), largest_file(size):
        finished = call_main("export", ["--run", "run", "--merge"])
    assert_one_line(finished, file, " room")


def test_no_room_for_a_plan(llama_folder: Path, desk: Path) -> None:
    with largest_file(1000):
        finished = call_main("plan", f"{GOOD} --json plan.json".format(llama=llama_folder).split())
    assert_one_line(finished, "cannot write plan.json")
    assert {path.name for path in desk.iterdir()} == {"train.jsonl", "eval.jsonl"}


@pytest.mark.parametrize("method", ["taso", "full"])
def test_a_disk_that_is_full(method: str, small_disk: Path, llama_folder: Path, desk: Path) -> None:
    """Left on it: a fraction of what the run writes."""
    (small_disk / "others").write_bytes(b"\0" * (290_000 if method == "taso" else 160_000))
    finished = train(llama_folder, f"--method {method} --output_dir {small_disk}/run")
    assert_one_line(finished, str(small_disk / "run"), "No space left on device")
    assert_whole(small_disk)
