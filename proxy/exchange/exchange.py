"""One request and its response, as the layers and the flows see them.

An exchange is handled by one call: `await handler(exchange)` returns when the whole response, body included, is with the client. So
a layer is a plain function around that call: what it does before it sees the request, what it does after it sees how all of it
ended, and a task that is needed for the exchange (the pump of a request body) lives in a nursery inside of it and nowhere else.

    handler(exchange)
        exchange.body.receive() ...            the request's body, as it comes
        exchange.inform(head)                  any number of interim responses
        exchange.respond(head, body)           once: the whole response, streamed
     or exchange.switch(head) -> Stream        once: from here on raw bytes (101, or 2xx to CONNECT)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import trio

from proxy.errors import ClientGone
from proxy.net.address import Address
from proxy.net.connection_slots import Slot
from proxy.net.memory_budget import UNCOUNTED, Share
from proxy.net.socket_stream import Stream
from proxy.net.tls.handshake import TLSInfo, TLSStream
from proxy.wire.h1.body import Length
from proxy.wire.messages import END, EndOfMessage, Headers, ProtocolError, RequestHead, ResponseHead
from proxy.wire.sniff import Protocol as Spoken
from tracing.sampling import Trace

if TYPE_CHECKING:
    from proxy.exchange.client import ClientSettings
    from proxy.exchange.handoff import Handoff


class Body(Protocol):
    """A body that streams. After its end every call says EndOfMessage again."""

    @property
    def length(self) -> Length:
        """Bytes still to come, or how the sender delimits them."""
        ...

    def receive_nowait(self) -> bytes | EndOfMessage | None:
        """The next piece (never empty) if it is here already; None: it would have to be waited for."""
        ...

    async def receive(self) -> bytes | EndOfMessage:
        """The next piece (never empty), or the end. Raises what the source raises when it breaks off."""
        ...


class Whole:
    """A body that is here: what a proxy says itself."""

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
class Facts:
    """What is known of the downstream connection that an exchange, or a relayed stream, came by."""

    direction: Direction
    peer: Address
    destination: Address  # where the connection was going before it was redirected
    tls: TLSInfo | None = None
    identity: str | None = None  # of the peer, verified; None: it has shown none
    protocol: Spoken = Spoken.OPAQUE
    upstream: Address | None = None  # where it, or the last of its exchanges, was carried to
    upstream_tls: TLSInfo | None = None
    depth: int = 0  # how many connections of our own it lies in (loopguard/nesting.py)
    declined_requests: int = 0  # HTTP/1 heads that took the longer way (wire/h1/fast_head.py)
    declined_responses: int = 0
    service: str | None = None  # of a connection that is relayed as it is: see Exchange
    chosen: str | None = None
    trace: Trace | None = None
    slot: Slot | None = None  # of the listener
    unsure: bool = False  # it is relayed, and what the client says may still show that it is HTTP
    unnamed: bool = False  # its bytes were not announced as HTTP, so the peer, and be it a gateway, has not written their fields
    share: Share = UNCOUNTED  # what is buffered for the connection is charged to it

    def carried(self, stream: Stream) -> None:
        """Note the connection that goes on with this one."""
        self.upstream = stream.peer
        self.upstream_tls = stream.info if isinstance(stream, TLSStream) else None


@dataclass(frozen=True, slots=True)
class Attempt:
    """An attempt at an exchange that was not the last one. Times are trio's."""

    upstream: Address
    started: float
    ended: float
    status: int  # of its response; 0: there was none
    reason: str  # why there was another: a reason of errors.py, or `status`, `grpc_status`
    chosen: str | None = None  # see Exchange
    request_bytes: int = 0  # of the body, that were sent


# Told the final head, and the trailers of a response that has ended already without a body (None: it has not). Whether to drop it, because
# there will be another attempt.
Judge = Callable[[ResponseHead, Headers | None], bool]


def _unheard(_: int) -> None:
    pass


def _untold(_: Exchange) -> None:
    pass


