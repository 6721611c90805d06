"""Through which network interface the ranks of several nodes reach one another."""

import ipaddress
import os
import socket

import psutil

from taso_ds.errors import UserError


def check_gloo_address() -> None:
    """Refuse to offer other nodes an address that leads each back to itself.

    gloo offers the address of the host's own name, and many systems map that name to 127.0.1.1 in /etc/hosts.

    Raises:
        UserError: names the interface to use instead.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        address = "no address"
    if address != "no address" and not ipaddress.ip_address(address).is_loopback:
        return
    raise UserError(
        f"environment: the host name {name} resolves to {address}, where no other node reaches gloo; correct"
        f" /etc/hosts, or export GLOO_SOCKET_IFNAME={_interface_towards(os.environ['MASTER_ADDR'])} on every node"
    )


def _interface_towards(host: str) -> str:
    """Return the interface through which this node reaches ``host``; a placeholder where that cannot be told."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return "INTERFACE"
    for interface, addresses in psutil.net_if_addrs().items():
        if own in (entry.address for entry in addresses) and not ipaddress.ip_address(own).is_loopback:
            return interface
    return "INTERFACE"
