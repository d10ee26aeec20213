"""One downstream HTTP/1 connection: requests in, one after the other, responses out.

The connection's task reads a head, calls the handler with the exchange, and cleans up when the
handler has returned. It waits for heads under one cancel scope whose deadline it moves; within an
exchange, the exchange's own timer applies. Bodies are read and written on demand, one piece for
each call. So nothing is read before it is needed, and the client's TCP window provides
backpressure.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import trio

from proxy.errors import ClientGone, IsthmusError, RequestTimeout
from proxy.exchange.exchange import Body, ConnectionInfo, Exchange, Handler
from proxy.exchange.h1.request_body import RequestBody, rest_of_head
from proxy.exchange.prefixed_stream import READ_SIZE, PrefixedStream
from proxy.exchange.server_settings import Drain, ServerSettings
from proxy.net.exceptions import NetError
from proxy.net.linger import linger
from proxy.net.socket_stream import Stream
from proxy.wire.h1.body import Framing, Length
from proxy.wire.h1.connection import At, Http1Connection, Role
from proxy.wire.messages import (
    EndOfMessage,
    Headers,
    ProtocolError,
    RequestHead,
    ResponseHead,
    Signal,
)

# Bytes per write: a head with the first piece of its body, or several small chunks. More would only
# add delay.
_GATHER = 65536

# Seconds. A client that got its response before the end of its request, and then sends nothing for
# this long, has noticed (see net/linger.py).
_QUIET = 2.0

# Bytes. An unread rest of a request up to this size is read to keep the connection.
_DRAIN_BYTES = 65536

# Seconds since a connection began to wait for a request. At shutdown, a request may already be on
# its way to it.
_FIRST_REQUEST, _NEXT_REQUEST = 5.0, 1.0

_NOTHING_READ = RequestHead(b"-", b"-", Headers())


class LentConnection(Protocol):
    """A connection as the fast path sees it. The server lends it between two exchanges."""

    async def carry(self) -> Http1Exchange | None:
        """Carry exchanges for as long as the fast path supports them. After this returns, the
        server owns the connection again. Bytes that were read but not used are in
        `server.connection`. Returns an exchange that has begun, or None."""
        ...

    def busy(self) -> bool:
        """Whether it is in an exchange, or has read a part of the next request."""
        ...

    def recall(self) -> None:
        """Return it to its server if it is lent, and between two exchanges."""
        ...


class Http1FastPath(Protocol):
    """The fast path, as seen by an HTTP/1 server."""

    def __call__(self, server: Http1Server) -> LentConnection | None:
        """Prepare the connection of `server` for the fast path. None: it cannot be lent now."""
        ...


class Http1Exchange(Exchange):
    """One request on an HTTP/1 connection and its response."""

    __slots__ = ("_continued", "_on_half_close", "_server", "started")

    def __init__(
        self,
        server: Http1Server,
        request: RequestHead,
        body: Body,
        malformed: ProtocolError | None = None,
        now: float | None = None,
    ) -> None:
        """`now`: trio's time, if the caller has it."""
        super().__init__(request, body, server.facts, malformed)
        self._server = server
        self.started = trio.current_time() if now is None else now
        self._continued = False  # 100 Continue was sent
        self._on_half_close: Callable[[], None] | None = None

    def pass_half_close(self, tell: Callable[[], None] | None) -> None:
        self._on_half_close = tell
        if self._server.client_ended:
            self.check_client()

    def check_client(self) -> None:
        """The client's connection is lost, or the client has ended its direction. After a complete
        request, the end is a half-close, which is passed on."""
        server, tell = self._server, self._on_half_close
        how = (
            "lost"
            if server.lost
            else "open"
            if server.connection.buffered
            else server.stream.ended()
        )
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
        piece = body.receive_nowait()  # may raise; an error response can still be sent here
        length = self.answer(head, length)
        await self._stream(
            [self._server.connection.send_response(head, length)], body, length, piece
        )

    def answer(self, head: ResponseHead, length: Length) -> Length:
        """Set the response to `head` and add the fields of this hop. Returns how a body of `length`
        is delimited on this connection."""
        length = self._frame(head, length)
        self.response = head
        self.on_response(head.status)
        return length

    def answer_as_is(self, head: ResponseHead) -> None:
        """Set the response to `head`, which already has all fields of this hop. Only for a head
        that the recogniser accepted, with a known Content-Length, on a connection that stays open.
        """
        self.response = head
        self.on_response(head.status)

    async def go_on(self, unsent: bytes, body: Body) -> None:
        await self._stream([unsent], body, body.length)

    async def _stream(
        self,
        out: list[bytes],
        body: Body,
        length: Length,
        piece: bytes | EndOfMessage | None = None,
    ) -> None:
        """Send `out`, `piece`, and the rest of `body`. If the source of the body fails, all data
        that came before the error is sent first."""
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
            self.timer.expect(self._client_stalls, self._server.settings.write_timeout)
            with self.facts.share.holding(len(data)):
                await self._server.send(data)
            self.timer.rest()

    def _client_stalls(self) -> Exception:
        return ClientGone(
            f"the client accepted no data for {self._server.settings.write_timeout} s"
        )

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
        if (
            not connection.keep_alive
            or self._server.leaving
            or length is Framing.CLOSE
            or self._ends_behind()
        ):
            connection.keep_alive = False
            headers.add(b"Connection", b"close")
        elif connection.peer_version == b"1.0":
            headers.add(b"Connection", b"keep-alive")
        return length

    def _ends_behind(self) -> bool:
        """Return whether the connection must close after this response, because the request has not
        ended (RFC 9112 §9.3, §9.6).

        It must close if the rest of the body is longer than `_DRAIN_BYTES`, or has no known length.
        It must also close if the client waits for 100 Continue, which it will not get: the proxy
        could not tell a late body from the next request (RFC 9110 §10.1.1).
        """
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
        # RFC 9110 §9.3.6: a 2xx to CONNECT has no body and no field that announces one
        if head.status != 101:
            head.headers.remove(b"content-length", b"transfer-encoding")
        await server.send(server.connection.send_response(head, 0))
        server.tunnelled = True
        return PrefixedStream(server.stream, server.connection.take_rest())

    def retire(self) -> None:
        self._server.retire()

    # HTTP/1 has no error code; it can only cut the connection
    def abort(self, code: int | None = None, trailers: Headers | None = None) -> None:  # noqa: ARG002
        self._server.abort()


