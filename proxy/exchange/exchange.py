"""One request and its response, as the layers and flows see them.

One call handles an exchange: `await handler(exchange)` returns when the whole response, including
its body, has been sent to the client. So a layer is a plain function around that call. It acts
before the handler, when it sees the request, and after the handler, when it knows how everything
ended. A task that the exchange needs (the pump of a request body) runs in a nursery inside this
call.

    handler(exchange)
        exchange.body.receive() ...            the request body, piece by piece
        exchange.inform(head)                  any number of interim responses
        exchange.respond(head, body)           once: the whole response, streamed
     or exchange.switch(head) -> Stream        once: raw bytes from here on (101, or 2xx to CONNECT)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Literal, Protocol

import trio

from proxy.errors import ClientGone
from proxy.exchange.timer import NO_TIMER
from proxy.net.address import Address
from proxy.net.connection_slots import Slot
from proxy.net.memory_budget import UNCOUNTED, Share
from proxy.net.socket_stream import Stream
from proxy.net.tls.handshake import TLSInfo, TLSStream
from proxy.wire import grpc
from proxy.wire.h1.body import Length
from proxy.wire.messages import END, EndOfMessage, Headers, ProtocolError, RequestHead, ResponseHead
from proxy.wire.sniff import Protocol as Spoken
from tracing.sampling import Trace

if TYPE_CHECKING:
    from proxy.exchange.client_settings import ClientSettings
    from proxy.exchange.upstream import Carrier


class Body(Protocol):
    """A body that is streamed. After its end, every call returns EndOfMessage again."""

    @property
    def length(self) -> Length:
        """The bytes that are still to come, or how the sender delimits the body."""
        ...

    def receive_nowait(self) -> bytes | EndOfMessage | None:
        """Return the next piece (never empty) or the end, if it has arrived. None: not yet."""
        ...

    async def receive(self) -> bytes | EndOfMessage:
        """Return the next piece (never empty) or the end. Raises the errors of the source."""
        ...


class Whole:
    """A body in memory, such as that of the proxy's own responses."""

    __slots__ = ("_data",)

    def __init__(self, data: bytes = b"") -> None:
        self._data = data

    @property
    def length(self) -> Length:
        return len(self._data)

    def receive_nowait(self) -> bytes | EndOfMessage:
        data, self._data = self._data, b""
        return data or END

    async def receive(self) -> bytes | EndOfMessage:
        await trio.lowlevel.checkpoint()
        return self.receive_nowait()


Direction = Literal["inbound", "outbound", "gateway"]


@dataclass(slots=True)
class ConnectionInfo:
    """What is known about the downstream connection of an exchange or a relayed stream."""

    direction: Direction
    peer: Address
    destination: Address  # the original destination, before the redirection
    tls: TLSInfo | None = None
    # the verified identity of the peer; None: it presented no client certificate
    identity: str | None = None
    protocol: Spoken = Spoken.OPAQUE
    upstream: Address | None = None  # where the connection, or its last exchange, was sent
    upstream_tls: TLSInfo | None = None
    # how many of this proxy's own connections it is nested in (loopguard/nesting.py)
    depth: int = 0
    declined_requests: int = 0  # HTTP/1 heads that needed the full parser (wire/h1/fast_head.py)
    declined_responses: int = 0
    service: str | None = None  # for a relayed connection; see Exchange
    chosen: str | None = None
    trace: Trace | None = None
    slot: Slot | None = None  # the connection slot of the listener
    unsure: bool = False  # relayed, but later bytes of the client may still show that it is HTTP
    # the bytes were not announced as HTTP, so the mesh fields in them are not from the peer, even
    # if it is a gateway
    unnamed: bool = False
    share: Share = UNCOUNTED  # buffers of the connection are charged to it

    def record_upstream(self, stream: Stream) -> None:
        """Record the upstream connection of this connection."""
        self.upstream = stream.peer
        self.upstream_tls = stream.info if isinstance(stream, TLSStream) else None


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """A failed attempt at an exchange, which was followed by another one. Times in trio's time."""

    upstream: Address
    started: float
    ended: float
    status: int  # status of its response; 0: none
    reason: str  # why it was repeated: a reason of errors.py, or `status`, `grpc_status`
    chosen: str | None = None  # see Exchange
    request_bytes: int = 0  # bytes of the body that were sent


# Called with the final head, and with the trailers if the response has already ended without a body
# (None: it has not). Returns True to drop the response and make another attempt.
Judge = Callable[[ResponseHead, Headers | None], bool]


def _ignore_status(_: int) -> None:
    pass


def _ignore_attempt(_: Exchange) -> None:
    pass


