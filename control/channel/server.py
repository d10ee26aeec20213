"""The connections of proxies.

Each connection has two tasks. One reads messages; the other sends what has changed. A connection
ends when the proxy violates the protocol, is silent for three heartbeats, or reads nothing for
`write_timeout`. If a proxy asks for too many entries, or sends too many messages, its messages are
read later. A connection also ends after `max_age` (varied at random), and when the proxy's
certificate expires: the proxy returns at once, and loses nothing. So the proxies spread over the
replicas again after one of them was restarted, and a proxy whose certificate is not renewed is not
served. It ends at once when the trust root of the proxy's certificate is removed.

Only clients with a certificate of the trust domain are accepted. Where a proxy runs is what
discovery knows of the pod at its address, if that pod has the identity of the certificate.
Otherwise it is what the proxy says; a wrong place gives it the endpoints of that place. The
namespace of the proxy is that of its certificate.
"""

from __future__ import annotations

import logging
import random
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, NoReturn, TypeVar

import trio

from control.channel.session import Session
from control.channel.views import Views
from control.contract import SpiffeId
from control.discovery.catalog import Catalog, Changes
from control.discovery.usable_endpoints import Place
from proxy.directory.channel.messages import (
    MOST_FROM_PROXY,
    ChannelError,
    Frames,
    Goodbye,
    Hello,
    Ping,
    Subscribe,
    Welcome,
    frame,
    from_proxy,
)
from proxy.identity.identity import Identity, PeerRefused
from proxy.net.accept import Acceptor, Connection
from proxy.net.connection_slots import Bounds
from proxy.net.exceptions import NetError
from proxy.net.tls.handshake import TLSStream, tls_server
from proxy.settings.declare import Section, number, octets, seconds

T = TypeVar("T")

_log = logging.getLogger("isthmus.control")

# Bytes that are encoded and sent at once; a longer frame is sent alone.
_BATCH = 65536


class ChannelLimits(Section, frozen=True):
    """The connections of proxies."""

    max_connections: Annotated[
        int, number(1, 1_000_000, "maximum proxies that are connected; above: new ones are closed")
    ] = 5000
    max_connections_per_identity: Annotated[
        int,
        number(1, 1_000_000, "maximum connections of one identity; above: new ones are closed"),
    ] = 2000
    max_connections_per_proxy: Annotated[
        int,
        number(
            1,
            1_000_000,
            "maximum connections of one identity from one address; each worker of a proxy has one;"
            " above: new ones are closed",
        ),
    ] = 64
    max_handshakes: Annotated[
        int,
        number(
            1,
            100_000,
            "maximum connections whose peer is not known yet, in addition to `max_connections`",
        ),
    ] = 256
    max_subscriptions: Annotated[
        int, number(16, 1_000_000, "maximum entries that one proxy follows; above: it is refused")
    ] = 4096
    max_subscribe_rate: Annotated[
        int,
        number(
            1,
            1_000_000,
            "entries that one connection may ask for in a second, and other messages, after"
            " `max_subscriptions` at once; above: the replica reads its messages later",
        ),
    ] = 200
    max_message_bytes: Annotated[
        int,
        octets(
            64 * 2**10,
            2**30,
            "maximum size of a message to a proxy; above: the proxy does not get the entry",
        ),
    ] = 8 * 1024 * 1024
    handshake_timeout: Annotated[
        float, seconds(0.1, 300, "maximum time for the TLS handshake, and for the first message")
    ] = 10.0
    write_timeout: Annotated[
        float,
        seconds(0.1, 300, "maximum time for sending to a proxy; above: the connection is closed"),
    ] = 10.0
    heartbeat_interval: Annotated[
        float, seconds(1, 300, "time without a message after which both sides send one")
    ] = 15.0
    max_missed_heartbeats: Annotated[
        int, number(2, 100, "a connection is dead when so many heartbeats are missing")
    ] = 3
    max_age: Annotated[
        float,
        seconds(
            10,
            7 * 86400,
            "maximum age of a connection, varied by a quarter; then the proxy connects again",
        ),
    ] = 3600.0
    reload_interval: Annotated[
        float, seconds(0.1, 3600, "time between two checks of the certificate, key and roots")
    ] = 10.0


@dataclass(slots=True)
class ChannelCounts:
    """For metrics. `ended` by reason."""

    accepted: int = 0
    updates: int = 0
    ended: Counter[str] = field(default_factory=Counter)


