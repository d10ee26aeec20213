"""One downstream HTTP/1 connection: requests in, one after the other, responses out.

The connection's task reads a head, gives the exchange to the handler, and sees to what is left over when the handler has returned. It
waits for heads under one cancel scope whose deadline it moves; within an exchange the exchange's own clock rules. Reading and
writing a body is one call each for whoever needs it, so nothing is read that nobody wants: the client's TCP window is the back-pressure.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from proxy.errors import ClientGone, IsthmusError, RequestTimeout
from proxy.exchange.exchange import Body, Exchange, Facts, Handler
from proxy.exchange.h1.request_body import RequestBody, rest_of_head
from proxy.exchange.handoff import Carry, LentConnection
from proxy.exchange.prefixed_stream import READ_SIZE, Resumed
from proxy.net.disconnects import Disconnects
from proxy.net.exceptions import NetError
from proxy.net.linger import linger
from proxy.net.pacing import Pacer
from proxy.net.socket_stream import Stream
from proxy.wire.h1.body import Framing, Length
from proxy.wire.h1.connection import At, Http1Connection, Role
from proxy.wire.messages import EndOfMessage, Headers, Limits, ProtocolError, RequestHead, ResponseHead, Signal

# What is written together: a head with the first piece of its body, small chunks with their neighbours; more would only wait.
_GATHER = 65536

# A client that has been answered within its request, and sends nothing for so long (seconds), has noticed (see net/linger.py).
_QUIET = 2.0

# The rest of a request that nobody read is worth reading to keep the connection, if it is no more than this.
_DRAIN_BYTES = 65536

# When the proxy goes down, a request may be on its way on any connection that waits for one (seconds since it began to wait).
_FIRST_REQUEST, _NEXT_REQUEST = 5.0, 1.0

_NOTHING_READ = RequestHead(b"-", b"-", Headers())


@dataclass(slots=True)
class Drain:
    """The downstream HTTP connections as a whole: whether the proxy is going down, and who of them waits for what.

    All end after their next response, which says so. Those that wait for a request may wait a moment more, for one that is on its way: a
    client that sent it cannot know whether it has been seen, and may not send it again if it is not idempotent.
    """

    draining: bool = False
    idle: set[Http1Server] = field(default_factory=set)
    on_begin: set[Callable[[], None]] = field(default_factory=set)  # for connections that have a way to say it
    disconnects: Disconnects = field(default_factory=Disconnects)  # tells of clients that leave while they wait, if it is open
    pacer: Pacer = field(default_factory=Pacer)  # how many of them end in one pass of the scheduler

    def begin(self) -> None:
        self.draining = True
        for tell in list(self.on_begin):
            tell()
        for server in self.idle:
            server.hurry()


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Limits of a downstream connection; all times in seconds."""

    limits: Limits = field(default_factory=Limits)
    idle_timeout: float = 90.0  # between two requests
    head_timeout: float = 10.0  # from a head's first byte to its last
    first_timeout: float = math.inf  # from the beginning to the end of the first request's head
    body_timeout: float = 60.0  # between two pieces of a request's body
    body_min_rate: float = 0.0  # bytes per second that a body must reach on average; 0: any
    write_timeout: float = 60.0  # for the client to take what it is sent
    linger_timeout: float = 10.0  # for the rest of a request that has been answered, before the connection is closed
    stream_timeout: float = 3600.0  # between two pieces of a request that comes on a stream of HTTP/2, where pauses are nothing unusual


