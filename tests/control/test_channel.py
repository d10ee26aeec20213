"""The channel over real TLS on loopback: what proxies get, and what peers that misbehave cannot
do."""

from __future__ import annotations

import itertools
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing
from msgspec.structs import replace

from control.contract import SpiffeId
from control.discovery.facts import pod_fact
from control.discovery.usable_endpoints import Place
from control.kube.objects import Pod
from proxy.directory import UNANSWERED
from proxy.directory.channel.messages import (
    MOST_FROM_PROXY,
    Current,
    FromControl,
    Goodbye,
    Hello,
    Ping,
    Refused,
    Subscribe,
    Update,
    Welcome,
    frame,
)
from proxy.directory.channel.source import ControlSource
from proxy.identity.issue import make_root
from proxy.net.address import Address
from proxy.net.exceptions import ConnectFailed, NetError
from proxy.net.socket_stream import SocketStream
from proxy.net.tls.expiry import EARLY
from proxy.net.tls.handshake import TLSStream
from tests.control.cluster import pod
from tests.kit.channel import CONTROL, DOMAIN, WEB, Workshop, messages, service, until

VIP, OTHER, POD, STRANGER = "10.96.0.1", "10.96.0.2", "10.1.0.1", "192.0.2.1"
HELLO = frame(Hello("node-1"))


@pytest.fixture
async def workshop(tmp_path: Path) -> AsyncIterator[Workshop]:
    made = Workshop(tmp_path)
    made.catalog.put(service("web", VIP, [POD]))
    yield made
    made.close()


@pytest.fixture
async def running(nursery: trio.Nursery) -> Callable[[ControlSource], None]:
    return lambda source: nursery.start_soon(source.run, lambda _: None)


def hosts(source: ControlSource, address: str) -> set[str] | None:
    target = source.current.find_address(Address(address, 80))
    assert target is not UNANSWERED
    return None if target is None else {end.address.host for end in target.endpoints}


# What proxies get...


def former_identity(source: ControlSource, address: Address) -> str | None:
    """The identity that `address` had until lately. None: it is not remembered."""
    former = source.former.find(address, trio.current_time())
    return former.identity if former is not None else None


async def test_a_first_use_waits_for_the_answer_and_changes_follow(
    workshop: Workshop, running: Callable[[ControlSource], None]
) -> None:
    async with workshop.control() as (channel, port):
        source = workshop.source(port)
        assert source.not_ready() == "the directory has never been reached: connecting"
        running(source)
        with source.holding(Address(VIP, 80)), source.holding(Address(STRANGER, 443)):
            assert source.current.find_address(Address(VIP, 80)) is UNANSWERED
            await source.learn(Address(VIP, 80))
            await source.learn(Address(STRANGER, 443))
            assert source.not_ready() is None
            assert hosts(source, VIP) == {POD}
            assert source.current.find_address(Address(VIP, 81)) is None
            assert source.current.find_address(Address(STRANGER, 443)) is None
            channel.changed(workshop.catalog.put(service("web", VIP, [POD, "10.1.0.2"])))
            await until(lambda: hosts(source, VIP) == {POD, "10.1.0.2"}, "the change")
            channel.changed(workshop.catalog.remove("web"))
            await until(lambda: hosts(source, VIP) is None, "the removal")
        assert former_identity(source, Address(VIP, 80)) == str(WEB)
        assert source.unanswered == 0


async def test_an_address_that_was_not_in_use_keeps_its_former_identity(
    workshop: Workshop, running: Callable[[ControlSource], None]
) -> None:
    async with workshop.control() as (channel, port):
        source = workshop.source(port, unused=0.1)
        running(source)
        with source.holding(Address(VIP, 80)):
            await source.learn(Address(VIP, 80))
            assert hosts(source, VIP) == {POD}
        await until(lambda: not source.subscriptions.entries, "nothing is followed any more")
        channel.changed(workshop.catalog.remove("web"))
        for address in (Address(VIP, 80), Address(POD, 8080)):
            with source.holding(address):
                await source.learn(address)
                assert source.current.find_address(address) is None
                assert former_identity(source, address) == str(WEB)


