"""A proxy for both versions of HTTP, made of the parts of proxy/exchange, between real clients and
servers."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial

import trio

from proxy.exchange.client import Client, Leases
from proxy.exchange.client_settings import ClientSettings
from proxy.exchange.exchange import ConnectionInfo, Exchange, stack
from proxy.exchange.h1.pool import Pool, PoolSettings
from proxy.exchange.h1.server import Http1Server
from proxy.exchange.h2.connection import MultiplexedConnection
from proxy.exchange.h2.pool import Http2Pool
from proxy.exchange.h2.server import Http2Server
from proxy.exchange.h2.settings import Http2Settings
from proxy.exchange.layers import deadline, measure, rescue
from proxy.exchange.leases import Http1Leases, Http2Leases
from proxy.exchange.server_settings import Drain, ServerSettings
from proxy.exchange.upgrade import carry
from proxy.fastpath.fast_path import FastPath
from proxy.fastpath.plan import ConnectionLease, StreamLease
from proxy.net.accept import Acceptor, Connection
from proxy.net.address import Address
from proxy.net.dial import Dialer
from proxy.net.relay import relay
from proxy.net.socket_stream import SocketStream, Stream
from proxy.wire.sniff import Protocol
from tests.kit.hop import FAST, Ended, Life
from tests.kit.http import Peer, connect, listen, origin, small, until
from tests.kit.http2_peers import Peer2, Script2, speaking


def _nothing(_: Exchange) -> AbstractContextManager[object]:
    return contextlib.nullcontext()


@dataclass
class Settings2:
    """How a hop is configured. `up`: the versions that the endpoints support, b"2" or b"1.1"."""

    server: ServerSettings = field(default_factory=ServerSettings)
    client: ClientSettings = field(default_factory=ClientSettings)
    pool: PoolSettings = field(default_factory=PoolSettings)
    downstream: Http2Settings = field(default_factory=Http2Settings)
    upstream: Http2Settings = field(default_factory=Http2Settings)
    up: bytes = b"2"
    buffers: int | None = None
    account: Callable[[Exchange], AbstractContextManager[object]] | None = None
    steer: Callable[[Exchange, Callable[[Address], Awaitable[None]]], Awaitable[None]] | None = (
        None  # instead of taking turns
    )
    around: Callable[[Exchange], AbstractContextManager[object]] = _nothing  # inside of `rescue`
    fast: bool | None = None  # whether there is a fast path; None: as FAST says


@dataclass
class Hop2:
    """A proxy for both versions of HTTP, and what it has recorded."""

    targets: list[Address]
    pool1: Pool[Address] = field(init=False)
    pool2: Http2Pool[Address] = field(init=False)
    address: Address = field(init=False)
    acceptor: Acceptor = field(init=False)
    drain: Drain = field(default_factory=Drain)
    ended: list[Ended] = field(default_factory=list)
    outcomes: list[str] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)
    servers: list[Http2Server] = field(default_factory=list)  # that run
    streams: list[Stream] = field(default_factory=list)  # to the endpoints
    served: int = 0
    dialled: int = 0
    closed: int = 0
    hangs: trio.Event | None = None
    clients: list[Peer] = field(default_factory=list)
    fast_path: FastPath | None = None
    fast: int = 0  # exchanges started on the fast path

    async def connect(self, buffers: int | None = None) -> Peer:
        self.clients.append(await connect(self.address, buffers))
        return self.clients[-1]

    async def connect2(
        self,
        buffers: int | None = None,
        settings: dict[int, int] | None = None,
        *,
        checked: bool = True,
    ) -> Peer2:
        peer = Peer2(await self.connect(buffers), client=True, settings=settings, checked=checked)
        await peer.start()
        return peer

    @property
    def exchanges(self) -> int:
        """Streams open in all muxes."""
        return sum(server.mux.exchanges for server in self.servers) + sum(
            mux.exchanges for mux in self.muxes()
        )

    def muxes(self) -> list[MultiplexedConnection]:
        return [mux for slot in self.pool2._slots.values() for mux in slot.muxes]

    async def idle(self, seconds: float = 20) -> None:
        """Wait until no exchange is in progress anywhere."""
        await until(lambda: self.exchanges == 0 and self.pool1.counts()[0] == 0, seconds)

    async def gone(self, seconds: float = 20) -> None:
        await until(lambda: self.acceptor.open == 0, seconds)

    def next_target(self) -> Address:
        self.served += 1
        return self.targets[self.served % len(self.targets)]


@dataclass
class _Plan:
    """The hop's decisions on the fast path."""

    hop: Hop2
    account: Callable[[Exchange], AbstractContextManager[object]]

    def take(self, _: Exchange, now: float) -> ConnectionLease[Address] | None:
        return None

    def share(self, _: Exchange) -> StreamLease | None:
        served = self.hop.served
        mux = self.hop.pool2.ready(self.hop.next_target())
        if mux is None:
            self.hop.served = served
            return None
        self.hop.fast += 1
        return StreamLease(mux)


@contextmanager
def _book(proxy: Hop2, exchange: Exchange) -> Iterator[None]:
    outcome = "done"
    try:
        yield
    except trio.Cancelled:
        outcome = "cancelled"
        raise
    except BaseException:
        outcome = "raised"
        raise
    finally:
        status = exchange.response.status if exchange.response else None
        counted = exchange.attempts, exchange.request_bytes, exchange.response_bytes
        proxy.ended.append(Ended(status, exchange.failure, exchange.failure_words, *counted))
        proxy.outcomes.append(outcome)


