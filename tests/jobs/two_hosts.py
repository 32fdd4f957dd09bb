"""How are two hosts had on one machine? Two network namespaces, joined by a cable, each with an sshd of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

NAMES = (f"m3i-{os.getpid()}-a", f"m3i-{os.getpid()}-b")  # other tests may run on this machine
ADDRESSES = ("10.213.7.1", "10.213.7.2")
PORT = 2222  # of both sshd
TOOLS = ("ip", "unshare", "ssh", "ssh-keygen", "pdsh", "/usr/sbin/sshd")
SECONDS = 10  # that a command of this file may take


def unusable() -> str:
    """Why there can be no two hosts here; "" when there can."""
    missing = [name for name in TOOLS if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: iproute2, openssh-server, pdsh)"
    if os.geteuid() != 0:
        return "network namespaces are made by root"
    made = subprocess.run(
        ["unshare", "--net", "--mount", "true"], capture_output=True, text=True, check=False
    )
    return "" if made.returncode == 0 else f"no network namespace can be made: {made.stderr.strip()}"


@dataclass(frozen=True)
class TwoHosts:
    """Hosts that reach each other by name and by ssh, with the files and processes of this machine."""

    folder: Path  # its bin/ssh knows port and key

    def inside(self, name: str, *command: str) -> list[str]:
        """`command` as it is started on that host."""
        return ["ip", "netns", "exec", name, *command]

    def environment(self, **added: str) -> dict[str, str]:
        """Of a command in which ssh, pdsh and DeepSpeed reach the hosts: nothing of this process but its PATH."""
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return {"PATH": path, "HOME": str(self.folder), "SHELL": "/bin/bash"} | added


@contextmanager
def two_hosts(folder: Path, aliases: dict[str, Sequence[str]]) -> Iterator[TwoHosts]:
    """Both up and reachable; `aliases` are more names of a host. Nothing of them is left afterwards."""
    with ExitStack() as held:
        held.callback(_remove)
        _connect()
        for name in NAMES:
            place = Path("/etc/netns") / name
            place.mkdir(parents=True)
            (place / "hosts").write_text(_names_of_hosts(name, aliases))
        _write_keys(folder)
        for name in NAMES:
            held.enter_context(_sshd(folder, name))
        yield TwoHosts(folder)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)


def _connect() -> None:
    for name in NAMES:
        _run("ip", "netns", "add", name)
    first, second = NAMES
    _run(*f"ip -n {first} link add eth0 type veth peer name eth0 netns {second}".split())
    for name, address in zip(NAMES, ADDRESSES, strict=True):
        _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _run("ip", "-n", name, "link", "set", device, "up")


def _names_of_hosts(host: str, aliases: dict[str, Sequence[str]]) -> str:
    """/etc/hosts as that host sees it: the machine's own name is this host's there."""
    lines = ["127.0.0.1 localhost"]
    for name, address in zip(NAMES, ADDRESSES, strict=True):
        own = [socket.gethostname()] if name == host else []
        lines.append(" ".join([address, name, *aliases.get(name, ()), *own]))
    return "\n".join([*lines, ""])


def _write_keys(folder: Path) -> None:
    for name in ("host_key", "user_key"):
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    key = (folder / "host_key.pub").read_text()
    (folder / "known_hosts").write_text("".join(f"[{name}]:{PORT} {key}" for name in NAMES))
    options = f"Port {PORT}\nIdentityFile {folder}/user_key\nUserKnownHostsFile {folder}/known_hosts\n"
    (folder / "ssh_config").write_text(options + "User root\n")
    (folder / "bin").mkdir()
    ssh = folder / "bin" / "ssh"
    ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    ssh.chmod(0o755)


@contextmanager
def _sshd(folder: Path, name: str) -> Iterator[None]:
    Path("/run/sshd").mkdir(exist_ok=True)
    options = {
        "Port": PORT,
        "HostKey": folder / "host_key",
        "AuthorizedKeysFile": folder / "authorized_keys",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PasswordAuthentication": "no",
        "PermitRootLogin": "prohibit-password",
    }
    given = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
    command = ["ip", "netns", "exec", name, "/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", *given]
    with (folder / f"sshd-{name}.txt").open("w") as log, subprocess.Popen(command, stderr=log) as server:
        try:
            _wait_until_reached(folder, name)
            yield
        finally:
            server.terminate()


def _wait_until_reached(folder: Path, name: str) -> None:
    ask = ["ip", "netns", "exec", name, str(folder / "bin" / "ssh"), "-o", "BatchMode=yes", name, "true"]
    until = time.monotonic() + SECONDS
    while (asked := subprocess.run(ask, capture_output=True, text=True, check=False)).returncode:
        log = (folder / f"sshd-{name}.txt").read_text()
        assert time.monotonic() < until, f"{name} cannot be reached: {asked.stderr}\n{log}"
        time.sleep(0.1)


def _remove() -> None:
    for name in NAMES:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
        shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)
    if (there := Path("/etc/netns")).is_dir() and not any(there.iterdir()):
        there.rmdir()