async def test_an_endpoint_that_loses_its_identity_gets_no_clear_text(
    workshop: Workshop, running: Callable[[ControlSource], None]
) -> None:
    async with workshop.control() as (channel, port):
        source = workshop.source(port)
        running(source)
        with source.holding(Address(VIP, 80)):
            await source.learn(Address(VIP, 80))
            entry = service("web", VIP, [POD])
            plain = tuple(replace(end, identity=None) for end in entry.endpoints)
            channel.changed(workshop.catalog.put(replace(entry, endpoints=plain)))

            def identity() -> object:
                target = source.current.find_address(Address(VIP, 80))
                assert target is not None
                return target.endpoints[0].identity

            await until(lambda: identity() is None, "the loss")
            assert former_identity(source, Address(POD, 8080)) == str(WEB)
            assert source.former.losses == {"service": 0, "endpoint": 0, "identity": 1}


async def test_names_are_subscribed_and_stay_while_requests_use_them(
    workshop: Workshop, running: Callable[[ControlSource], None]
) -> None:
    async with workshop.control() as (_, port):
        source = workshop.source(port, unused=1.0)
        running(source)
        await until(lambda: source.since is not None, "a connection")
        for authority in (b"web:80", b"web.shop", b"WEB.shop.svc.cluster.local"):
            if authority == b"web:80":
                assert source.current.authority(authority, "shop", "10.9.9.9") is UNANSWERED
                await source.learn_name(authority, "shop")
            target = source.current.authority(authority, "shop", "10.9.9.9")
            assert target is not None
            assert target.service == "shop/web"
        await source.learn_name(b"nothing.shop", "shop")
        assert source.current.authority(b"nothing.shop", "shop", "10.9.9.9") is None
        assert source.current.authority(b"not.a.service.name", "shop", "10.9.9.9") is None
        assert set(source.subscriptions.entries) == {"s/shop/web", "s/shop/nothing"}
        # One of them stays in use, and the other one is removed.
        with trio.fail_after(20):
            while len(source.subscriptions.entries) > 1:
                assert source.current.authority(b"web", "shop", "10.9.9.9") is not UNANSWERED
                await trio.sleep(0.1)
        assert set(source.subscriptions.entries) == {"s/shop/web"}
        assert source.current.authority(b"nothing.shop", "shop", "10.9.9.9") is UNANSWERED


async def test_after_a_restart_only_what_has_changed_is_sent_and_nothing_is_lost(
    workshop: Workshop, running: Callable[[ControlSource], None]
) -> None:
    workshop.catalog.put(service("db", OTHER, ["10.1.0.9"]))
    async with workshop.control() as (_, port):
        source = workshop.source(port)
        running(source)
        for address in (VIP, OTHER):
            with source.holding(Address(address, 80)):
                await source.learn(Address(address, 80))
    assert source.updates == 2
    await until(lambda: source.since is None, "the loss")
    assert hosts(source, VIP) == {POD}
    workshop.catalog.put(service("db", OTHER, ["10.1.0.8"]))
    async with workshop.control(port=port) as (channel, _):
        await until(lambda: hosts(source, OTHER) == {"10.1.0.8"}, "the change")
        assert source.updates == 3
        assert channel.views.computed == 2
        assert hosts(source, VIP) == {POD}
    assert source.connects["ok"] == 2


async def test_equal_views_are_computed_once_and_different_places_see_their_own(
    workshop: Workshop, nursery: trio.Nursery
) -> None:
    pods = [f"10.1.0.{number}" for number in range(1, 4)]
    workshop.catalog.put(service("web", VIP, pods))
    workshop.catalog.put(service("near", OTHER, pods, local=True))
    async with workshop.control() as (channel, port):
        streams = []
        for number in (1, 1, 2):
            stream = await workshop.peer(port, workshop.identity(WEB))
            await stream.send_all(
                frame(Hello(f"node-{number}"))
                + frame(Subscribe(((f"a/{VIP}", b""), (f"a/{OTHER}", b""))))
            )
            streams.append(await messages(stream, 3))
        one, same, other = streams
        assert isinstance(one[0], Welcome)
        assert one == same
        assert one[1] == other[1]
        assert one[2] != other[2]
        assert channel.views.computed == 3


