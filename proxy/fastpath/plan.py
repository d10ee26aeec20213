"""Where a flow tells the fast path what to do with an exchange, and what the fast path borrows for it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import inf
from typing import Any, Protocol

from proxy.exchange.exchange import Exchange
from proxy.exchange.h1.pool import Pool, Upstream
from proxy.exchange.h2.connection import Mux
from proxy.exchange.h2.stream import MuxStream
from proxy.exchange.upstream import Http1Carrier, Http2Carrier
from proxy.exchange.upstream_head import forwarded_request
from proxy.wire.h2.fields import onward_pairs
from proxy.wire.messages import RequestHead, ResponseHead


class ExchangePlan(Protocol):
    """A flow's decisions, as plain functions; the same that its layers make on the ordinary path."""

    def account(self, exchange: Exchange) -> AbstractContextManager[object]:
        """Open the account of an exchange that is under way from here on."""
        ...

    def take(self, exchange: Exchange, now: float) -> ConnectionLease | None:
        """A ready HTTP/1 connection for `exchange` (`now` is trio's time); None: the ordinary path has to see to it, and nothing has
        changed."""
        ...

    def share(self, exchange: Exchange) -> StreamLease | None:
        """The same for an exchange of HTTP/2: a stream of a ready connection."""
        ...


# Seconds that an exchange must be allowed in all: the ordinary path watches what has less (see fast_path.PATIENCE).
LEAST_LIMIT = 2.0


def nothing() -> None:
    """For who has nothing to do at an end."""


def never(_: ResponseHead) -> bool:
    """For who takes every response."""
    return False


@dataclass(slots=True, eq=False)
class ConnectionLease:
    """A kept connection, lent for one exchange (exchange.handoff.Lease)."""

    pool: Pool[Any]
    key: Hashable
    upstream: Upstream
    on_end: Callable[[], None] = nothing
    attempt: Any = None  # the flow's own, for an exchange that is handed over
    on_begin: Callable[[Exchange], None] | None = None  # once its account is open
    limit: float = inf  # trio's time when the exchange has to be over
    declines: Callable[[ResponseHead], bool] = never  # whether a response is for the flow to judge before it goes on

    def unused(self) -> None:
        """It is not wanted after all."""
        self.pool.restore(self.key, self.upstream, self.upstream.idle_since)

    def carrier(self) -> Http1Carrier:
        return Http1Carrier(self.upstream)

    def end(self, *, usable: bool) -> None:
        self.pool.give_back(self.key, self.upstream, usable=usable)
        self.on_end()

    def done(self, now: float) -> None:
        """The exchange ended well, and `upstream.http` has not seen it."""
        self.pool.restore(self.key, self.upstream, now)
        self.on_end()


@dataclass(slots=True, eq=False)
class StreamLease:
    """A connection with room for a stream of one exchange (exchange.handoff.Lease). The room is there until something is waited for."""

    mux: Mux
    on_end: Callable[[], None] = nothing
    attempt: Any = None
    on_begin: Callable[[Exchange], None] | None = None
    limit: float = inf
    declines: Callable[[ResponseHead], bool] = never
    on_answer: Callable[[], None] = nothing  # the head of the response is there
    stream: MuxStream | None = None  # once it is opened
    request: RequestHead | None = None  # that was sent on it
    response: ResponseHead | None = None  # that was taken from it

    def open(self, exchange: Exchange, *, end: bool) -> MuxStream:
        """Send the head of the request."""
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
        """It is not wanted after all."""

    def carrier(self) -> Http2Carrier:
        if self.stream is None or self.request is None:
            raise RuntimeError("the request has not been sent")
        return Http2Carrier.begun(self.stream, self.request, self.response)

    def end(self, *, usable: bool = True) -> None:  # noqa: ARG002  # a stream is used once
        if self.stream is not None:
            self.stream.close()
        self.on_end()
