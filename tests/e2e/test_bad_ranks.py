"""Launchers and ranks that do not agree: rank 0 says so in one line, and nobody waits."""

import socket
from collections.abc import Sequence
from pathlib import Path

import launching
import pytest
import torch
from launching import Finished, call_main
from mistakes import GOOD, assert_one_line, unchanged

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ("RANK=0 WORLD_SIZE=two", ("WORLD_SIZE is 'two'", "not a number from 1")),
        ("RANK=0 WORLD_SIZE=0", ("WORLD_SIZE is '0'",)),
        ("RANK=0 WORLD_SIZE=-2", ("WORLD_SIZE is '-2'",)),
        ("WORLD_SIZE=2", ("WORLD_SIZE is set but RANK is not",)),
        ("RANK=zero WORLD_SIZE=1", ("RANK is 'zero'", "from 0 to 0")),
        ("RANK=2 WORLD_SIZE=2", ("RANK is '2'", "from 0 to 1")),
        ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=2", ("LOCAL_RANK is '2'", "from 0 to 1")),
        ("RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=4", ("4 ranks on this node", "more than WORLD_SIZE 2")),
        ("RANK=0 WORLD_SIZE=1 MASTER_PORT=99999", ("MASTER_PORT is '99999'", "65535")),
        ("RANK=0 WORLD_SIZE=1 MASTER_PORT=http", ("MASTER_PORT is 'http'",)),
    ],
)
def test_a_launcher_that_disagrees_with_itself(
    variables: str, words: tuple[str, ...], llama_folder: Path, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = dict(entry.split("=") for entry in variables.split())
    whole = {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"} if "RANK" in given else {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**whole, **given}.items():
        monkeypatch.setenv(name, value)
    for script in ("train", "calibrate"):
        finished = call_main(script, GOOD.format(llama=llama_folder).split())
        assert_one_line(finished, "environment: ", *words, "deepspeed, torchrun or srun")
    assert not (desk / "run").exists()


def test_half_a_launcher(llama_folder: Path, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    finished = call_main("train", GOOD.format(llama=llama_folder).split())
    assert_one_line(finished, "RANK is set but not WORLD_SIZE", "deepspeed, torchrun or srun")


def start_two_ranks(flags: Sequence[str], folders: Sequence[Path], port: int) -> list[Finished]:
    """Start two ranks as a launcher does, but leave each its own terminal."""
    processes = []
    for rank, folder in enumerate(folders):
        ranked = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        ranked |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        words: list[str | Path] = [launching.ROOT / "launch" / "train.py", *flags]
        processes.append(launching.begin(words, cwd=folder, variables=ranked))
    return [launching.finish(process, timeout=120) for process in processes]


def test_a_mistake_only_one_rank_meets_ends_both(
    llama_folder: Path, desk: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Rank 1's node lacks the rows: rank 0 says so, for rank 1, and nobody waits."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    with unchanged(desk, elsewhere):
        first, second = start_two_ranks(
            GOOD.format(llama=llama_folder).split(), [desk, elsewhere], launching.free_port()
        )
    assert_one_line(first, "error: rank 1: train.jsonl", "No such file")
    assert first.err.splitlines() == first.errors
    assert (second.code, second.err) == (2, "")


def test_under_the_deepspeed_launcher(llama_folder: Path, desk: Path) -> None:
    """Only rank 0 looks at the output folder; both leave."""
    (desk / "thesis.tex").write_text("...")
    flags = [*GOOD.format(llama=llama_folder).split(), "--output_dir", "."]
    with unchanged(desk):
        finished = launching.start("train", flags, cwd=desk, launcher="deepspeed", ranks=2)
    assert finished.code == 2
    assert len(finished.errors) == 1
    assert "output_dir: . is not empty and holds no run" in finished.errors[0]
    assert "Traceback" not in finished.out + finished.err


def test_a_port_in_use(llama_folder: Path, desk: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        finished = launching.start(
            "train", GOOD.format(llama=llama_folder).split(), cwd=desk, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0",
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(taken.getsockname()[1]),
        )  # fmt: skip
    assert_one_line(finished, "environment", "address already in use", "--master_port")
    assert finished.err.splitlines() == finished.errors