async def test_the_location_of_a_proxy_is_that_of_its_pod(workshop: Workshop) -> None:
    catalog = workshop.catalog
    fact = pod_fact(msgspec.convert(pod("web-0", "10.1.0.7"), Pod))
    catalog.pod(("shop", "web-0"), fact)
    catalog.node("node-1", "west")
    async with workshop.control() as (channel, _):
        for host, peer, claimed, found in (
            ("10.1.0.7", WEB, "node-9", "node-1"),  # the pod's node, whatever the proxy claims
            ("10.1.0.7", SpiffeId(DOMAIN, "shop", "db"), "node-9", "node-9"),  # another identity
            ("10.1.0.8", WEB, "node-9", "node-9"),  # not known yet
        ):
            place = channel.place(host, str(peer), Hello(claimed, "east"))
            assert place == Place(found, "west" if found == "node-1" else "east", "shop")


# Proxies that misbehave...


async def say_and_see(stream: TLSStream, *data: bytes) -> list[FromControl]:
    for part in data:
        await stream.send_all(part)
    found = await messages(stream)
    stream.close()
    return found


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ((MOST_FROM_PROXY + 1).to_bytes(4, "big"), "protocol"),
        (b"\0\0\0\0", "protocol"),
        (b"\0\0\0\x05GET /", "protocol"),
        (frame(Ping()), "protocol"),  # before Hello
        (HELLO + HELLO, "protocol"),
        (HELLO + frame(Goodbye("x")), "protocol"),
        (HELLO + frame(Subscribe((("x/y", b""),))), "protocol"),
        (HELLO + frame(Subscribe((("a/10.1.0.01", b""),))), "protocol"),
        (HELLO + frame(Subscribe((("a/not an address", b""),))), "protocol"),
        (HELLO + frame(Subscribe((("s/one", b""),))), "protocol"),
        (HELLO, "silent"),
        (b"", "timeout"),
        (b"\0\0", "timeout"),
    ],
)
async def test_a_proxy_that_misbehaves_is_disconnected_and_leaves_nothing(
    workshop: Workshop, data: bytes, reason: str
) -> None:
    async with workshop.control(heartbeat_interval=0.1, handshake_timeout=1.0) as (channel, port):
        stream = await workshop.peer(port, workshop.identity(WEB))
        found = await say_and_see(stream, data)
        assert all(isinstance(message, Welcome) for message in found)
        await until(lambda: channel.counts.ended[reason] == 1, f"{reason}: {channel.counts.ended}")
        assert channel.connections == 0
        assert channel.views.topics == {}
        assert channel._identities == {}


async def test_a_client_without_an_identity_of_the_trust_domain_gets_nothing(
    workshop: Workshop,
) -> None:
    foreign, unknown = make_root("other.local"), make_root(DOMAIN)
    stranger = workshop.identity(SpiffeId("other.local", "shop", "web"), foreign, of=foreign)
    forger = workshop.identity(WEB, unknown, of=unknown)
    async with workshop.control(foreign) as (channel, port):
        for number, connect in enumerate(
            (
                lambda: workshop.anonymous_peer(port),
                lambda: workshop.peer(port, stranger),
                lambda: workshop.peer(port, forger),
            ),
            1,
        ):
            assert await refused(connect) == []
            await until(lambda n=number: sum(channel.counts.ended.values()) == n, "the end")  # type: ignore[misc]  # a default argument
        assert channel.counts.accepted == 0
        assert channel.counts.ended["identity"] >= 1


async def refused(connect: Callable[[], Awaitable[TLSStream]]) -> list[FromControl]:
    """What a client gets that sends Hello and asks for an entry."""
    try:
        stream = await connect()
        return await say_and_see(stream, HELLO + frame(Subscribe(((f"a/{VIP}", b""),))))
    except NetError:
        return []


async def test_a_proxy_that_does_not_read_costs_no_memory_and_is_disconnected(
    workshop: Workshop,
) -> None:
    many = [f"10.{n // 65536 + 2}.{n // 256 % 256}.{n % 256}" for n in range(20_000)]
    turns = service("web", VIP, many), service("web", VIP, many[1:])
    workshop.catalog.put(turns[1])
    async with workshop.control(write_timeout=0.5) as (channel, port):
        stream = await workshop.peer(port, workshop.identity(WEB))
        await stream.send_all(HELLO + frame(Subscribe(((f"a/{VIP}", b""),))))
        with trio.fail_after(30):
            for turn in range(1000):
                channel.changed(workshop.catalog.put(turns[turn % 2]))
                await trio.sleep(0.02)
                assert all(len(session._stale) <= 1 for session in channel._open)
                if channel.counts.ended["slow"]:
                    break
        assert channel.counts.ended["slow"] == 1
        assert channel.connections == 0
        stream.close()