class Exchange(ABC):
    """One request on its way; made by a server, carried to its end by a handler."""

    __slots__ = (
        "account",
        "attempts",
        "authority",
        "body",
        "caller",
        "chosen",
        "clock",
        "cycle",
        "facts",
        "failure",
        "failure_words",
        "first",
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
        "times",
        "trace",
        "tried",
        "upstream",
        "upstream_tls",
    )  # fmt: skip

    def __init__(self, request: RequestHead, body: Body, facts: Facts, malformed: ProtocolError | None = None) -> None:
        self.request = request
        self.malformed = malformed  # what was wrong with a request that could not be read: it is only there to be answered
        self.body = body
        self.facts = facts
        self.response: ResponseHead | None = None  # the final head, from the moment it is being sent
        self.on_response: Callable[[int], None] = _unheard  # told the final status as soon as it is known
        self.on_attempt: Callable[[Exchange], None] = _untold  # told that it is about to be sent to `upstream`, maybe once more
        self.grpc_status: bytes | None = None  # what the trailers said
        self.trace: Trace | None = None
        self.service: str | None = None  # what it is meant for, as the directory names it
        self.chosen: str | None = None  # and what that has led to: by a split, or a failover
        self.upstream: Address | None = None  # the endpoint that was asked last
        self.upstream_tls: TLSInfo | None = None
        self.failure: str | None = None  # why the proxy made the response up itself, or cut it off: a reason of errors.py
        self.failure_words = ""
        self.loop: str | None = None  # the kind of the loop that was stopped
        self.cycle = ""  # its way round in names (`west/web-1 -> east/gateway -> west/web-1`), as far as it is known
        self.outside = False  # the answer will go on to somebody without an identity, though not at once
        self.authority: bytes | None = None  # whom the next hop is told that the request is for; None: what the client said
        self.caller: bytes | None = None  # the verified identity of who sent it, for the next hop; None: nothing is said
        self.account: ExitStack | None = None  # closes the account, which is open already: the exchange was begun on the fast path
        self.handoff: Handoff | None = None  # by the fast path, which has handed it over
        self.first: object = None  # the endpoint to try first: chance has said so on the fast path
        self.guarded = False  # the loop guard has seen it there
        self.fresh = False  # a connection has gone away under it, which is excused once; only a new one is worth trying
        self.attempts = 0  # connections that it was sent on
        self.tried: list[Attempt] | None = None  # attempts before the last one; None: there were none
        self.judge: Judge | None = None  # asked whether the response will do
        self.informed = False  # an interim response has been passed on
        self.times: ClientSettings | None = None  # if they are not the client's usual ones
        self.request_bytes = 0
        self.response_bytes = 0
        self.left = False  # the client has gone
        self.clock = NO_CLOCK

    def carried(self, stream: Stream) -> None:
        """Note the connection to the endpoint that has this exchange now."""
        self.carried_by(stream.peer, stream.info if isinstance(stream, TLSStream) else None)

    def carried_by(self, peer: Address, tls: TLSInfo | None) -> None:
        """The same for one of which that is known."""
        facts = self.facts
        facts.upstream = self.upstream = peer
        facts.upstream_tls = self.upstream_tls = tls
        self.on_attempt(self)
        self.attempts += 1

    def give_up(self) -> None:
        """The client has gone: end the exchange with ClientGone, wherever it is."""
        self.left = True
        self.clock.give_up(self._client_went)

    def _client_went(self) -> Exception:
        return ClientGone(f"the client closed its connection {'before' if self.response is None else 'while'} it was answered")

    def pass_half_close(self, tell: Callable[[], None] | None) -> None:  # noqa: B027  # HTTP/2 has none
        """All of the request has been sent: from now on, call `tell` once if the client has ended its direction of the connection. None:
        not any more. Only HTTP/1 has that: a client that ends its HTTP/2 connection has gone."""

    @property
    def underway(self) -> bool:
        """It has been sent by the fast path, and goes on where it stands."""
        return self.handoff is not None and self.handoff.lease is not None

    @abstractmethod
    async def inform(self, head: ResponseHead) -> None:
        """Send an interim response (1xx but 101), if the client can take one."""

    @abstractmethod
    async def respond(self, head: ResponseHead, body: Body) -> None:
        """Send the final response with its whole body. Raises what `body` raises, and ConnectionLost when the client has gone."""

    async def go_on(self, unsent: bytes, body: Body) -> None:
        """Go on with a response whose head the fast path has sent: `unsent`, and what is left of `body`. Raises as `respond`."""
        # Not abstract: only a server's exchanges begin there, and a layer can be tried with others.
        raise NotImplementedError(f"{type(self).__name__} does not begin on the fast path")

    @abstractmethod
    async def switch(self, head: ResponseHead) -> Stream:
        """Send a 101, or a 2xx to CONNECT; what comes from the client and goes to it from here on is not HTTP.

        The stream belongs to the server, which closes it when the handler returns.
        """

    def retire(self) -> None:  # noqa: B027  # not abstract: a layer can be tried with exchanges that have no connection
        """This connection carries no further exchange: the client is told so with, or behind, the response of this one."""

    @abstractmethod
    def abort(self, code: int | None = None, trailers: Headers | None = None) -> None:
        """The response cannot be ended properly: make sure that the client notices. Where the protocol has a code for that, with `code`;
        where a message may say so at its end, with `trailers`."""

    @property
    def is_grpc(self) -> bool:
        """gRPC is what this request speaks, so its errors have to be gRPC's (they travel in trailers, which HTTP/2 has)."""
        if self.request.version != b"2":
            return False
        kind = self.request.headers.get(b"content-type") or b""
        return kind.startswith(b"application/grpc") and kind[16:17] in (b"", b"+", b";", b" ")


