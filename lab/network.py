"""Links, addresses and namespaces: the `ip` commands that build the lab, and sockets in other
namespaces.
"""

import contextlib
import ctypes
import ipaddress
import os
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from lab.process import LabError

_CLONE_NEWNET = 0x40000000
T = TypeVar("T")


class Subnets(NamedTuple):
    """The addresses of a cluster: pods, and the virtual addresses of its services, in both
    families."""

    pods4: ipaddress.IPv4Network
    pods6: ipaddress.IPv6Network
    services4: ipaddress.IPv4Network
    services6: ipaddress.IPv6Network

    @classmethod
    def numbered(cls, number: int) -> "Subnets":
        """The plan of the cluster with this number (1-100), from the private ranges of RFC 1918 and
        RFC 4193."""
        if not 1 <= number <= 100:
            raise ValueError(f"a lab has at most 100 clusters, this would be number {number}")
        return cls(
            ipaddress.IPv4Network(f"10.{100 + number}.0.0/24"),
            ipaddress.IPv6Network(f"fd15:7400:{number:x}::/64"),
            ipaddress.IPv4Network(f"10.{100 + number}.128.0/24"),
            ipaddress.IPv6Network(f"fd15:7400:{number:x}:80::/64"),
        )


def batch(*lines: str, netns: str | None = None) -> None:
    """Run `ip` commands, one per line, in one process. Raises LabError with the first failure."""
    command = ["ip", *(["-n", netns] if netns else []), "-batch", "-"]
    done = subprocess.run(
        command, input="\n".join(lines) + "\n", capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise LabError(f"ip: {done.stderr.strip()} (commands: {'; '.join(lines)})")


def nft(netns: str, *lines: str) -> str:
    """Run `nft` commands, one per line, as one transaction; returns their output. Raises
    LabError."""
    command = ["nsenter", f"--net=/run/netns/{netns}", "--", "nft", "-f", "-"]
    done = subprocess.run(
        command, input="\n".join(lines) + "\n", capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise LabError(f"nft: {done.stderr.strip()} (commands: {'; '.join(lines)})")
    return done.stdout


def sysctl(netns: str, values: dict[str, str]) -> None:
    """Set kernel settings of a network namespace; skips unknown ones (a kernel without IPv6)."""

    def write() -> None:
        for name, value in values.items():
            with contextlib.suppress(OSError):
                # /proc/sys/net shows the namespace of the calling thread
                Path("/proc/sys", name).write_text(value)

    in_namespace(netns, write)


def in_namespace(netns: str, function: Callable[[], T]) -> T:
    """Call `function` in a network namespace. Uses a thread that enters it and then ends, because a
    thread cannot safely go back.
    """
    result: list[T] = []
    errors: list[Exception] = []

    def body() -> None:
        try:
            with Path("/run/netns", netns).open("rb") as file:
                libc = ctypes.CDLL(None, use_errno=True)
                if libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
                    raise LabError(
                        f"cannot enter the network namespace {netns}:"
                        f" {os.strerror(ctypes.get_errno())}"
                    )
            result.append(function())
        except Exception as error:  # noqa: BLE001, RUF100  # re-raised in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=body, name=f"netns {netns}")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return result[0]


def open_socket(netns: str, family: int, kind: int, protocol: int = 0) -> socket.socket:
    """A socket in a network namespace that this process is not in; the caller closes it."""
    return in_namespace(netns, lambda: socket.socket(family, kind, protocol))