class Exchange(ABC):
    """One request and its response. A server creates it and a handler carries it to its end."""

    __slots__ = (
        "account",
        "attempts",
        "authority",
        "body",
        "caller",
        "chosen",
        "cycle",
        "facts",
        "failure",
        "failure_words",
        "fresh",
        "grpc_status",
        "guarded",
        "handoff",
        "informed",
        "judge",
        "left",
        "loop",
        "malformed",
        "on_attempt",
        "on_response",
        "outside",
        "request",
        "request_bytes",
        "response",
        "response_bytes",
        "service",
        "timer",
        "times",
        "trace",
        "tried",
        "upstream",
        "upstream_tls",
    )  # fmt: skip

    def __init__(
        self,
        request: RequestHead,
        body: Body,
        facts: ConnectionInfo,
        malformed: ProtocolError | None = None,
    ) -> None:
        self.request = request
        # the error in an unreadable request, which only gets an error response
        self.malformed = malformed
        self.body = body
        self.facts = facts
        self.response: ResponseHead | None = None  # the final head, once sending has begun
        self.on_response: Callable[[int], None] = _ignore_status  # called with the final status
        # called before each attempt, when `upstream` is set
        self.on_attempt: Callable[[Exchange], None] = _ignore_attempt
        self.grpc_status: bytes | None = None  # from the trailers
        self.trace: Trace | None = None
        self.service: str | None = None  # the requested service, as the directory names it
        self.chosen: str | None = None  # the service chosen for it, by a split or a failover
        self.upstream: Address | None = None  # the endpoint of the last attempt
        self.upstream_tls: TLSInfo | None = None
        # why the proxy created the response or cut it off: a reason of errors.py
        self.failure: str | None = None
        self.failure_words = ""
        self.loop: str | None = None  # the kind of the loop that was detected
        # the names on the loop (`west/web-1 -> east/gateway -> west/web-1`), as far as known
        self.cycle = ""
        # the response will reach a client without an identity, though not directly
        self.outside = False
        self.authority: bytes | None = None  # authority for the next hop; None: the client's own
        # verified identity of the caller, for the next hop; None: not sent
        self.caller: bytes | None = None
        self.account: ExitStack | None = None  # closes the account that the fast path has opened
        self.handoff: Handoff | None = None  # set if the fast path has handed the exchange over
        self.guarded = False  # the loop guard has run on the fast path
        # a connection was closed during the exchange; it is repeated once, on a new one only
        self.fresh = False
        self.attempts = 0  # number of connections that it was sent on
        self.tried: list[FailedAttempt] | None = None  # earlier attempts; None: none
        self.judge: Judge | None = None  # decides whether to drop the response and try again
        self.informed = False  # an interim response was sent to the client
        self.times: ClientSettings | None = None  # overrides of the client's settings
        self.request_bytes = 0
        self.response_bytes = 0
        self.left = False  # the client has disconnected
        self.timer = NO_TIMER

    def record_upstream(self, stream: Stream) -> None:
        """Record the connection to the endpoint that now carries this exchange."""
        self.record_upstream_address(
            stream.peer, stream.info if isinstance(stream, TLSStream) else None
        )

    def record_upstream_address(self, peer: Address, tls: TLSInfo | None) -> None:
        """Record the address and the TLS information of the connection that now carries this
        exchange."""
        facts = self.facts
        facts.upstream = self.upstream = peer
        facts.upstream_tls = self.upstream_tls = tls
        self.on_attempt(self)
        self.attempts += 1

    def give_up(self) -> None:
        """The client has disconnected: end the exchange with ClientGone, in whichever state it
        is."""
        self.left = True
        self.timer.give_up(self._client_went)

    def _client_went(self) -> Exception:
        return ClientGone(
            f"the client closed its connection {'before' if self.response is None else 'while'} it"
            " got its response"
        )

    # Not abstract: only HTTP/1 has half-closed connections.
    def pass_half_close(self, tell: Callable[[], None] | None) -> None:  # noqa: B027
        """The whole request has been sent: from now on, call `tell` once if the client ends its
        direction of the connection. None: stop.

        Only HTTP/1 has half-closed connections. A client that ends its HTTP/2 connection has
        disconnected.
        """

    @property
    def underway(self) -> bool:
        """The fast path has sent it; the ordinary path continues it."""
        return self.handoff is not None and self.handoff.lease is not None

    @abstractmethod
    async def inform(self, head: ResponseHead) -> None:
        """Send an interim response (1xx but not 101), if the client supports it."""

    @abstractmethod
    async def respond(self, head: ResponseHead, body: Body) -> None:
        """Send the final response with its whole body. Raises the errors of `body`, and ClientGone
        when the client has disconnected."""

    async def go_on(self, unsent: bytes, body: Body) -> None:
        """Continue a response whose head the fast path has sent: send `unsent`, then the rest of
        `body`. Raises like `respond`."""
        # Not abstract: only the exchanges of a server begin on the fast path, and tests of layers
        # use others.
        raise NotImplementedError(f"{type(self).__name__} does not begin on the fast path")

    @abstractmethod
    async def switch(self, head: ResponseHead) -> Stream:
        """Send a 101, or a 2xx to CONNECT. Returns the stream of the raw bytes from and to the
        client.

        The server owns the stream and closes it when the handler returns.
        """

    # Not abstract: tests of layers use exchanges without a connection.
    def retire(self) -> None:  # noqa: B027
        """End the connection after this exchange. The response, or a frame after it, tells the
        client."""

    @abstractmethod
    def abort(self, code: int | None = None, trailers: Headers | None = None) -> None:
        """The response cannot be completed: make sure that the client notices. `code`: the error
        code, if the protocol has one. `trailers`: the error status, if the protocol can end a
        message with it."""

    @property
    def call_timeout(self) -> float | None:
        """Seconds until the deadline that the client of a gRPC call sets. None: there is none."""
        if self.request.version != b"2":
            return None
        value = self.request.headers.get(b"grpc-timeout")
        return grpc.parse_timeout(value) if value is not None and self.is_grpc else None

    def deadline(self, seconds: float | None) -> float:
        """The end of a time limit that began with the exchange, on either path, in trio's time.
        None: no limit, inf."""
        if seconds is None:
            return inf
        begun = self.handoff.since if self.handoff is not None else None
        return (begun or trio.current_time()) + seconds

    @property
    def is_grpc(self) -> bool:
        """Whether the request is gRPC, so that errors must be gRPC errors. These use trailers,
        which require HTTP/2."""
        if self.request.version != b"2":
            return False
        kind = self.request.headers.get(b"content-type") or b""
        return kind.startswith(b"application/grpc") and kind[16:17] in (b"", b"+", b";", b" ")


