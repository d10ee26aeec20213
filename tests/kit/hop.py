"""A proxy made of the parts of proxy/exchange, between real clients and servers, and what it has
recorded."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import trio

from proxy.exchange.client import Client
from proxy.exchange.client_settings import ClientSettings
from proxy.exchange.exchange import ConnectionInfo, Exchange, Layer, stack
from proxy.exchange.h1.pool import Pool, PoolSettings
from proxy.exchange.h1.server import Http1FastPath, Http1Server
from proxy.exchange.layers import deadline, measure, rescue
from proxy.exchange.leases import Http1Leases
from proxy.exchange.server_settings import Drain, ServerSettings
from proxy.exchange.trace_layer import Side, Tracing, trace
from proxy.fastpath.fast_path import FastPath
from proxy.fastpath.plan import ConnectionLease, StreamLease
from proxy.net.accept import Acceptor, Connection
from proxy.net.address import Address
from proxy.net.dial import Dialer
from proxy.net.relay import relay
from proxy.net.socket_stream import SocketStream, Stream
from tests.kit.http import Peer, Script, connect, listen, origin, small, until


@dataclass
class Ended:
    """What the measure layer recorded of an exchange."""

    status: int | None
    failure: str | None
    words: str
    attempts: int
    request_bytes: int
    response_bytes: int


class Counts(Protocol):
    """The counter of a pool's connections."""

    closed: int


@dataclass
class Life:
    """The pool's record of one connection."""

    hop: Counts
    open: bool = True

    def close(self) -> None:
        assert self.open, "a record was closed twice"
        self.open = False
        self.hop.closed += 1


@dataclass
class Hop:
    """A proxy made of the parts of proxy/exchange, and what it has recorded."""

    target: Address
    pool: Pool[Address] = field(init=False)
    address: Address = field(init=False)
    acceptor: Acceptor = field(init=False)
    drain: Drain = field(default_factory=Drain)
    ended: list[Ended] = field(default_factory=list)
    errors: list[BaseException] = field(
        default_factory=list
    )  # that reached the connection boundary
    dialled: int = 0
    closed: int = 0
    hangs: trio.Event | None = None  # dialling waits for it
    fast_path: FastPath | None = None
    carry: Http1FastPath | None = None
    fast: int = 0  # exchanges started on the fast path
    raises: Exception | None = None  # by the endpoint, instead of an exchange
    clients: list[Peer] = field(default_factory=list)

    async def connect(self, buffers: int | None = None) -> Peer:
        """A new client, closed with the hop at the latest."""
        self.clients.append(await connect(self.address, buffers))
        return self.clients[-1]

    async def idle(self, seconds: float = 20) -> None:
        """Wait until no exchange is in progress."""
        await until(lambda: self.pool.counts()[0] == 0, seconds)

    async def gone(self, seconds: float = 20) -> None:
        """Wait until no downstream connection is left."""
        await until(lambda: self.acceptor.open == 0, seconds)


@dataclass
class Settings:
    """How a hop is configured. `open_to`: whether clients get details of errors; `buffers`: of the
    proxy's own sockets, in bytes."""

    server: ServerSettings = field(default_factory=ServerSettings)
    client: ClientSettings = field(default_factory=ClientSettings)
    pool: PoolSettings = field(default_factory=PoolSettings)
    open_to: bool = True
    name: bytes = b"test"
    buffers: int | None = None
    dial_timeout: float = 5.0
    tunnel_idle: float = 10.0
    layers: tuple[Layer, ...] = ()  # between rescue and deadline
    tracing: Tracing | None = None
    side: Side = "server"
    fast: bool | None = None  # None: as FAST says


# Whether hops have a fast path: set for the tests that run on both paths
# (tests/exchange/conftest.py).
FAST: ContextVar[bool] = ContextVar("FAST", default=False)


@dataclass
class _Plan:
    """The hop's decisions on the fast path."""

    hop: Hop
    account: Callable[[Exchange], AbstractContextManager[None]]

    def take(self, _: Exchange, now: float) -> ConnectionLease[Address] | None:
        upstream = self.hop.pool.take(self.hop.target, now) if self.hop.raises is None else None
        if upstream is None:
            return None
        self.hop.fast += 1
        return ConnectionLease(self.hop.pool, self.hop.target, upstream)

    def share(self, _: Exchange) -> StreamLease | None:
        raise AssertionError("a hop speaks HTTP/1 only")


