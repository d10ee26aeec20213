"""The interface between a flow and the fast path: the flow's decisions for an exchange, and the
leases of connections and streams."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import inf
from typing import Any, Protocol

from proxy.exchange.exchange import Exchange
from proxy.exchange.h1.pool import Pool, Upstream
from proxy.exchange.h2.connection import MultiplexedConnection
from proxy.exchange.h2.stream import Http2Stream
from proxy.exchange.upstream import Http1Carrier, Http2Carrier
from proxy.exchange.upstream_head import forwarded_request
from proxy.wire.h2.fields import onward_pairs
from proxy.wire.messages import RequestHead, ResponseHead


class ExchangePlan(Protocol):
    """The decisions of a flow as plain functions. The layers of the ordinary path make the same
    decisions."""

    def account(self, exchange: Exchange) -> AbstractContextManager[object]:
        """Return the account of an exchange that begins now. The caller enters and exits it."""
        ...

    def take(self, exchange: Exchange, now: float) -> ConnectionLease | None:
        """Lease an idle HTTP/1 connection for `exchange` (`now`: trio's time). None: the ordinary
        path has to carry the exchange, and nothing has changed."""
        ...

    def share(self, exchange: Exchange) -> StreamLease | None:
        """Lease a stream of an open HTTP/2 connection for `exchange`. None: the ordinary path has
        to carry the exchange."""
        ...


# Seconds. The ordinary path carries an exchange with a shorter time limit (see fast_path.PATIENCE).
LEAST_LIMIT = 2.0


def nothing() -> None:
    """The default `on_end`: do nothing."""


def never(_: ResponseHead) -> bool:
    """The default `declines`: accept every response."""
    return False


@dataclass(slots=True, eq=False)
class ConnectionLease:
    """A pooled HTTP/1 connection, leased for one exchange. Implements exchange.handoff.Lease."""

    pool: Pool[Any]
    key: Hashable
    upstream: Upstream
    on_end: Callable[[], None] = nothing
    attempt: Any = None  # the flow's state, for an exchange that is handed over
    on_begin: Callable[[Exchange], None] | None = None  # called when the account is open
    limit: float = inf  # deadline of the exchange, in trio's time
    # True: the flow has to judge this response on the ordinary path
    declines: Callable[[ResponseHead], bool] = never

    def unused(self) -> None:
        """Return the connection to the pool; nothing was sent on it."""
        self.pool.restore(self.key, self.upstream, self.upstream.idle_since)

    def carrier(self) -> Http1Carrier:
        return Http1Carrier(self.upstream)

    def end(self, *, usable: bool) -> None:
        self.pool.give_back(self.key, self.upstream, usable=usable)
        self.on_end()

    def done(self, now: float) -> None:
        """End the lease after an exchange that ended well and bypassed `upstream.http`. `now`:
        trio's time."""
        self.pool.restore(self.key, self.upstream, now)
        self.on_end()


@dataclass(slots=True, eq=False)
class StreamLease:
    """A connection that can open a stream for one exchange. Implements exchange.handoff.Lease. Open
    the stream before the next await; the capacity is not reserved."""

    mux: MultiplexedConnection
    on_end: Callable[[], None] = nothing
    attempt: Any = None
    on_begin: Callable[[Exchange], None] | None = None
    limit: float = inf
    declines: Callable[[ResponseHead], bool] = never
    on_answer: Callable[[], None] = nothing  # called when the head of the response has arrived
    stream: Http2Stream | None = None  # set by `open`
    request: RequestHead | None = None  # the head that was sent on it
    response: ResponseHead | None = None  # the head that was received on it

    def open(self, exchange: Exchange, *, end: bool) -> Http2Stream:
        """Open a stream and send the head of the request. `end`: the request has no body. Raises
        HeadTooLarge."""
        request = self.request = exchange.request
        pairs = onward_pairs(request, exchange.caller)
        if pairs is not None:
            stream = self.mux.open_fields(request.method, pairs, end=end)
        else:
            stream = self.mux.open(forwarded_request(exchange), end=end)
        stream.share = exchange.facts.share
        self.stream = stream
        return stream

    def unused(self) -> None:
        """Nothing was opened, so nothing has to be returned."""

    def carrier(self) -> Http2Carrier:
        if self.stream is None or self.request is None:
            raise RuntimeError("the request has not been sent")
        return Http2Carrier.begun(self.mux, self.stream, self.request, self.response)

    def end(self, *, usable: bool = True) -> None:  # noqa: ARG002  # a stream is used once
        if self.stream is not None:
            self.stream.close()
        self.on_end()