class Clock:
    """The deadline of one exchange: moved at each step, for one cancel scope is dearer than moving it (about 6 to 11 µs against 2).

    `expect` says what is waited for now; when the time is up, the deadline layer raises that. Whatever the steps are, the exchange as a
    whole may have a limit.
    """

    __slots__ = ("_overdue", "client_awaited", "late", "limit", "scope", "since", "stopped")

    def __init__(self, scope: trio.CancelScope) -> None:
        self.scope = scope
        self.late: Callable[[], Exception] | None = None
        self.limit = math.inf  # of the whole exchange; trio's time
        self.since = 0.0  # when the last step began
        self.stopped = False  # by `give_up`
        self.client_awaited = False  # rather than the server: what is late is not the server's fault
        self._overdue: Callable[[], Exception] | None = None

    def expect(self, late: Callable[[], Exception], seconds: float) -> None:
        """From now on, `seconds` at most until the next step; `late()` is the error if not."""
        self.since = now = trio.current_time()
        deadline = now + seconds
        self.client_awaited = False
        if deadline < self.limit:
            self.late = late
            self.scope.deadline = deadline
        else:
            self.rest()

    def rest(self) -> None:
        """Nothing is waited for that has a limit of its own."""
        self.late = self._overdue
        self.scope.deadline = self.limit

    def await_client(self) -> None:
        """The same while the rest of the request is waited for. The client's own deadlines rule then."""
        self.rest()
        self.client_awaited = True

    def limit_to(self, limit: float, overdue: Callable[[], Exception]) -> None:
        """The exchange has to be over by then, unless it has to be earlier already."""
        if limit < self.limit:
            self.limit, self._overdue = limit, overdue
            if limit < self.scope.deadline:
                self.rest()

    def unlimit(self) -> None:
        """The exchange has become a tunnel (101, or 2xx to CONNECT): that has no deadline, however short the exchange's was."""
        self.limit, self._overdue = math.inf, None
        self.rest()

    def give_up(self, late: Callable[[], Exception]) -> None:
        """It is over now, because of `late()`."""
        self.late = late
        self.stopped = True
        self.scope.cancel()

    @property
    def ran_out(self) -> bool:
        """What was waited for did not come in time."""
        return self.scope.cancel_called and not self.stopped


class _NoClock(Clock):
    """Of an exchange outside the deadline layer: nothing is limited there."""

    def expect(self, late: Callable[[], Exception], seconds: float) -> None:
        pass

    def rest(self) -> None:
        pass

    def await_client(self) -> None:
        pass

    def limit_to(self, limit: float, overdue: Callable[[], Exception]) -> None:
        pass

    def unlimit(self) -> None:
        pass

    def give_up(self, late: Callable[[], Exception]) -> None:
        pass


NO_CLOCK: Clock = _NoClock(trio.CancelScope())

Handler = Callable[[Exchange], Awaitable[None]]
Layer = Callable[[Handler], Handler]


def stack(*layers: Layer, endpoint: Handler) -> Handler:
    """Layers in the order in which a request meets them, around the endpoint that answers it."""
    handler = endpoint
    for layer in reversed(layers):
        handler = layer(handler)
    return handler