async def test_limits_are_kept(workshop: Workshop) -> None:
    identity = workshop.identity(WEB)
    async with workshop.control(
        max_connections_per_identity=2, max_subscriptions=2, max_message_bytes=300
    ) as (channel, port):
        streams = [await workshop.peer(port, identity) for _ in range(2)]
        for stream in streams:
            await stream.send_all(HELLO)
            assert len(await messages(stream, 1)) == 1
        third = await workshop.peer(port, identity)
        assert await say_and_see(third, HELLO) == [
            Goodbye("more than 2 connections (channel.max_connections_per_identity)")
        ]
        other = await workshop.peer(port, workshop.identity(SpiffeId(DOMAIN, "shop", "db")))
        await other.send_all(HELLO)
        assert len(await messages(other, 1)) == 1
        await streams[0].send_all(
            frame(Subscribe(tuple((f"a/10.0.0.{n}", b"") for n in range(1, 4))))
        )
        found = await messages(streams[0], 3)
        assert found[2] == Refused(
            ("a/10.0.0.3",), "more than 2 entries (channel.max_subscriptions)"
        )
        workshop.catalog.put(service("big", OTHER, [f"10.1.1.{n}" for n in range(1, 20)]))
        await streams[1].send_all(frame(Subscribe(((f"a/{OTHER}", b""),))))
        assert await messages(streams[1], 1) == [
            Refused((f"a/{OTHER}",), "longer than 300 bytes (channel.max_message_bytes)")
        ]
        assert channel.connections == 3


async def test_a_connection_ends_with_its_time_and_the_proxy_returns(
    workshop: Workshop, running: Callable[[ControlSource], None]
) -> None:
    async with workshop.control(max_age=0.4) as (channel, port):
        source = workshop.source(port)
        running(source)
        with source.holding(Address(VIP, 80)):
            await source.learn(Address(VIP, 80))
            await until(lambda: source.connects["ok"] >= 3, "connections")
            assert hosts(source, VIP) == {POD}
        assert source.updates == 1
        assert channel.counts.ended["age"] >= 2


# Control planes that misbehave...


async def answer_with(stream: TLSStream, *data: bytes) -> None:
    """Welcome the proxy, wait for its subscription, and send this."""
    await stream.receive_some()
    await stream.send_all(frame(Welcome("r", DOMAIN, (), 100, 0.1)))
    while b"a/" not in await stream.receive_some():
        pass
    for part in data:
        await stream.send_all(part)
    while await stream.receive_some():
        pass


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff",
        b"\0\0\0\x03abc",
        frame(Update(f"a/{VIP}", b"version2", b"garbage")),
        frame(Current((f"a/{OTHER}",))),
        frame(Welcome("r", DOMAIN, (), 100, 0.1)),
        frame(Hello()),
        frame(Goodbye("x")),
        b"",  # and silence
    ],
)
async def test_the_last_good_directory_stays_whatever_a_control_plane_sends(
    workshop: Workshop, running: Callable[[ControlSource], None], data: bytes
) -> None:
    async with workshop.control() as (_, port):
        source = workshop.source(port, first_use_timeout=0.2)
        running(source)
        with source.holding(Address(VIP, 80)):
            await source.learn(Address(VIP, 80))
    version = source.subscriptions.entries[f"a/{VIP}"].version
    await until(lambda: source.since is None, "the loss")

    async def serve(stream: TLSStream) -> None:
        await answer_with(stream, data)

    async with workshop.impostor(serve) as other:
        source.settings = workshop.source(other, first_use_timeout=0.2).settings
        with source.holding(Address(VIP, 80)), source.holding(Address(OTHER, 80)):
            await until(lambda: source.connects["ok"] >= 3, "two connections")
            assert hosts(source, VIP) == {POD}
            assert source.subscriptions.entries[f"a/{VIP}"].version == version
            assert source.current.find_address(Address(OTHER, 80)) is UNANSWERED
    source.settings = workshop.source(port).settings
    async with workshop.control(port=port):
        with source.holding(Address(OTHER, 80)):
            await source.learn(Address(OTHER, 80))
            assert source.current.find_address(Address(OTHER, 80)) is None
            assert hosts(source, VIP) == {POD}