def _pave(
    proxy: Hop, settings: Settings, book: Callable[[Exchange], AbstractContextManager[None]]
) -> None:
    if (
        FAST.get() and not settings.layers and settings.tracing is None
        if settings.fast is None
        else settings.fast
    ):
        proxy.fast_path = FastPath(proxy.drain, settings.server.idle_timeout, settings.tunnel_idle)
        proxy.carry = partial(proxy.fast_path.prepare, _Plan(proxy, book))


async def _serve(nursery: trio.Nursery, proxy: Hop, listener: socket.socket) -> None:
    if proxy.fast_path is not None:
        await proxy.fast_path.open()
        nursery.start_soon(proxy.fast_path.run)
    nursery.start_soon(proxy.acceptor.serve, [listener])


@asynccontextmanager
async def hop(target: Address, settings: Settings | None = None) -> AsyncIterator[Hop]:
    """A running proxy to `target`. At its end all its connections must have been returned and
    closed, each once."""
    settings = settings or Settings()
    proxy = Hop(target=target)
    dialer = Dialer(timeout=settings.dial_timeout)

    async def dial(address: Address) -> Stream:
        if proxy.hangs is not None:
            await proxy.hangs.wait()
        stream = await dialer.dial(address)
        small(stream.socket, settings.buffers)
        return stream

    def account(_: Stream) -> Life:
        proxy.dialled += 1
        return Life(proxy)

    async def bridge(_: Exchange, client: Stream, server: Stream) -> None:
        await relay(
            client,
            server,
            idle=settings.tunnel_idle,
            carry=proxy.fast_path.join if proxy.fast_path is not None else None,
        )

    @contextmanager
    def book(exchange: Exchange) -> Iterator[None]:
        try:
            yield
        finally:
            status = exchange.response.status if exchange.response else None
            counted = exchange.attempts, exchange.request_bytes, exchange.response_bytes
            proxy.ended.append(Ended(status, exchange.failure, exchange.failure_words, *counted))

    _pave(proxy, settings, book)
    proxy.pool = Pool(dial, account, settings.pool, settings.server.limits)
    client: Client[Address] = Client(settings.client, bridge)
    leases = Http1Leases(proxy.pool)

    async def send(exchange: Exchange) -> None:
        if proxy.raises is not None:
            raise proxy.raises
        await client.send(exchange, proxy.target, leases)

    handler = stack(
        measure(book),
        trace(settings.tracing, settings.side),
        rescue(lambda _: settings.name, lambda _: settings.open_to),
        *settings.layers,
        deadline,
        endpoint=send,
    )

    async def serve(connection: Connection) -> None:
        assert isinstance(connection.stream, SocketStream)
        facts = ConnectionInfo("outbound", connection.peer, proxy.target)
        await Http1Server(connection.stream, facts, settings.server, proxy.drain, proxy.carry).run(
            handler
        )

    listener = listen(settings.buffers)
    proxy.address = Address.of(listener.getsockname())
    proxy.acceptor = Acceptor(
        serve, limit=4096, on_error=lambda _, error: proxy.errors.append(error)
    )
    async with trio.open_nursery() as nursery:
        await _serve(nursery, proxy, listener)
        try:
            yield proxy
        finally:
            nursery.cancel_scope.cancel()
            for peer in proxy.clients:
                peer.close()
    assert proxy.pool.counts()[0] == 0, "connections that were not returned"
    proxy.pool.close()
    assert proxy.pool.counts() == (0, 0)
    assert proxy.dialled == proxy.closed, "connections that were not closed"


@asynccontextmanager
async def through(
    script: Script, settings: Settings | None = None, *, buffers: int | None = None
) -> AsyncIterator[tuple[Peer, Hop]]:
    """A client connected by a hop to a server that runs `script`."""
    async with origin(script, buffers=buffers) as server, hop(server.address, settings) as proxy:
        yield await proxy.connect(buffers), proxy
