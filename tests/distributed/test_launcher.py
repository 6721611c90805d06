"""What is read off the processes above a rank."""

import base64
import json
import socket
import sys
from pathlib import Path

import pytest

from taso_ds.distributed.launcher import Above, check_hosts, own_port, processes_above
from taso_ds.errors import UserError

NODE = Above(4321, ["python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=e30=", "launch/train.py"])


def runner(*words: str) -> Above:
    return Above(4320, ["/usr/bin/python", "/usr/bin/deepspeed", *words])


def test_the_parent_is_seen() -> None:
    above = processes_above()
    assert above[0].pid > 0
    assert above[0].command


@pytest.mark.parametrize("words", [("--hostfile", "no/where"), ("-H", "no/where"), ("--hostfile=no/where",)])
def test_a_hostfile_that_does_not_exist_is_an_error(words: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="--hostfile no/where, which is no file here"):
        check_hosts([NODE, runner(*words, "launch/train.py", "--max_steps", "3")])


def test_a_module_of_that_name_counts_too() -> None:
    command = ["python", "-m", "deepspeed.launcher.runner", "-H", "no/where", "launch/train.py"]
    with pytest.raises(UserError, match="no/where"):
        check_hosts([NODE, Above(1, command)])


def test_what_is_no_mistake_passes(tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("localhost slots=1\n")
    script = ("launch/train.py", "--hostfile", "of/the/script")
    check_hosts([NODE, runner("--hostfile", str(tmp_path / "hostfile"), *script)])
    check_hosts([NODE, runner("--num_gpus", "2", *script)])  # DeepSpeed's own default need not exist
    check_hosts([NODE, Above(1, ["sshd: root@notty"])])
    check_hosts([NODE])
    check_hosts([Above(1, ["bash"]), runner("-H", "no/where", *script)])
    check_hosts([])


def launched_on(*hosts: str) -> list[Above]:
    told = base64.urlsafe_b64encode(json.dumps({host: [0] for host in hosts}).encode()).decode()
    return [Above(4321, [*NODE.command[:4], f"--world_info={told}", "launch/train.py"]), runner("launch/train.py")]


def test_the_only_host_that_was_chosen_is_this_one() -> None:
    check_hosts([NODE])  # of no host
    for here in ("localhost", "127.0.0.1", socket.gethostname()):
        check_hosts(launched_on(here))
    check_hosts(launched_on("node-a.invalid", "node-b.invalid"))  # through ssh, on each of them
    with pytest.raises(UserError, match=r"was to use node-b\.invalid .*; add --force_multi"):
        check_hosts(launched_on("node-b.invalid"))


def test_runs_of_one_node_meet_at_ports_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_SIZE", "2")
    monkeypatch.setenv("MASTER_PORT", "29500")
    port, other = own_port([NODE]), own_port([Above(4322, NODE.command)])
    assert port is not None
    assert other is not None
    assert 10_000 <= int(port) < 30_000
    assert port != other
    assert own_port([Above(1, [sys.executable, "-m", "torch.distributed.run"])]) is None
    monkeypatch.setenv("MASTER_PORT", "29501")  # asked for
    assert own_port([NODE]) is None
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("WORLD_SIZE", "4")  # the other two are on another node and know another launcher
    assert own_port([NODE]) is None
