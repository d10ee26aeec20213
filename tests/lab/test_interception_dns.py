"""Interception of DNS in a real kernel: which queries are captured, which are not, and what happens
without a proxy.

Rules: a socket on a proxy's port replaces the proxy, one in another pod a resolver. Each captured
query is shown next to one that is not, so that neither a ruleset without effect nor one that
captures everything can pass."""

from __future__ import annotations

import dataclasses
import socket
from typing import Any

import pytest
import trio

from lab.cluster import Cluster
from lab.pod import PROXY_MARK, Pod, exemption
from proxy.intercept import nftables
from proxy.intercept.nftables import Captured
from proxy.net.accept import original_destination
from proxy.net.address import Address
from tests.lab.intercepted import LOOPBACK, VERSIONS

pytestmark = pytest.mark.lab

TCP, FIRST, SECOND = 4153, 4153, 4154


@pytest.fixture
def pod(west: Cluster) -> Pod:
    return west.pod("pod")


@pytest.fixture
def resolvers(west: Cluster) -> list[Pod]:
    """The pod's first, its second, and one that is not the pod's."""
    return [west.pod(name) for name in ("first", "second", "stranger")]


def install(pod: Pod, resolvers: list[Pod]) -> None:
    ports = list(zip(resolvers, (FIRST, SECOND), strict=True))
    captured = [
        Captured(one.address(version), 53, port) for version in (4, 6) for one, port in ports
    ]
    settings = dataclasses.replace(
        exemption(), mark=PROXY_MARK, dns_port=TCP, resolvers=tuple(captured)
    )
    pod.inside(lambda: nftables.apply(settings))


async def bound(pod: Pod, host: str, port: int, version: int) -> trio.socket.SocketType:
    sock = pod.socket(version, socket.SOCK_DGRAM)
    await sock.bind((host, port))
    return sock


async def arrives(asking: trio.socket.SocketType, at: trio.socket.SocketType) -> bool:
    """Whether a datagram arrives there, and its response comes back from the address that it was
    sent to."""
    await asking.send(b"question")
    with trio.fail_after(30):
        data, client = await at.recvfrom(100)
        await at.sendto(b"answer", client)
        return (data, await asking.recv(100)) == (b"question", b"answer")


async def asking(
    pod: Pod, whom: Pod, version: int, mark: int | None = None
) -> trio.socket.SocketType:
    sock = pod.socket(version, socket.SOCK_DGRAM)
    if mark is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
    await sock.connect((whom.address(version), 53))
    return sock


@VERSIONS
async def test_questions_to_each_of_the_pods_resolvers_arrive_at_its_port_and_others_where_they_go(
    pod: Pod, resolvers: list[Pod], version: int
) -> None:
    install(pod, resolvers[:2])
    ports = [await bound(pod, LOOPBACK[version], port, version) for port in (FIRST, SECOND)]
    stranger = await bound(resolvers[2], resolvers[2].address(version), 53, version)
    for resolver, where in zip(resolvers, [*ports, stranger], strict=True):
        assert await arrives(await asking(pod, resolver, version), where)


@VERSIONS
async def test_the_proxys_own_questions_reach_the_resolver(
    pod: Pod, resolvers: list[Pod], version: int
) -> None:
    install(pod, resolvers[:2])
    there = await bound(resolvers[0], resolvers[0].address(version), 53, version)
    assert await arrives(await asking(pod, resolvers[0], version, mark=PROXY_MARK), there)


@VERSIONS
async def test_connections_for_dns_arrive_at_their_port_with_their_destination(
    pod: Pod, resolvers: list[Pod], version: int
) -> None:
    install(pod, resolvers[:2])
    names, outbound = await pod.listen(TCP, version), await pod.listen(4140, version)
    for resolver, listener in ((resolvers[1], names), (resolvers[2], outbound)):
        await pod.connect(resolver.address(version), 53)
        with trio.fail_after(30):
            accepted = await listener.accept()
        async with accepted:
            # trio's type does not show that its socket wraps one of the standard library's, which a
            # proxy needs.
            accepted_socket: Any = accepted.socket
            found = original_destination(
                accepted_socket._sock, Address.of(accepted_socket.getsockname())
            )
            assert found == (resolver.address(version), 53)


@VERSIONS
async def test_without_a_proxy_connections_fail_at_once(
    pod: Pod, resolvers: list[Pod], version: int
) -> None:
    install(pod, resolvers[:2])
    sock = await asking(pod, resolvers[0], version)
    await sock.send(b"question")
    with trio.fail_after(30), pytest.raises(ConnectionRefusedError):
        await sock.recv(100)
    with pytest.raises(ConnectionRefusedError):
        await pod.connect(resolvers[0].address(version), 53)


@VERSIONS
async def test_a_flow_from_before_the_rules_is_refused_and_the_next_one_is_captured(
    pod: Pod, resolvers: list[Pod], version: int
) -> None:
    there = await bound(resolvers[0], resolvers[0].address(version), 53, version)
    # Connection tracking has to have the flow: it starts with the first NAT chain.
    pod.inside(lambda: nftables.apply(exemption()))
    old = await asking(pod, resolvers[0], version)
    assert await arrives(old, there)
    install(pod, resolvers[:2])
    here = await bound(pod, LOOPBACK[version], FIRST, version)

    async def ask_again() -> None:  # the refusal is raised by send() itself, or by recv()
        await old.send(b"question")
        await old.recv(100)

    with trio.fail_after(30), pytest.raises(OSError):
        await ask_again()
    assert await arrives(await asking(pod, resolvers[0], version), here)


@VERSIONS
async def test_a_resolver_on_the_loopback_interface_is_captured_and_reached_by_the_proxy(
    pod: Pod, version: int
) -> None:
    host = LOOPBACK[version]
    settings = dataclasses.replace(
        exemption(), mark=PROXY_MARK, dns_port=TCP, resolvers=(Captured(host, 53, FIRST),)
    )
    pod.inside(lambda: nftables.apply(settings))
    proxy, resolver = await bound(pod, host, FIRST, version), await bound(pod, host, 53, version)
    for mark, where in ((None, proxy), (PROXY_MARK, resolver)):
        sock = pod.socket(version, socket.SOCK_DGRAM)
        if mark is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        await sock.connect((host, 53))
        assert await arrives(sock, where)


async def test_nothing_is_left_when_the_rules_are_removed(pod: Pod, resolvers: list[Pod]) -> None:
    install(pod, resolvers[:2])
    pod.inside(nftables.remove)
    there = await bound(resolvers[0], resolvers[0].ipv4, 53, 4)
    assert await arrives(await asking(pod, resolvers[0], 4), there)
