"""The network: a port that is taken, names that resolve to nothing or to the loopback, interfaces to choose from."""

import socket

import pytest

from taso_ds.doctor import network
from taso_ds.doctor.finding import FAIL, OK, WARN
from taso_ds.doctor.network import check_hostname, check_interfaces, check_port, interfaces


@pytest.fixture(autouse=True)
def _nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)


def test_a_port_that_is_really_taken() -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        taken = check_port(port)
    assert (taken.status, taken.found) == (FAIL, f"{port}: Address already in use")
    assert check_port(port).status == OK


@pytest.mark.parametrize(
    ("name", "backend", "nodes", "chosen", "status"),
    [
        ("192.0.2.7", "gloo", 2, None, OK), ("localhost", "gloo", 1, None, WARN), ("localhost", "gloo", 2, None, FAIL),
        ("localhost", "gloo", 2, "lo", OK), ("localhost", "nccl", 2, None, WARN),
        ("no-such-node.invalid", "gloo", 1, None, WARN), ("no-such-node.invalid", "gloo", 2, None, FAIL),
    ],
)  # fmt: skip
def test_hostname(
    monkeypatch: pytest.MonkeyPatch, name: str, backend: str, nodes: int, chosen: str | None, status: str
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: name)
    if chosen is not None:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", chosen)
    found = check_hostname(backend, nodes=nodes)
    assert found.status == status
    assert name in found.found


def test_real_interfaces_reach_out() -> None:
    found = interfaces()
    assert set(found) <= {name for _, name in socket.if_nameindex()}
    assert "lo" not in found
    assert not any(address.startswith(("127.", "169.254.", "fe80")) for address in found.values())


def test_several_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "interfaces", lambda: {"eth0": "10.0.0.1", "ib0": "10.1.0.1"})
    guess = check_interfaces("nccl")
    assert guess.status == WARN
    assert guess.found == "several: eth0 (10.0.0.1), ib0 (10.1.0.1)"
    assert guess.remedy.startswith("set NCCL_SOCKET_IFNAME")
    assert check_interfaces("gloo").remedy.startswith("set GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert check_interfaces("gloo").status == OK


def test_one_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "interfaces", lambda: {"eth0": "10.0.0.1"})
    assert check_interfaces("gloo").status == OK
    monkeypatch.setattr(network, "interfaces", dict)
    assert check_interfaces("gloo").status == OK


@pytest.mark.parametrize(
    ("variable", "value", "status"),
    [
        ("GLOO_SOCKET_IFNAME", "lo", OK),
        ("GLOO_SOCKET_IFNAME", "no0", FAIL),
        ("GLOO_SOCKET_IFNAME", "^docker", FAIL),  # which gloo takes for a name
        ("NCCL_SOCKET_IFNAME", "^docker,no0", OK),
        ("NCCL_SOCKET_IFNAME", "l", OK),
        ("NCCL_SOCKET_IFNAME", "=lo", OK),
        ("NCCL_SOCKET_IFNAME", "=l", FAIL),
        ("NCCL_SOCKET_IFNAME", "lo,no0", FAIL),
    ],
)
def test_a_chosen_interface_exists(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, status: str) -> None:
    monkeypatch.setenv(variable, value)
    found = check_interfaces("nccl")
    assert found.status == status
    assert f"{variable}={value}" in found.found