class Http1Server:
    """One downstream connection. `run` returns when the connection cannot be used any more. The
    caller closes the stream."""

    def __init__(
        self,
        stream: Stream,
        facts: ConnectionInfo,
        settings: ServerSettings,
        drain: Drain,
        fast_path: Http1FastPath | None = None,
    ) -> None:
        self.stream = stream
        self.facts = facts
        self.settings = settings
        self.drain = drain
        self.connection = Http1Connection(Role.SERVER, settings.limits)
        self.served = False  # a request has been answered
        self.tunnelled = self.aborted = False
        self.idle_since = 0.0  # trio's time when it began to wait for a request
        # the fast path's state, kept from one lease to the next
        self.lent: LentConnection | None = None
        self._waiting = False  # for a request; on the fast path, see `lent`
        self._retired = False
        # called when `client_ended` is set while the connection is lent
        self.on_client_end: Callable[[], None] | None = None
        # the client has ended its direction; the connection is lost
        self.client_ended = self.lost = False
        self._exchange: Http1Exchange | None = None  # the current one
        self._fast_path = fast_path
        # for the whole connection; its deadline is that of the awaited head
        self._scope = trio.CancelScope()

    async def run(self, handler: Handler) -> None:
        """Serve requests until the connection ends. Raises ConnectionLost if the client's
        connection breaks within a request head."""
        try:
            with self._scope, self.drain.disconnects.watching(self.stream, self._client_ends):
                while await self._serve_one(handler):
                    self.connection.next_cycle()
        finally:
            self.lent = None  # breaks a reference cycle
        if self._scope.cancelled_caught and self.connection.buffered:
            await self._refuse(
                handler, ProtocolError("the request's head was not complete in time", 408)
            )

    @property
    def leaving(self) -> bool:
        """Whether the connection ends after the current response, or immediately if there is
        none."""
        return self._retired or self.drain.draining

    def retire(self) -> None:
        """Accept no more requests. A request that has begun to arrive is still answered."""
        self._retired = True
        if self in self.drain.idle:
            self._scope.deadline = trio.current_time()
        if self.lent is not None:
            self.lent.recall()

    @property
    def waiting_since(self) -> float | None:
        """Implements net.connection_slots.Activity."""
        if not self._waiting or (self.lent is not None and self.lent.busy()):
            return None
        return self.idle_since

    def _client_ends(self, lost: bool) -> None:
        self.client_ended, self.lost = True, self.lost or lost
        if self.on_client_end is not None:
            # The fast path hands the exchange over, and `check_client` is called then.
            self.on_client_end()
        elif self._exchange is not None:
            self._exchange.check_client()

    def hurry(self) -> None:
        """The proxy is shutting down and this connection waits for a request: shorten the wait."""
        if self.stream.is_idle():
            patience = _NEXT_REQUEST if self.served else _FIRST_REQUEST
            self._scope.deadline = min(self._scope.deadline, self.idle_since + patience)

    async def _serve_one(self, handler: Handler) -> bool:
        """Serve one exchange. Returns False if the connection ends after it."""
        connection = self.connection
        try:
            exchange = await self._next_exchange()
        except ProtocolError as error:
            self._scope.deadline = math.inf  # the response, and lingering, have limits of their own
            await self._refuse(handler, error)
            return False
        if exchange is None:
            return False
        self._exchange = exchange
        if self.client_ended:
            exchange.check_client()
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
        """Return the next exchange. None: the client has closed, or no request arrived in time."""
        self.idle_since, self._waiting = trio.current_time(), True
        if self._fast_path is not None and self.lent is None:
            self.lent = self._fast_path(self)
        exchange = await self.lent.carry() if self.lent is not None else None
        head = await self._next_request() if exchange is None else None
        self._waiting = False
        if exchange is None:
            # thousands of requests may arrive, or connections end, at the same time
            await self.drain.pacer.turn(member=self.facts.share.member)
        if head is not None:
            self.facts.declined_requests = self.connection.declined
            exchange = Http1Exchange(
                self,
                head,
                RequestBody(self.connection, self.stream, self.settings, self.facts.share),
            )
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
                return None  # between two requests, no data is lost
            finally:
                self.drain.idle.discard(self)
        head = connection.next_request()
        if head is Signal.NEED_DATA:
            scope.deadline = min(
                trio.current_time() + self.settings.head_timeout, self._first_deadline
            )
            head = await rest_of_head(connection, self.stream, self.facts.share)
        scope.deadline = math.inf
        return None if isinstance(head, Signal) else head

    @property
    def _first_deadline(self) -> float:
        return math.inf if self.served else self.idle_since + self.settings.first_timeout

    async def _refuse(self, handler: Handler, error: ProtocolError) -> None:
        """Pass an unreadable request through the handler, so that it is counted, logged and
        answered like any other."""
        connection = self.connection
        connection.keep_alive = False
        connection.reading = At.DONE
        await handler(
            Http1Exchange(
                self,
                _NOTHING_READ,
                RequestBody(connection, self.stream, self.settings, self.facts.share),
                error,
            )
        )
        await self._linger(_QUIET)

    async def _finish_reading(self) -> None:
        """Read the rest of the request, which is short, because the response head said that the
        connection stays open."""
        body = RequestBody(self.connection, self.stream, self.settings, self.facts.share)
        try:
            while isinstance(await body.receive(), bytes):
                pass
        except (ProtocolError, ClientGone, RequestTimeout):
            self.connection.keep_alive = False

    async def _linger(self, seconds: float) -> None:
        """End our side, then read and drop what still arrives, for a limited time."""
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
            raise ClientGone(
                f"the client's connection broke during the response: {error}"
            ) from error

    def abort(self) -> None:
        """Reset the connection, so that the client cannot take a partial response for a complete
        one."""
        self.aborted = True
        self.stream.reset()