class Ended(Exception):
    """A connection ends. `reason` is a label for metrics."""

    def __init__(self, reason: str, words: str) -> None:
        super().__init__(words)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Announcement:
    """What the control plane announces to proxies. `replica`: the name of this one. `networks`
    (CIDR) and `domain` of the cluster."""

    replica: str = ""
    networks: tuple[str, ...] = ()
    domain: str = "cluster.local"


class Channel:
    """Serves the entries of `catalog`."""

    def __init__(
        self, catalog: Catalog, identity: Identity, limits: ChannelLimits, about: Announcement
    ) -> None:
        self.limits = limits
        self.counts = ChannelCounts()
        self.views = Views(catalog)
        self.about = about
        self.chance = random.Random()  # noqa: S311  # spreads reconnects
        self._catalog = catalog
        self._identity = identity
        self._identities: Counter[str] = Counter()
        self._proxies: Counter[tuple[str, str]] = Counter()  # by identity and address
        self._open: set[Session] = set()
        self._links: set[_Link] = set()

    def changed(self, changes: Changes) -> None:
        """Discovery has new entries."""
        self.views.changed(changes)

    def check_trust(self) -> None:
        """The trust roots may have changed. Ends the connections whose root is gone."""
        for link in self._links:
            self._check_trust(link)

    def _check_trust(self, link: _Link) -> None:
        if link.stream.info.peer_root not in self._identity.roots:
            link.trusted.cancel()

    @property
    def connections(self) -> int:
        """The number of proxies that are connected."""
        return len(self._open)

    @property
    def updates(self) -> int:
        """The number of entries that were sent."""
        return self.counts.updates + sum(session.updates for session in self._open)

    @property
    def subscriptions(self) -> int:
        """The number of topics that proxies follow, each counted for each proxy."""
        return sum(map(len, self._open))

    async def serve(self, listeners: Sequence[socket.socket]) -> None:
        """Serve until cancelled. Closes `listeners`."""
        bounds = Bounds(self.limits.max_connections, self.limits.max_handshakes)
        acceptor = Acceptor(self._accept, limit=bounds, on_error=self._failed)
        await acceptor.serve(listeners)

    def _failed(self, connection: Connection, error: BaseException) -> None:
        if isinstance(error, Ended):
            reason = error.reason
        elif isinstance(error, PeerRefused):
            reason = "identity"
        elif isinstance(error, ChannelError):
            reason = "protocol"
        elif isinstance(error, NetError):
            reason = "lost"
        else:
            reason = "internal"
            _log.error("internal error on the connection from %s", connection.peer, exc_info=error)
        self.counts.ended[reason] += 1
        _log.debug("the connection from %s has ended: %s", connection.peer, error)

    async def _accept(self, connection: Connection) -> None:
        identity = self._identity
        connection.slot.speaks()
        stream = await tls_server(
            connection.stream,
            identity.server_context,
            verify=identity.verify_chain,
            timeout=self.limits.handshake_timeout,
        )
        try:
            connection.slot.settle(member=True)
            await self._admitted(stream, stream.info.peer_identity or "")
        finally:
            stream.close()

    async def _admitted(self, stream: TLSStream, peer: str) -> None:
        limits, proxy = self.limits, (peer, stream.peer.host)
        for count, most, name in (
            (self._identities[peer], limits.max_connections_per_identity, "identity"),
            (self._proxies[proxy], limits.max_connections_per_proxy, "proxy"),
        ):
            if count >= most:
                reason = f"more than {most} connections (channel.max_connections_per_{name})"
                await self.say_goodbye(stream, reason)
                raise Ended("limit", f"{peer} at {stream.peer.host} has {reason}")
        self._identities[peer] += 1
        self._proxies[proxy] += 1
        self.counts.accepted += 1
        session = Session(self.views, self.limits.max_subscriptions, self.limits.max_message_bytes)
        link = _Link(self, stream, session, peer)
        self._open.add(session)
        self._links.add(link)
        # A root may have been removed during the handshake, after the chain was checked.
        self._check_trust(link)
        try:
            with link.trusted:
                await link.run()
            raise Ended("identity", "the trust root of the proxy's certificate was removed")
        finally:
            self._links.discard(link)
            self._open.discard(session)
            session.close()
            self.counts.updates += session.updates
            _count_down(self._identities, peer)
            _count_down(self._proxies, proxy)

    async def say_goodbye(self, stream: TLSStream, reason: str) -> None:
        """Tell the proxy why the connection ends. Closes it."""
        with trio.move_on_after(self.limits.write_timeout):
            await stream.send_all(frame(Goodbye(reason)))
            await stream.aclose()

    def welcome(self) -> Welcome:
        """The first message to a proxy."""
        limits, about = self.limits, self.about
        return Welcome(
            about.replica,
            about.domain,
            about.networks,
            limits.max_subscriptions,
            limits.heartbeat_interval,
        )

    def place(self, host: str, peer: str, hello: Hello) -> Place:
        """Where the proxy with the identity `peer` at the address `host` runs."""
        held = self._catalog.holder(host)
        node = hello.node
        if held is not None:
            (namespace, _), pod = held
            if str(self._catalog.identity(namespace, pod.account)) == peer:
                node = pod.node
        zone = self._catalog.zone(node) or (hello.zone if node == hello.node else "")
        return Place(node, zone, SpiffeId.parse(peer).namespace if peer else "")


