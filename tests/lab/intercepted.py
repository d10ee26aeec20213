"""A pod whose connections are intercepted, and a peer, for the tests of the rules."""

import ipaddress
import socket
import struct
import sys
from collections.abc import AsyncIterator

import pytest
import trio

from lab.cluster import Cluster
from lab.pod import Pod, User, exemption
from proxy.intercept import nftables

VERSIONS = pytest.mark.parametrize("version", [4, 6])
LOOPBACK = {4: "127.0.0.1", 6: "::1"}
ACCEPTED: list[trio.SocketStream] = []


@pytest.fixture
async def close_accepted() -> AsyncIterator[None]:
    """Requested by the fixture `a`, which every test has: pytest-trio runs requested fixtures only,
    not autouse ones."""
    yield
    for stream in ACCEPTED:
        stream.socket.close()
    ACCEPTED.clear()


def original_destination(stream: trio.SocketStream) -> tuple[str, int]:
    sock = stream.socket
    if sock.family == socket.AF_INET6:
        raw = sock.getsockopt(socket.IPPROTO_IPV6, 80, 28)
        return str(ipaddress.ip_address(raw[8:24])), struct.unpack_from("!H", raw, 2)[0]
    raw = sock.getsockopt(socket.SOL_IP, 80, 16)
    return str(ipaddress.ip_address(raw[4:8])), struct.unpack_from("!H", raw, 2)[0]


def install(pod: Pod) -> None:
    """Does the same as the command without starting an interpreter. Tests of the command and of its
    flags start it."""
    pod.inside(lambda: nftables.apply(exemption()))


async def accept(listener: trio.SocketListener) -> trio.SocketStream:
    with trio.fail_after(30):
        stream = await listener.accept()
    ACCEPTED.append(stream)
    return stream


async def dial_as(pod: Pod, user: User, host: str, port: int) -> bool:
    """Connect from a process of this user; returns whether it worked."""
    code = (
        "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=2)"
    )
    return (await pod.run([sys.executable, "-c", code, host, str(port)], user=user)).ok


@pytest.fixture
def a(west: Cluster, close_accepted: None) -> Pod:
    return west.pod("a")


@pytest.fixture
def b(west: Cluster) -> Pod:
    return west.pod("b")
