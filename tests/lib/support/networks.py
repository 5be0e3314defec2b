"""Hosts on one machine: network namespaces with a name, an address and a link between them. Tests and benchmarks use it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

DEVICE = "eth0"
"""Each host's end of the link."""


@dataclass(frozen=True)
class Network:
    """What a host sees of the network."""

    name: str
    """As the others know it (``/etc/hosts``), also with ``.job`` behind it."""
    space: str
    """Of the namespace."""
    address: str

    @property
    def words(self) -> list[str]:
        """What stands before a command that is to run there, as root."""
        return ["ip", "netns", "exec", self.space]

    def counter(self, name: str) -> int:
        """One of the statistics of its device, such as ``tx_bytes``; headers are counted."""
        words = [*self.words, "cat", f"/sys/class/net/{DEVICE}/statistics/{name}"]
        return int(subprocess.run(words, check=True, capture_output=True).stdout)


def reason_against() -> str:
    """Why there can be none here; empty if there can."""
    if os.geteuid():
        return "not root: no network namespaces"
    if not (shutil.which("ip") and shutil.which("unshare")):
        return "no ip (iproute2) or unshare: no network namespaces"
    probe = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, text=True)
    return f"no network namespaces: {probe.stderr.strip()}" if probe.returncode else ""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextmanager
def veth(first: str, second: str) -> Iterator[None]:
    """The kernel's own link between two namespaces; it goes with them."""
    ip("link", "add", DEVICE, "netns", first, "type", "veth", "peer", "name", DEVICE, "netns", second)
    yield


@contextmanager
def two_networks(
    link: Callable[[str, str], AbstractContextManager[object]] = veth, mtu: int = 1500
) -> Iterator[tuple[Network, Network]]:
    """Two hosts, ``node1`` and ``node2``, until the context is left.

    Args:
        link: makes :data:`DEVICE` in the two namespaces of these names.
        mtu: bytes of the largest packet.
    """
    first, second = (Network(f"node{i}", f"sl{os.getpid()}-node{i}", f"10.213.77.{i}") for i in (1, 2))
    with ExitStack() as stack:
        for host in (first, second):
            ip("netns", "add", host.space)
            stack.callback(subprocess.run, ["ip", "netns", "delete", host.space], capture_output=True)
            # `ip netns exec` lays these files over those in /etc.
            etc = Path("/etc/netns") / host.space
            etc.mkdir(parents=True)
            stack.callback(shutil.rmtree, etc, ignore_errors=True)
            names = "".join(f"{h.address} {h.name} {h.name}.job\n" for h in (first, second))
            (etc / "hosts").write_text(f"127.0.0.1 localhost\n{names}", encoding="utf-8")
        stack.enter_context(link(first.space, second.space))
        for host in (first, second):
            ip("-n", host.space, "addr", "add", f"{host.address}/24", "dev", DEVICE)
            ip("-n", host.space, "link", "set", DEVICE, "mtu", str(mtu), "up")
            ip("-n", host.space, "link", "set", "lo", "up")
        yield first, second