class Http1Exchange(Exchange):
    """One request on an HTTP/1 connection, and its response there."""

    __slots__ = ("_continued", "_on_half_close", "_server", "started")

    def __init__(
        self, server: Http1Server, request: RequestHead, body: Body, malformed: ProtocolError | None = None, now: float | None = None
    ) -> None:
        """`now`: trio's time, if it is known."""
        super().__init__(request, body, server.facts, malformed)
        self._server = server
        self.started = trio.current_time() if now is None else now
        self._continued = False  # the client was told to send its body
        self._on_half_close: Callable[[], None] | None = None

    def pass_half_close(self, tell: Callable[[], None] | None) -> None:
        self._on_half_close = tell
        if self._server.client_ended:
            self.look()

    def look(self) -> None:
        """The client's connection is lost, or its direction has ended: behind a whole request a half-close, which is passed on."""
        server, tell = self._server, self._on_half_close
        how = "lost" if server.lost else "open" if server.connection.buffered else server.stream.ended()
        if how == "lost" and not server.tunnelled:
            self.give_up()
        elif how == "half" and tell is not None and server.connection.reading is At.DONE:
            self._on_half_close = None
            tell()

    async def inform(self, head: ResponseHead) -> None:
        self._continued = self._continued or head.status == 100
        if self._server.connection.peer_version != b"1.0":
            await self._server.send(self._server.connection.send_response(head, 0))

    async def respond(self, head: ResponseHead, body: Body) -> None:
        length = body.length
        piece = body.receive_nowait()  # which may raise, while another response can still be given
        length = self.answer(head, length)
        await self._stream([self._server.connection.send_response(head, length)], body, length, piece)

    def answer(self, head: ResponseHead, length: Length) -> Length:
        """Make `head` the response's, with the fields that belong to this hop; how a body of `length` is delimited on it."""
        length = self._frame(head, length)
        self.response = head
        self.on_response(head.status)
        return length

    def answer_as_is(self, head: ResponseHead) -> None:
        """The same for a head that the recogniser has taken, with a body as long as it says, on a connection that is kept: it has all that
        this hop needs."""
        self.response = head
        self.on_response(head.status)

    async def go_on(self, unsent: bytes, body: Body) -> None:
        await self._stream([unsent], body, body.length)

    async def _stream(self, out: list[bytes], body: Body, length: Length, piece: bytes | EndOfMessage | None = None) -> None:
        """Send `out`, `piece`, and the rest of `body`. What came in front of a fault of its source is sent before that is raised."""
        server = self._server
        gathered = 0
        fault: IsthmusError | None = None
        while True:
            if piece is None:
                try:
                    piece = body.receive_nowait()
                except IsthmusError as error:
                    fault = error
            if piece is None or gathered >= _GATHER:
                await self._flush(out)
                gathered = 0
                if fault is not None:
                    raise fault
                if piece is None:
                    piece = await body.receive()
            if isinstance(piece, EndOfMessage):
                out.append(server.connection.send_end(piece))
                break
            if length != 0 or not isinstance(length, int):
                self.response_bytes += len(piece)
                gathered += len(piece)
                out.append(server.connection.send_data(piece))
            piece = None
        await self._flush(out)

    async def _flush(self, out: list[bytes]) -> None:
        data = out[0] if len(out) == 1 else b"".join(out)
        out.clear()
        if data:
            self.clock.expect(self._client_stalls, self._server.settings.write_timeout)
            with self.facts.share.holding(len(data)):
                await self._server.send(data)
            self.clock.rest()

    def _client_stalls(self) -> Exception:
        return ClientGone(f"the client took nothing for {self._server.settings.write_timeout} s")

    def _frame(self, head: ResponseHead, length: Length) -> Length:
        connection, headers = self._server.connection, head.headers
        if self.request.method == b"HEAD" or head.status in (204, 304):
            length = 0
            if head.status == 204:  # RFC 9110 §8.6
                headers.remove(b"content-length")
        elif isinstance(length, int):
            if b"content-length" not in headers:
                headers.add(b"Content-Length", b"%d" % length)
        else:
            if b"content-length" in headers:
                headers.remove(b"content-length")
            length = Framing.CLOSE if connection.peer_version == b"1.0" else Framing.CHUNKED
            if length is Framing.CHUNKED:
                headers.append(b"Transfer-Encoding", b"chunked")
        if not connection.keep_alive or self._server.leaving or length is Framing.CLOSE or self._ends_behind():
            connection.keep_alive = False
            headers.add(b"Connection", b"close")
        elif connection.peer_version == b"1.0":
            headers.add(b"Connection", b"keep-alive")
        return length

    def _ends_behind(self) -> bool:
        """Whether the connection has to end behind this response, because the request has not ended (RFC 9112 §9.3, §9.6): more of it is to
        come than is read to keep a connection, or it is not known how much. Or the client waits to be told to send its body, and now will
        not be: a late body could not be told from a next request (RFC 9110 §10.1.1)."""
        connection = self._server.connection
        if connection.reading is not At.BODY:
            return False
        left = connection.body_length
        if not isinstance(left, int) or left > _DRAIN_BYTES:
            return True
        if self._continued or self.request.version == b"1.0" or not left:
            return False
        return b"100-continue" in self.request.headers.tokens(b"expect") and not self.request_bytes

    async def switch(self, head: ResponseHead) -> Stream:
        server = self._server
        self.response = head
        self.on_response(head.status)
        if head.status != 101:  # RFC 9110 §9.3.6: a 2xx to CONNECT has no body, and no field says so
            head.headers.remove(b"content-length", b"transfer-encoding")
        await server.send(server.connection.send_response(head, 0))
        server.tunnelled = True
        return Resumed(server.stream, server.connection.take_rest())

    def retire(self) -> None:
        self._server.retire()

    def abort(self, code: int | None = None, trailers: Headers | None = None) -> None:  # noqa: ARG002  # HTTP/1 can only break off
        self._server.abort()