@dataclass
class _LeasesByProtocol:
    by: dict[Protocol, Leases[Address]]

    def leases(self, protocol: Protocol) -> Leases[Address]:
        return self.by[protocol]


def _pools(proxy: Hop2, settings: Settings2) -> dict[Protocol, Leases[Address]]:
    dialer = Dialer(timeout=5)

    async def dial(address: Address) -> Stream:
        if proxy.hangs is not None:
            await proxy.hangs.wait()
        stream = await dialer.dial(address)
        small(stream.socket, settings.buffers)
        proxy.streams.append(stream)
        return stream

    def account(_: Stream) -> Life:
        proxy.dialled += 1
        return Life(proxy)

    proxy.pool1 = Pool(dial, account, settings.pool, settings.server.limits)
    proxy.pool2 = Http2Pool(dial, account, settings.pool, settings.upstream)
    return {Protocol.HTTP1: Http1Leases(proxy.pool1), Protocol.HTTP2: Http2Leases(proxy.pool2)}


def _serving(proxy: Hop2, settings: Settings2) -> Callable[[Connection], Awaitable[None]]:
    async def bridge(exchange: Exchange, client: Stream, server: Stream) -> None:
        await relay(client, server, idle=10)

    leases_by_protocol = _LeasesByProtocol(_pools(proxy, settings))
    up = Protocol.HTTP2 if settings.up == b"2" else Protocol.HTTP1
    client: Client[Address] = Client(settings.client, bridge)

    async def send(exchange: Exchange) -> None:
        if settings.steer is not None:
            await settings.steer(
                exchange, lambda address: carry(client, exchange, address, leases_by_protocol, up)
            )
            return
        with settings.around(exchange):
            await carry(client, exchange, proxy.next_target(), leases_by_protocol, up)

    account = settings.account or (lambda exchange: _book(proxy, exchange))
    handler = stack(
        measure(account), rescue(lambda _: b"test", lambda _: True), deadline, endpoint=send
    )

    async def serve(connection: Connection) -> None:
        assert isinstance(connection.stream, SocketStream)
        small(connection.stream.socket, settings.buffers)
        facts = ConnectionInfo("outbound", connection.peer, proxy.targets[0])
        if await connection.stream.peek(4, 4) != b"PRI ":
            await Http1Server(connection.stream, facts, settings.server, proxy.drain).run(handler)
            return
        server = Http2Server(
            connection.stream, facts, settings.server, settings.downstream, proxy.drain
        )
        if proxy.fast_path is not None:
            server.fork = partial(proxy.fast_path.fork, _Plan(proxy, account))
        proxy.servers.append(server)
        try:
            await server.run(handler)
        finally:
            proxy.servers.remove(server)

    return serve


def _start(nursery: trio.Nursery, *tasks: Callable[[], Awaitable[None]]) -> None:
    for task in tasks:
        nursery.start_soon(task)


@asynccontextmanager
async def hop2(*targets: Address, settings: Settings2 | None = None) -> AsyncIterator[Hop2]:
    """A running proxy to `targets`, which take turns. At its end everything must have been returned
    and closed, once."""
    settings = settings or Settings2()
    proxy = Hop2(list(targets))
    plain = settings.up == b"2" and settings.steer is None and settings.around is _nothing
    if (FAST.get() and plain) if settings.fast is None else settings.fast:
        proxy.fast_path = FastPath(proxy.drain, settings.server.idle_timeout, 10)
    serve = _serving(proxy, settings)
    listener = listen(settings.buffers)
    proxy.address = Address.of(listener.getsockname())
    proxy.acceptor = Acceptor(
        serve, limit=4096, on_error=lambda _, error: proxy.errors.append(error)
    )
    async with trio.open_nursery() as nursery:
        pooled = trio.CancelScope()

        async def own() -> None:
            with pooled:
                await proxy.pool2.serve()

        _start(nursery, own, partial(proxy.acceptor.serve, [listener]))
        if proxy.fast_path is not None:
            await proxy.fast_path.open()
            nursery.start_soon(proxy.fast_path.run)
        try:
            yield proxy
        finally:
            nursery.cancel_scope.cancel()
            for peer in proxy.clients:
                peer.close()
    proxy.pool1.close()
    assert proxy.pool1.counts() == (0, 0)
    assert not proxy.pool2._slots, "what the pool should have removed"
    assert proxy.dialled == proxy.closed, "connections that were not closed"
    assert all(isinstance(s, SocketStream) and s.closed for s in proxy.streams), (
        "sockets that were not closed"
    )
    assert not proxy.errors, proxy.errors


@asynccontextmanager
async def through2(
    script: Script2,
    settings: Settings2 | None = None,
    *,
    server: dict[int, int] | None = None,
    buffers: int | None = None,
) -> AsyncIterator[tuple[Peer2, Hop2]]:
    """An HTTP/2 client connected by a hop to an HTTP/2 server that runs `script`."""
    async with (
        origin(speaking(script, server), buffers=buffers) as up,
        hop2(up.address, settings=settings) as proxy,
    ):
        yield await proxy.connect2(buffers), proxy
