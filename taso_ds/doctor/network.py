"""The port ranks meet at, the name this node is known by, and the interface they talk through."""

import ipaddress
import os
import socket

from taso_ds.doctor.finding import Finding, fail, ok, warn

_VARIABLES = {"gloo": "GLOO_SOCKET_IFNAME", "nccl": "NCCL_SOCKET_IFNAME"}


def check_port(port: int) -> Finding:
    """Bind the port as rank 0 will."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError as error:
            remedy = "pass another --master_port to the launcher, or end what listens there"
            return fail("master port", f"{port}: {error.strerror}", remedy)
    return ok("master port", f"{port} is free")


def check_hostname(backend: str, *, nodes: int) -> Finding:
    """Resolve this node's own name: gloo listens at the address it finds, and tells the other nodes.

    Args:
        backend: the communication library; others than gloo look at the interfaces instead.
    """
    name = socket.gethostname()
    chosen = os.environ.get(_VARIABLES["gloo"])
    severe = fail if backend == "gloo" and nodes > 1 and not chosen else warn
    remedy = "set GLOO_SOCKET_IFNAME to the interface between the nodes, or correct /etc/hosts"
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)}
    except OSError as error:
        return severe("hostname", f"{name} does not resolve: {error.strerror}", remedy)
    addresses = ", ".join(sorted(found))
    if any(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found):
        if chosen:
            return ok("hostname", f"{name} is {addresses}, but gloo uses {chosen}")
        return severe("hostname", f"{name} is {addresses}: gloo would listen where no other node reaches it", remedy)
    return ok("hostname", f"{name} is {addresses}")


def check_interfaces(backend: str) -> Finding:
    """Say which interface the ranks use, or that the library will guess between several.

    Args:
        backend: the communication library.
    """
    candidates = interfaces()
    listed = ", ".join(f"{name} ({address})" for name, address in candidates.items()) or "none beside the loopback"
    chosen = {variable: os.environ[variable] for variable in _VARIABLES.values() if os.environ.get(variable)}
    for variable, value in chosen.items():
        unknown = _unknown(variable, value)
        if unknown:
            return fail("interface", f"{variable}={value}: no interface {unknown} here", f"choose one of {listed}")
    if chosen or len(candidates) <= 1:
        return ok("interface", listed + "".join(f"; {name}={value}" for name, value in chosen.items()))
    variable = _VARIABLES.get(backend, _VARIABLES["nccl"])
    return warn("interface", f"several: {listed}", f"set {variable} to the one between the nodes")


def interfaces() -> dict[str, str]:
    """Return the addresses of the interfaces that are up and reach beyond this node, one for each."""
    import psutil

    states, found = psutil.net_if_stats(), {}
    for name, addresses in psutil.net_if_addrs().items():
        usable = [one.address for one in addresses if one.family in (socket.AF_INET, socket.AF_INET6)]
        usable = [one for one in usable if _reaches_out(one)]
        if usable and name in states and states[name].isup:
            found[name] = usable[0]
    return found


def _reaches_out(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    return not (parsed.is_loopback or parsed.is_link_local)


def _unknown(variable: str, value: str) -> str | None:
    """Return the first name that is no interface; NCCL also takes beginnings of names, ``=exact`` and ``^but not``."""
    names = [name for _, name in socket.if_nameindex()]
    if variable == _VARIABLES["gloo"]:
        return next((part for part in value.split(",") if part not in names), None)
    if value.startswith("^"):
        return None
    exact = value.startswith("=")
    for part in value.removeprefix("=").split(","):
        part = part.partition(":")[0]
        if not any(name == part if exact else name.startswith(part) for name in names):
            return part
    return None
