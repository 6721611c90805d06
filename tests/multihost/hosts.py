"""Hosts for real, on one machine: each has a network, host name, processes, /etc/hosts, disk and sshd of its own.

A host is a set of Linux namespaces; its only way out is a virtual cable to a bridge, which can be cut.
"""

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from launching import ROOT, Finished, finish

NEEDS = ("ip", "unshare", "sshd", "ssh", "ssh-keygen", "pdsh")
_ADDRESSES = {"node-a": "10.77.0.1", "node-b": "10.77.0.2"}
NAMES = tuple(_ADDRESSES)
_EXTENSION = "deepspeed_shm_comm"


def what_is_missing() -> str | None:
    """Say why there can be no hosts here; None where there can."""
    tools = [name for name in NEEDS if shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin") is None]
    if tools:
        return f"needs {', '.join(tools)}: apt-get install openssh-server pdsh iproute2"
    probe = subprocess.run(["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True)
    return "needs root and the right to make namespaces" if probe.returncode else None


class Cluster:
    """Two hosts. ``shared`` is one folder on both; ``local`` is a path that on each host is a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.shared, self.local = folder / "shared", folder / "local"
        self._folder = folder
        self._tag = hex(abs(hash(folder)) % 2**20)[2:]  # interface names have 15 characters
        self._hosts: dict[str, subprocess.Popen[bytes]] = {}

    def disk(self, host: str) -> Path:
        """Return where this machine sees what ``host`` sees as ``local``."""
        return self._folder / host

    def __enter__(self) -> "Cluster":
        for path in (self.shared, self.local, *map(self.disk, NAMES)):
            path.mkdir()
        self._write_ssh()
        self._copy_extension()
        self._ip("link", "add", self._bridge, "type", "bridge")
        self._ip("link", "set", self._bridge, "up")
        for name, address in _ADDRESSES.items():
            self._start(name, address)
        try:
            for name in NAMES:
                self._wait_for(name)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for process in self._hosts.values():
            process.kill()  # and with the first of its processes all others of the host
            process.wait()
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", self._netns(name)], capture_output=True)
        subprocess.run(["ip", "link", "del", self._bridge], capture_output=True)

    def start(self, host: str, command: list[str], **variables: str) -> "subprocess.Popen[str]":
        """Start a command on a host, in the shared folder, over ssh."""
        settings = shlex.join(f"{key}={value}" for key, value in (self.settings | variables).items())
        line = f"cd {self.shared} && exec env {settings} {shlex.join(command)}"
        return subprocess.Popen(
            ["ip", "netns", "exec", self._netns(host), str(self._folder / "bin" / "ssh"), _ADDRESSES[host], line],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, host: str, command: list[str], *, timeout: float = 120.0, **variables: str) -> Finished:
        return finish(self.start(host, command, **variables), timeout=timeout)

    @property
    def settings(self) -> dict[str, str]:
        """The environment of every rank."""
        path = f"{self._folder}/bin:{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"
        variables = {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": path}
        return variables | {"TORCH_EXTENSIONS_DIR": str(self._folder / "extensions"), "PYTHONPATH": str(ROOT)}

    def plug(self, host: str, *, connected: bool) -> None:
        """Cut the cable of a host, or mend it."""
        self._ip("link", "set", self._cable(host), "up" if connected else "down")

    def ranks(self, host: str, script: str) -> list[int]:
        """Return the processes of a host that run ``script``."""
        namespace = os.readlink(f"/proc/{self._first(host)}/ns/pid")
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if (
                    os.readlink(folder / "ns/pid") == namespace
                    and script in (folder / "cmdline").read_text().split("\0")[:3]
                ):
                    found.append(int(folder.name))
            except OSError:  # ended meanwhile
                continue
        return found

    def _first(self, host: str) -> int:
        parent = self._hosts[host].pid
        return int(Path(f"/proc/{parent}/task/{parent}/children").read_text().split()[0])

    def write_etc_hosts(self, host: str, **changed: str) -> None:
        """Write the /etc/hosts of a host: the true addresses, some of them ``changed``."""
        addresses = {"localhost": "127.0.0.1", **_ADDRESSES, **changed}
        lines = (f"{address} {name}\n" for name, address in addresses.items())
        (self._folder / f"{host}.hosts").write_text("".join(lines))

    def _copy_extension(self) -> None:
        """Give the hosts a copy of what DeepSpeed has compiled: one that is killed would leave a lock in the user's."""
        caches = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
        for built in list(caches.rglob(f"{_EXTENSION}.so"))[:1]:
            copy = self._folder / "extensions" / _EXTENSION
            shutil.copytree(built.parent, copy, ignore=shutil.ignore_patterns("lock"))

    def _write_ssh(self) -> None:
        folder = self._folder
        for key in ("host_key", "user_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
        (folder / "sshd_config").write_text(
            f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/user_key.pub\nStrictModes no\nUsePAM no\n"
            "PermitRootLogin yes\nUseDNS no\nPidFile none\n"
        )
        (folder / "ssh_config").write_text(
            f"IdentityFile {folder}/user_key\nUser root\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\n"
            "LogLevel ERROR\nServerAliveInterval 5\nServerAliveCountMax 3\n"
        )
        (folder / "bin").mkdir()
        script = folder / "bin" / "ssh"  # the first on the path, so that pdsh and deepspeed use these keys
        script.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {folder}/ssh_config "$@"\n')
        script.chmod(0o755)

    def _start(self, name: str, address: str) -> None:
        netns = self._netns(name)
        self._ip("netns", "add", netns)
        self._ip("link", "add", self._cable(name), "type", "veth", "peer", "name", "eth0", "netns", netns)
        self._ip("link", "set", self._cable(name), "master", self._bridge, "up")
        self._ip("-n", netns, "addr", "add", f"{address}/24", "dev", "eth0")
        for interface in ("lo", "eth0"):
            self._ip("-n", netns, "link", "set", interface, "up")
        self.write_etc_hosts(name)
        boot = (
            f"hostname {name} && mount --bind {self.disk(name)} {self.local}"
            f" && mount --bind {self._folder}/{name}.hosts /etc/hosts"
            " && mount -t tmpfs tmpfs /dev/shm && mount -t tmpfs tmpfs /run && mkdir /run/sshd"
            f" && exec /usr/sbin/sshd -D -e -f {self._folder}/sshd_config"
        )
        with (self._folder / f"{name}.log").open("wb") as log:
            self._hosts[name] = subprocess.Popen(
                ["ip", "netns", "exec", netns, "unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc",
                 "--kill-child", "sh", "-c", boot],
                stdout=log, stderr=log,
            )  # fmt: skip

    def _wait_for(self, name: str) -> None:
        deadline = time.monotonic() + 20
        while self.run(name, ["true"]).code:
            assert time.monotonic() < deadline, (self._folder / f"{name}.log").read_text()
            time.sleep(0.2)

    @property
    def _bridge(self) -> str:
        return f"taso-{self._tag}"

    def _netns(self, name: str) -> str:
        return f"taso-{self._tag}-{name}"

    def _cable(self, name: str) -> str:
        return f"{name}-{self._tag}"

    @staticmethod
    def _ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)
