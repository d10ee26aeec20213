"""A replica that is cut off from the API server, and what proxies do with its answers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from control.channel.server import Channel
from control.contract import SpiffeId
from control.discovery.catalog import Catalog
from control.discovery.facts import pod_fact
from control.kube.objects import Pod
from proxy.directory import UNANSWERED
from proxy.directory.channel.messages import (
    Current,
    Goodbye,
    Hello,
    Ping,
    Refused,
    Subscribe,
    Unavailable,
    Update,
    Welcome,
    frame,
    version_of,
)
from proxy.directory.channel.source import ControlSource
from proxy.directory.channel.subscriptions import Subscriptions
from proxy.identity.issue import make_root
from proxy.net.address import Address
from proxy.net.exceptions import ConnectFailed
from proxy.net.socket_stream import SocketStream
from tests.control.cluster import pod
from tests.kit.channel import DOMAIN, LOOPBACK, WEB, Workshop, messages, service, until

VIP, OTHER, POD, STRANGER = "10.96.0.1", "10.96.0.2", "10.1.0.1", "192.0.2.1"
HELLO = frame(Hello("node-1"))


@pytest.fixture
async def workshop(tmp_path: Path) -> AsyncIterator[Workshop]:
    made = Workshop(tmp_path)
    made.catalog.put(service("web", VIP, [POD]))
    yield made
    made.close()


@dataclass
class Cut:
    """Whether a replica is cut off from the API server."""

    channel: Channel
    off: bool = True

    def __post_init__(self) -> None:
        self.channel.views.is_current = lambda: not self.off

    def heal(self) -> None:
        self.off = False
        self.channel.views.answer_withheld()


def known(source: ControlSource, host: str) -> object:
    return source.current.find_address(Address(host, 80))


async def test_a_replica_that_is_cut_off_answers_only_what_it_knows(workshop: Workshop) -> None:
    plain = msgspec.convert(pod("plain", "10.1.0.7", meshed=False), Pod)
    workshop.catalog.pod(("shop", "plain"), pod_fact(plain))
    Catalog.flush(workshop.catalog)
    async with workshop.control() as (channel, port):
        cut = Cut(channel)
        stream = await workshop.peer(port, workshop.identity(WEB))
        nothing = version_of(b"")
        keys = (f"a/{VIP}", f"a/{OTHER}", "s/shop/late", "a/10.1.0.7")
        wanted = (*((key, b"") for key in keys), (f"a/{STRANGER}", nothing))
        await stream.send_all(HELLO + frame(Subscribe(wanted)))
        found = (await messages(stream, 4))[1:]
        updates = {message.key for message in found if isinstance(message, Update)}
        assert updates == {f"a/{VIP}", "a/10.1.0.7"}, "a pod without a sidecar is known"
        assert Unavailable((f"a/{OTHER}", "s/shop/late", f"a/{STRANGER}")) in found
        # It is known before the rest.
        channel.changed(workshop.catalog.put(service("late", OTHER, [POD])))
        found = await messages(stream, 2)
        assert {message.key for message in found if isinstance(message, Update)} == {
            f"a/{OTHER}",
            "s/shop/late",
        }
        channel.changed(workshop.catalog.remove("late"))
        cut.heal()
        found = await messages(stream, 2)
        assert [message.content for message in found if isinstance(message, Update)] == [b"", b""]
        await stream.send_all(frame(Subscribe(((f"a/{STRANGER}", nothing),))))
        assert await messages(stream, 1) == [Current((f"a/{STRANGER}",))]


async def test_known_entries_stay_and_an_unknown_one_is_no_address_outside_of_the_mesh(
    workshop: Workshop, nursery: trio.Nursery
) -> None:
    async with workshop.control() as (channel, port):
        cut = Cut(channel, off=False)
        source = workshop.source(port, first_use_timeout=0.3, max_pause=60.0)
        nursery.start_soon(source.run, lambda _: None)
        await until(lambda: source.since is not None, "a connection")
        with source.holding(Address(VIP, 80)):
            await source.learn(Address(VIP, 80))
            before = known(source, VIP)
            cut.off = True
            # Addresses outside do not wait for long.
            with source.holding(Address(STRANGER, 443)):
                with trio.fail_after(5):
                    await source.learn(Address(STRANGER, 443))
                assert known(source, STRANGER) is None
            with source.holding(Address(OTHER, 80)):
                await source.learn(Address(OTHER, 80))
                assert known(source, OTHER) is UNANSWERED
                assert known(source, VIP) == before
                cut.heal()
                await until(lambda: known(source, OTHER) is None, "the answer")
        assert source.connects["ok"] == 2, "another replica was tried, but not again and again"


async def test_the_proxy_asks_another_replica(
    workshop: Workshop, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolve(host: str, port: int, *_: int) -> list[tuple[object, ...]]:
        assert host == "control.test"
        return [(2, 1, 6, "", (found, port)) for found in (LOOPBACK, "127.0.0.2")]

    monkeypatch.setattr("socket.getaddrinfo", resolve)
    async with (
        workshop.control() as (one, port),
        workshop.control(port=port, host="127.0.0.2") as (two, _),
    ):
        source = workshop.source(port, address=f"control.test:{port}")
        nursery.start_soon(source.run, lambda _: None)
        await until(lambda: source.since is not None, "a connection")
        bad, good = (one, two) if one.connections else (two, one)
        Cut(bad)
        with source.holding(Address(OTHER, 80)):
            await source.learn(Address(OTHER, 80))
            assert known(source, OTHER) is None
            assert (bad.connections, good.connections) == (0, 1)
        assert "is cut off from the API server" in source._why


async def test_a_doubt_ends_the_pause_before_the_next_attempt(
    workshop: Workshop, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    times: list[float] = []

    async def dial(address: Address) -> SocketStream:
        times.append(trio.current_time())
        raise ConnectFailed(address, "refused", "refused")

    source = workshop.source(1, dial=dial, min_pause=1.0, max_pause=1000.0)
    nursery.start_soon(source.run, lambda _: None)
    await trio.sleep(1500)
    count, now = len(times), trio.current_time()
    source.doubt()
    source.doubt()
    await trio.sleep(1)
    assert len(times) == count + 1
    assert now < times[-1] <= now + 1


# Limits


async def test_the_connections_of_one_proxy_are_limited(workshop: Workshop) -> None:
    identity = workshop.identity(WEB)
    async with workshop.control(max_connections_per_proxy=1) as (channel, port):
        stream = await workshop.peer(port, identity)
        await stream.send_all(HELLO)
        await messages(stream, 1)
        second = await workshop.peer(port, identity)
        await second.send_all(HELLO)
        (goodbye,) = await messages(second)
        assert isinstance(goodbye, Goodbye)
        assert "channel.max_connections_per_proxy" in goodbye.reason
        other = await workshop.peer(port, workshop.identity(SpiffeId(DOMAIN, "shop", "db")))
        await other.send_all(HELLO)
        await messages(other, 1)
        stream.close()
        await until(lambda: channel.connections == 1, "the end of the first")
        third = await workshop.peer(port, identity)
        await third.send_all(HELLO)
        assert len(await messages(third, 1)) == 1
        assert len(channel._proxies) == 2


async def test_a_proxy_that_asks_for_too_many_entries_is_read_later(workshop: Workshop) -> None:
    async with workshop.control(max_subscriptions=16, max_subscribe_rate=40) as (_, port):
        stream = await workshop.peer(port, workshop.identity(WEB))
        await stream.send_all(frame(Hello()))
        await messages(stream, 1)
        began = trio.current_time()
        entries = tuple((f"a/10.0.0.{number}", b"") for number in range(16))
        for _ in range(3):
            await stream.send_all(frame(Subscribe(entries)))
            await messages(stream, 16)
        # 16 at once, and the others at 40 a second; the last answer does not wait for its own.
        assert trio.current_time() - began > 0.35


@pytest.mark.parametrize("key", ["s/shop/Web", "s/shop/a_b", "s/-/a", f"s/shop/{'a' * 64}"])
async def test_a_name_that_no_service_can_have_is_no_key(workshop: Workshop, key: str) -> None:
    async with workshop.control() as (channel, port):
        stream = await workshop.peer(port, workshop.identity(WEB))
        await stream.send_all(HELLO + frame(Subscribe(((key, b""),))))
        await messages(stream)
        assert channel.counts.ended["protocol"] == 1


# Refused entries are asked for again


def test_a_refused_entry_that_stays_in_use_is_followed_when_there_is_room() -> None:
    room = [False]
    asked = Subscriptions(1, lambda _: room[0])

    def state() -> str:
        return asked.entries["a/10.0.0.2"].state

    asked.received(Welcome("r", DOMAIN, (), 10, 1.0))
    first = asked.want("a/10.0.0.1")
    asked.take()
    asked.received(Update("a/10.0.0.1", b"1", b""))
    asked.release(first, 0.0)
    asked.want("a/10.0.0.2")
    assert state() == "refused", "the first cannot be dropped: its identities have no room"
    asked.retry(1.0, 30.0)
    assert state() == "refused"
    room[0] = True
    asked.retry(2.0, 30.0)
    assert state() == "waiting"
    assert asked.dropped == ["a/10.0.0.1"]
    asked.take()
    # The control plane refuses it.
    asked.received(Refused(("a/10.0.0.2",), "full"), 100.0)
    assert state() == "refused"
    asked.retry(129.0, 30.0)
    assert not asked.unsent
    asked.retry(130.0, 30.0)
    assert asked.unsent
    asked.take()
    # A change of a known entry is refused.
    asked.received(Update("a/10.0.0.2", b"2", b""))
    asked.received(Refused(("a/10.0.0.2",), "too long"), 200.0)
    assert state() == "known"
    asked.retry(230.0, 30.0)
    assert asked.take() == [Subscribe((("a/10.0.0.2", b"2"),))]


async def test_messages_that_ask_for_nothing_are_read_later_too(workshop: Workshop) -> None:
    async with workshop.control(max_subscriptions=16, max_subscribe_rate=40) as (channel, port):
        stream = await workshop.peer(port, workshop.identity(WEB))
        await stream.send_all(frame(Hello()))
        await messages(stream, 1)
        began = trio.current_time()
        await stream.send_all(frame(Ping()) * 32)
        await until(lambda: channel.connections, "the connection")
        await trio.sleep(0.05)
        await stream.send_all(frame(Subscribe((("a/10.0.0.1", b""),))))
        await messages(stream, 1)
        assert trio.current_time() - began > 0.35


# Trust roots of the replica


async def test_a_connection_ends_when_its_trust_root_is_removed(workshop: Workshop) -> None:
    old = make_root(DOMAIN)
    async with workshop.control(old) as (channel, port):
        leaving = await workshop.peer(port, workshop.identity(WEB, old, of=old))
        staying = await workshop.peer(port, workshop.identity(WEB))
        silent = await workshop.peer(port, workshop.identity(WEB, old, of=old))  # before its Hello
        for stream in (leaving, staying):
            await stream.send_all(HELLO)
            await messages(stream, 1)
        channel.check_trust()
        await until(lambda: channel.connections == 3, "all connections")
        files = channel._identity.files
        assert files is not None
        files.roots[0].write_bytes(workshop.root.certificate_pem)
        assert channel._identity.reload()
        channel.check_trust()
        assert await messages(leaving) == []
        assert await messages(silent) == []
        await until(lambda: channel.connections == 1, "the end of both")
        assert channel.counts.ended == {"identity": 2}
        await staying.send_all(frame(Subscribe((("a/10.0.0.1", b""),))))
        assert len(await messages(staying, 1)) == 1


async def test_a_trust_root_that_is_removed_during_a_handshake_counts(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = make_root(DOMAIN)
    async with workshop.control(old) as (channel, port):
        identity = channel._identity
        files = identity.files
        assert files is not None
        verify = identity.verify_chain

        def late(*chain: Any) -> Any:
            found = verify(*chain)
            files.roots[0].write_bytes(workshop.root.certificate_pem)
            identity.reload()
            channel.check_trust()
            return found

        monkeypatch.setattr(identity, "verify_chain", late)
        stream = await workshop.peer(port, workshop.identity(WEB, old, of=old))
        await stream.send_all(HELLO)
        assert await messages(stream) == []
        assert channel.counts.ended == {"identity": 1}