def _count_down(counts: Counter[T], key: T) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]


class _Link:
    """One connection. The caller runs `run` in `trusted`, and cancels it when the trust root is
    gone."""

    def __init__(self, channel: Channel, stream: TLSStream, session: Session, peer: str) -> None:
        self._channel = channel
        self.stream = stream
        self._session = session
        self._peer = peer
        self.trusted = trio.CancelScope()
        self._wake = trio.Event()
        self._end: Exception | None = None
        self._allowance = float(channel.limits.max_subscriptions)  # entries that it may ask for
        self._counted = trio.current_time()  # when the allowance last grew
        session.on_stale = self._notify

    def _notify(self) -> None:
        self._wake.set()

    async def run(self) -> NoReturn:
        """Serve until it ends. Raises the reason."""
        frames = Frames(MOST_FROM_PROXY)
        session = self._session
        with trio.move_on_after(self._channel.limits.handshake_timeout):
            while session.hello is None:
                await self._receive(frames)
        if session.hello is None:
            raise Ended("timeout", "no Hello in time (channel.handshake_timeout)")
        host = self.stream.peer.host
        session.place = self._channel.place(host, self._peer, session.hello)
        _log.debug("%s at %s is at %s", self._peer, host, session.place)
        await self._send(frame(self._channel.welcome()))
        async with trio.open_nursery() as nursery:
            nursery.cancel_scope.deadline = trio.current_time() + self._lifetime()
            nursery.start_soon(self._until_failure, nursery.cancel_scope, self._write)
            await self._until_failure(nursery.cancel_scope, lambda: self._read(frames))
        if self._end is not None:
            raise self._end
        await self._channel.say_goodbye(self.stream, "it is time to connect again")
        raise Ended("age", "the connection is old")

    def _lifetime(self) -> float:
        age = self._channel.limits.max_age * (0.75 + self._channel.chance.random() / 2)
        return max(0.0, min(age, self.stream.info.peer_not_after - time.time()))

    async def _until_failure(
        self, scope: trio.CancelScope, half: Callable[[], Awaitable[None]]
    ) -> None:
        try:
            await half()
        except (NetError, ChannelError, Ended) as error:
            self._end = self._end or error
            scope.cancel()

    async def _read(self, frames: Frames) -> None:
        limits = self._channel.limits
        limit = limits.max_missed_heartbeats * limits.heartbeat_interval
        while True:
            with trio.move_on_after(limit) as scope:
                await self._receive(frames)
            if scope.cancelled_caught:
                raise Ended("silent", f"no message for {limit:g} s")
            await self._keep_rate()

    async def _keep_rate(self) -> None:
        """Wait until the proxy may ask for entries again (channel.max_subscribe_rate)."""
        limits, now = self._channel.limits, trio.current_time()
        grown = self._allowance + (now - self._counted) * limits.max_subscribe_rate
        self._allowance, self._counted = min(limits.max_subscriptions, grown), now
        if self._allowance < 0:
            await trio.sleep(-self._allowance / limits.max_subscribe_rate)

    async def _receive(self, frames: Frames) -> None:
        data = await self.stream.receive_some()
        if not data:
            raise Ended("closed", "the proxy has closed the connection")
        for part in frames.feed(data):
            message = from_proxy(part)
            self._session.received(message)
            self._allowance -= len(message.entries) if isinstance(message, Subscribe) else 1

    async def _write(self) -> None:
        while True:
            with trio.move_on_after(self._channel.limits.heartbeat_interval):
                await self._wake.wait()
            self._wake = trio.Event()
            sent = False
            while data := self._session.take(_BATCH):
                await self._send(data)
                sent = True
            if not sent:
                await self._send(frame(Ping()))

    async def _send(self, data: bytes) -> None:
        with trio.move_on_after(self._channel.limits.write_timeout):
            await self.stream.send_all(data)
            return
        raise Ended("slow", "the proxy does not read (channel.write_timeout)")
