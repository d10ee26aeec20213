"""The interface between a flow and the fast path: the flow's planner, and the leases of connections
and streams."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import AbstractContextManager
from math import inf
from typing import Generic, Protocol, TypeVar

from proxy.exchange.exchange import Exchange, ExchangePlan
from proxy.exchange.h1.pool import Pool, Upstream
from proxy.exchange.h2.connection import MultiplexedConnection
from proxy.exchange.h2.stream import Http2Stream
from proxy.exchange.upstream import Http1Carrier, Http2Carrier
from proxy.exchange.upstream_head import forwarded_request
from proxy.wire.h2.fields import onward_pairs
from proxy.wire.messages import RequestHead, ResponseHead

K_co = TypeVar("K_co", bound=Hashable, covariant=True)

# Seconds. The ordinary path carries an exchange with a shorter time limit (see fast_path.PATIENCE).
LEAST_LIMIT = 2.0


class Planner(Protocol):
    """Plans the exchanges of a flow on the fast path. The decisions are those of the ordinary path:
    the flow makes them in one place, and the layers in exchange/ have one function for both.

    If `take` or `share` return None, the ordinary path has to carry the exchange. Nothing was sent.
    If they have drawn something at random (an endpoint, a trace), they have set `exchange.handoff`,
    because a second draw would change the odds. Then the exchange has to continue, and must not be
    read again.
    """

    def account(self, exchange: Exchange) -> AbstractContextManager[object]:
        """Return the account of an exchange that begins now. The caller enters and exits it."""
        ...

    def take(self, exchange: Exchange, now: float) -> ConnectionLease[Hashable] | None:
        """Lease an idle HTTP/1 connection for `exchange` (`now`: trio's time)."""
        ...

    def share(self, exchange: Exchange) -> StreamLease | None:
        """Lease a stream of an open HTTP/2 connection for `exchange`."""
        ...


class ConnectionLease(Generic[K_co]):
    """A pooled HTTP/1 connection, leased for one exchange. Implements exchange.exchange.Lease.

    `plan`: None if the flow needs no plan of its own for an exchange. `limit`: the deadline of the
    exchange, in trio's time.
    """

    __slots__ = ("_key", "_pool", "limit", "plan", "upstream")

    def __init__(self, pool: Pool[K_co], key: K_co, upstream: Upstream) -> None:
        self._pool = pool
        self._key = key
        self.upstream = upstream
        self.plan: ExchangePlan | None = None
        self.limit = inf

    def cancel(self) -> None:
        """Return the connection to the pool; nothing was sent on it."""
        self._pool.restore(self._key, self.upstream, self.upstream.idle_since)

    def carrier(self) -> Http1Carrier:
        return Http1Carrier(self.upstream)

    def end(self, *, usable: bool) -> None:
        self._pool.give_back(self._key, self.upstream, usable=usable)

    def done(self, now: float) -> None:
        """End the lease after an exchange that ended well and bypassed `upstream.http`. `now`:
        trio's time."""
        self._pool.restore(self._key, self.upstream, now)


class StreamLease:
    """A connection that can open a stream for one exchange. Implements exchange.exchange.Lease.
    Open the stream before the next await; the capacity is not reserved. `plan`, `limit`: as for a
    `ConnectionLease`."""

    __slots__ = ("_request", "_stream", "limit", "mux", "plan", "response")

    def __init__(self, mux: MultiplexedConnection) -> None:
        self.mux = mux
        self.plan: ExchangePlan | None = None
        self.limit = inf
        self.response: ResponseHead | None = None  # the head that was received on the stream
        self._stream: Http2Stream | None = None  # set by `open`
        self._request: RequestHead | None = None  # the head that was sent on it

    def open(self, exchange: Exchange, *, end: bool) -> Http2Stream:
        """Open a stream and send the head of the request. `end`: the request has no body. Raises
        HeadTooLarge."""
        request = self._request = exchange.request
        pairs = onward_pairs(request, exchange.caller)
        if pairs is not None:
            stream = self.mux.open_fields(request.method, pairs, end=end)
        else:
            stream = self.mux.open(forwarded_request(exchange), end=end)
        stream.share = exchange.facts.share
        self._stream = stream
        return stream

    def carrier(self) -> Http2Carrier:
        if self._stream is None or self._request is None:
            raise RuntimeError("the request has not been sent")
        return Http2Carrier.of_stream(self.mux, self._stream, self._request, self.response)

    def end(self, *, usable: bool = True) -> None:  # noqa: ARG002  # a stream is used once
        if self._stream is not None:
            self._stream.close()