async def test_a_server_with_another_identity_is_not_believed(
    workshop: Workshop, running: Callable[[ControlSource], None]
) -> None:
    received: list[bytes] = []

    async def serve(stream: TLSStream) -> None:
        received.append(await stream.receive_some())

    async with workshop.impostor(serve, WEB) as port:
        source = workshop.source(port, first_use_timeout=0.3)
        running(source)
        with source.holding(Address(VIP, 80)):
            await source.learn(Address(VIP, 80))
            assert source.current.find_address(Address(VIP, 80)) is UNANSWERED
        await until(lambda: source.connects["tls"] >= 2, "attempts")
        assert f"{CONTROL} was expected" in (source.not_ready() or "")
        assert received == []
        assert source.unanswered == 1


@pytest.mark.parametrize("end", ["expiry", "root"])
async def test_the_connection_ends_with_the_control_planes_certificate(
    workshop: Workshop, running: Callable[[ControlSource], None], end: str
) -> None:
    """The server keeps it open: a stolen key must not keep a connection."""
    heard: list[bytes] = []

    async def serve(stream: TLSStream) -> None:
        await stream.receive_some()
        await stream.send_all(frame(Welcome("r", DOMAIN, (), 100, 100.0)))
        with suppress(NetError):
            while data := await stream.receive_some():
                heard.append(data)

    expiries = workshop.expiries
    async with workshop.impostor(serve) as port:
        source = workshop.source(port, min_pause=30.0, max_pause=30.0)
        running(source)
        await until(lambda: source.since is not None, "a connection")
        assert len(expiries) == 1
        (stream,) = [stream for known in expiries._minutes.values() for stream in known]
        certificates_end = stream.info.peer_not_after
        expiries.close_expired()
        assert stream.ended() == "open"
        if end == "expiry":
            expiries._clock = lambda: certificates_end
        else:
            expiries.untrust([make_root(DOMAIN).certificate])
        expiries.close_expired()
        await until(lambda: source.since is None, "the end")
        assert {
            "expiry": "has expired",
            "root": "the trust root of the peer's certificate was removed",
        }[end] in source._why
        assert source.connects == {"ok": 1}


async def test_the_connection_ends_with_the_proxys_certificate(
    workshop: Workshop, running: Callable[[ControlSource], None]
) -> None:
    async with workshop.control() as (_, port):
        identity = workshop.identity(WEB, lifetime=timedelta(minutes=30))
        source = workshop.source(port, identity=identity, min_pause=30.0, max_pause=30.0)
        running(source)
        await until(lambda: source.since is not None, "a connection")
        end = identity.chain_end
        workshop.expiries._clock = lambda: end - EARLY
        workshop.expiries.close_expired()
        await until(lambda: source.since is None, "the end")
        assert source._why == "the certificate with which this connection was opened has expired"


async def test_without_a_connection_addresses_elsewhere_do_not_wait(
    workshop: Workshop, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    times: list[float] = []

    async def dial(address: Address) -> SocketStream:
        times.append(trio.current_time())
        raise ConnectFailed(address, "refused", "refused")

    source = workshop.source(1, dial=dial, min_pause=1.0, max_pause=8.0)
    nursery.start_soon(source.run, lambda _: None)
    began = trio.current_time()
    with source.holding(Address(STRANGER, 443)):
        await source.learn(Address(STRANGER, 443))
        assert source.current.find_address(Address(STRANGER, 443)) is None
    assert trio.current_time() == began
    with source.holding(Address(VIP, 80)):
        await source.learn(Address(VIP, 80))
        assert trio.current_time() == began + 3.0
        assert source.current.find_address(Address(VIP, 80)) is UNANSWERED
    assert source.unanswered == 2
    # The pauses double up to the limit, and are varied.
    await trio.sleep(100)
    pauses = [after - before for before, after in itertools.pairwise(times)]
    for number, pause in enumerate(pauses):
        longest = min(8.0, 2.0**number)
        assert longest / 2 <= pause <= longest
    assert len(set(pauses)) == len(pauses)
    # Unused entries are not removed in between.
    await trio.sleep(1000)
    assert set(source.subscriptions.entries) == {f"a/{STRANGER}", f"a/{VIP}"}
    assert math.isclose(trio.current_time(), began + 1103.0)