class Http1Server:
    """`run` returns when the connection is of no further use; closing the stream stays with its owner."""

    def __init__(self, stream: Stream, facts: Facts, settings: ServerSettings, drain: Drain, carry: Carry | None = None) -> None:
        self.stream = stream
        self.facts = facts
        self.settings = settings
        self.drain = drain
        self.connection = Http1Connection(Role.SERVER, settings.limits)
        self.served = False  # whether a request has been answered
        self.tunnelled = self.aborted = False
        self.idle_since = 0.0  # trio's time; when it began to wait for a request
        self.lent: LentConnection | None = None  # the fast path's own, from one lease to the next
        self._waiting = False  # for a request; on the fast path `lent` knows
        self._retired = False
        self.on_client_end: Callable[[], None] | None = None  # told of `client_ended`, while the connection is lent
        self.client_ended = self.lost = False  # the client has ended its direction; the connection is lost
        self._exchange: Http1Exchange | None = None  # under way
        self._carry = carry
        self._scope = trio.CancelScope()  # of the whole connection; its deadline is that of the head that is waited for

    async def run(self, handler: Handler) -> None:
        """Serve until either side has enough. Raises ConnectionLost when the client's connection breaks within a request's head."""
        try:
            with self._scope, self.drain.disconnects.watching(self.stream, self._client_ends):
                while await self._serve_one(handler):
                    self.connection.next_cycle()
        finally:
            self.lent = None  # which leads back here
        if self._scope.cancelled_caught and self.connection.buffered:
            await self._refuse(handler, ProtocolError("the request's head was not complete in time", 408))

    @property
    def leaving(self) -> bool:
        """Whether the connection ends with the response under way, or at once."""
        return self._retired or self.drain.draining

    def retire(self) -> None:
        """Take no request any more. One that has begun to come is answered."""
        self._retired = True
        if self in self.drain.idle:
            self._scope.deadline = trio.current_time()

    @property
    def waiting_since(self) -> float | None:
        """See net.connection_slots.Activity."""
        if not self._waiting or (self.lent is not None and self.lent.busy()):
            return None
        return self.idle_since

    def _client_ends(self, lost: bool) -> None:
        self.client_ended, self.lost = True, self.lost or lost
        if self.on_client_end is not None:
            self.on_client_end()  # the exchange comes back, and looks then
        elif self._exchange is not None:
            self._exchange.look()

    def hurry(self) -> None:
        """The proxy is going down, and this connection waits for a request: not for much longer."""
        if self.stream.is_idle():
            patience = _NEXT_REQUEST if self.served else _FIRST_REQUEST
            self._scope.deadline = min(self._scope.deadline, self.idle_since + patience)

    async def _serve_one(self, handler: Handler) -> bool:
        """One exchange. False: the connection ends behind it."""
        connection = self.connection
        try:
            exchange = await self._next_exchange()
        except ProtocolError as error:
            await self._refuse(handler, error)
            return False
        if exchange is None:
            return False
        self._exchange = exchange
        if self.client_ended:
            exchange.look()
        try:
            with self.facts.share.holding(connection.head_size):
                await handler(exchange)
        finally:
            self._exchange = None
        self.served = True
        if self.tunnelled or self.aborted:
            return False
        if connection.writing is not At.DONE:
            self.abort()
            return False
        if connection.reading is not At.DONE and connection.keep_alive:
            await self._finish_reading()
        if not connection.reusable:
            await self._linger(self.settings.linger_timeout)
            return False
        return True

    async def _next_exchange(self) -> Http1Exchange | None:
        """The next exchange; None: the client has closed, or nothing came in time."""
        self.idle_since, self._waiting = trio.current_time(), True
        exchange = await self._carry(self) if self._carry is not None else None
        head = await self._next_request() if exchange is None else None
        self._waiting = False
        if exchange is None:
            await self.drain.pacer.turn(member=self.facts.share.member)  # thousands may come, or end, in one moment
        if head is not None:
            self.facts.declined_requests = self.connection.declined
            exchange = Http1Exchange(self, head, RequestBody(self.connection, self.stream, self.settings, self.facts.share))
        return exchange

    async def _next_request(self) -> RequestHead | None:
        connection, scope = self.connection, self._scope
        if not connection.buffered:
            scope.deadline = min(self.idle_since + self.settings.idle_timeout, self._first_deadline)
            if self._retired:
                return None
            if self.drain.draining:
                self.hurry()
            self.drain.idle.add(self)
            try:
                connection.receive_data(await self.stream.receive_some(READ_SIZE))
            except (trio.ClosedResourceError, NetError):
                return None  # between two requests nothing is lost
            finally:
                self.drain.idle.discard(self)
        head = connection.next_request()
        if head is Signal.NEED_DATA:
            scope.deadline = min(trio.current_time() + self.settings.head_timeout, self._first_deadline)
            head = await rest_of_head(connection, self.stream, self.facts.share)
        scope.deadline = math.inf
        return None if isinstance(head, Signal) else head

    @property
    def _first_deadline(self) -> float:
        return math.inf if self.served else self.idle_since + self.settings.first_timeout

    async def _refuse(self, handler: Handler, error: ProtocolError) -> None:
        """A request that cannot be read goes the way of all others, so that it is counted, logged and answered as they are."""
        connection = self.connection
        connection.keep_alive = False
        connection.reading = At.DONE
        await handler(Http1Exchange(self, _NOTHING_READ, RequestBody(connection, self.stream, self.settings, self.facts.share), error))
        await self._linger(_QUIET)

    async def _finish_reading(self) -> None:
        """Read the rest of the request, which is short, because the response's head has said that the connection goes on."""
        body = RequestBody(self.connection, self.stream, self.settings, self.facts.share)
        try:
            while isinstance(await body.receive(), bytes):
                pass
        except (ProtocolError, ClientGone, RequestTimeout):
            self.connection.keep_alive = False

    async def _linger(self, seconds: float) -> None:
        """End our side, then read and drop what still comes, for a limited time."""
        connection = self.connection
        read = connection.reading is At.DONE and connection.method and not connection.buffered
        if self.aborted or (read and self.stream.is_idle()):
            return
        await linger(self.stream, seconds=seconds, quiet=_QUIET)

    async def send(self, data: bytes) -> None:
        try:
            await self.stream.send_all(data)
        except NetError as error:
            self.connection.keep_alive = False
            raise ClientGone(f"the client's connection broke within the response: {error}") from error

    def abort(self) -> None:
        """Cut the connection so that the client cannot take what it got for a whole response."""
        self.aborted = True
        self.stream.reset()