# Exchanges that begin on the fast path (proxy/fastpath) and end on the ordinary path. A server may
# lend its HTTP/1 connection between two exchanges, and usually gets it back between two exchanges.
# If an exchange turns out to need the ordinary path, the connection comes back with that exchange
# in its current state. An HTTP/2 exchange comes back alone, because its connection is never lent.
#
# The exchange passes the same layers as all others. They find its account already open and its
# timer not set. At the end of the layers, its plan and the client continue it. The fast path's
# attempt counts as the first attempt and may be followed by another, like any first attempt.


class ExchangePlan(Protocol):
    """A flow's decisions for one exchange: where it goes, and what its outcome means. Both paths
    use it. If the fast path hands the exchange over, the ordinary path continues with its plan."""

    # The fast path...

    def begin(self, exchange: Exchange) -> None:
        """The account of the exchange is open. Called before the request is sent."""
        ...

    def answered(self) -> None:
        """The head of the response has arrived. Called for HTTP/2 only."""
        ...

    def declines(self, head: ResponseHead) -> bool:
        """Whether the ordinary path has to decide about this response, before a byte of it is
        passed on."""
        ...

    def end(self, exchange: Exchange) -> None:
        """The exchange has ended on the fast path. Not called after a handoff."""
        ...

    # The ordinary path...

    def carry(self, exchange: Exchange) -> Awaitable[None]:
        """Carry the exchange to its end, from its current state. Raises what the client is told."""
        ...


class Lease(Protocol):
    """A connection or stream to an endpoint, leased for one exchange."""

    def carrier(self) -> Carrier:
        """Return a carrier that continues in the current state."""
        ...

    def end(self, *, usable: bool) -> None:
        """End the lease. `usable`: the exchange ended well, so the connection can be reused."""
        ...


@dataclass(slots=True, eq=False)
class Handoff:
    """The state of an exchange that the fast path has begun. The protocol states of both
    connections are already set."""

    plan: ExchangePlan | None = None  # None: the flow needs no plan of its own for an exchange
    # None: the request was read and the loop guard has run, nothing was sent
    lease: Lease | None = None
    since: float | None = None  # trio's time when it began, if known
    # the whole request has been sent, except `to_server`; False: the rest is in the exchange's body
    request_sent: bool = True
    to_server: bytes = b""  # unsent bytes of the request
    to_client: bytes = b""  # unsent bytes of the response
    failure: Exception | None = None  # the error that has ended the exchange


Handler = Callable[[Exchange], Awaitable[None]]
Layer = Callable[[Handler], Handler]


def stack(*layers: Layer, endpoint: Handler) -> Handler:
    """Return a handler: the layers in the order in which a request passes them, around `endpoint`,
    which answers it."""
    handler = endpoint
    for layer in reversed(layers):
        handler = layer(handler)
    return handler
