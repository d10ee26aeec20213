"""The connection pools of a flow, one per protocol, and the protocol for an upstream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Generic, TypeVar

from proxy.directory import Endpoint, Hint, Target
from proxy.errors import RequestError
from proxy.exchange.client import Leases
from proxy.exchange.exchange import Direction, Exchange
from proxy.exchange.h1.pool import Pool
from proxy.exchange.h2.pool import Http2Pool
from proxy.exchange.leases import Http1Leases, Http2Leases
from proxy.fastpath.plan import ConnectionLease, StreamLease
from proxy.flows.runtime import Runtime
from proxy.identity.tls_contexts import ALPN_HTTP1, ALPN_HTTP2
from proxy.net.address import Address
from proxy.net.socket_stream import Stream
from proxy.telemetry.records import StreamAccount
from proxy.wire import websocket
from proxy.wire.sniff import Protocol

K = TypeVar("K", bound=Hashable)


class Pools(Generic[K]):
    """One pool per version of HTTP. `connect` opens a connection that speaks the protocol of its
    ALPN name."""

    def __init__(
        self, rt: Runtime, direction: Direction, connect: Callable[[K, bytes], Awaitable[Stream]]
    ) -> None:
        account = partial(rt.recorder.upstream, direction)
        self._http1: Pool[K] = Pool(
            lambda key: connect(key, ALPN_HTTP1), account, rt.settings.pool, rt.settings.limits
        )
        self._http2: Http2Pool[K] = Http2Pool(
            lambda key: connect(key, ALPN_HTTP2), account, rt.settings.pool, rt.settings.upstream
        )
        self._clients: Counter[K] = Counter()
        self._counted = self._draining = False
        self._leases: dict[Protocol, Leases[K]] = {
            Protocol.HTTP1: Http1Leases(self._http1),
            Protocol.HTTP2: Http2Leases(self._http2),
        }

    def take(self, key: K, now: float) -> ConnectionLease[K] | None:
        """An idle HTTP/1 connection for the fast path, if there is one. `now` is trio's time."""
        upstream = self._http1.take(key, now)
        return None if upstream is None else ConnectionLease(self._http1, key, upstream)

    def adopt(self, key: K, stream: Stream, account: StreamAccount) -> None:
        """Add an HTTP/1 connection on which no byte was sent or read. The pool closes `stream` and
        `account`."""
        self._http1.adopt(key, stream, account)

    def share(self, key: K) -> StreamLease | None:
        """An HTTP/2 connection that can open another stream, if there is one."""
        mux = self._http2.ready(key)
        return None if mux is None else StreamLease(mux)

    def leases(self, protocol: Protocol) -> Leases[K]:
        return self._leases[protocol]

    async def serve(self) -> None:
        """Run the tasks of the HTTP/2 connections until cancelled."""
        await self._http2.serve()

    def counts(self) -> tuple[int, int]:
        """(connections in use, idle connections)"""
        one, two = self._http1.counts(), self._http2.counts()
        return one[0] + two[0], one[1] + two[1]

    @contextmanager
    def client(self, key: K) -> Iterator[None]:
        """Register a client connection whose requests go to `key`, for a block. After the first
        registration, `sweep` limits the connections to each key to the number of its clients. So a
        server that drains waits only for connections that its clients still have."""
        self._counted = True
        self._clients[key] += 1
        try:
            yield
        finally:
            self._clients[key] -= 1
            if not self._clients[key]:
                del self._clients[key]
            if self._draining:
                self._trim()

    def sweep(self) -> None:
        """Close connections that are too old or too many. Called about twice a second."""
        self._http1.sweep()
        self._http2.sweep()
        if self._counted:
            self._trim()

    def drain(self) -> None:
        """The server is about to stop, and may wait for its open connections. From now on the pool
        closes surplus connections at once."""
        self._draining = True
        self._trim()

    def _trim(self) -> None:
        self._http1.trim(self._clients)
        self._http2.trim(self._clients)

    def close(self) -> None:
        self._http1.close()
        self._http2.close()


def protocol_of(version: bytes) -> Protocol:
    """The protocol in which a request arrived."""
    return Protocol.HTTP2 if version == b"2" else Protocol.HTTP1


def upstream_protocol(exchange: Exchange, target: Target) -> Protocol:
    """The protocol that the directory declares for the service, otherwise the client's protocol.
    Raises RequestError (501) for an extended CONNECT that has no form in HTTP/1."""
    request = exchange.request
    if target.protocol is Hint.HTTP1:
        protocol = Protocol.HTTP1
    elif target.protocol is Hint.HTTP2:
        protocol = Protocol.HTTP2
    else:
        protocol = protocol_of(request.version)
    if protocol is Protocol.HTTP1 and request.protocol is not None and not websocket.asks(request):
        raise RequestError(
            "CONNECT with a :protocol other than websocket, to a server that speaks HTTP/1", 501
        )
    return protocol


def endpoint_pools(rt: Runtime, direction: Direction) -> Pools[Endpoint]:
    """The connection pools to endpoints."""
    return Pools(rt, direction, rt.connect)


def application_pools(rt: Runtime) -> Pools[Address]:
    """The connection pools to the application."""

    async def connect(address: Address, _: bytes) -> Stream:
        return await rt.dialer.dial(address)

    return Pools(rt, "inbound", connect)
