"""One downstream HTTP/2 connection. Each of its streams is an exchange: in a task of its own, or on
the fast path.

The reader and the writer belong to the `MultiplexedConnection`. A stream that the peer resets
cancels its own exchange only.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from functools import partial
from typing import Protocol

import trio

from proxy.errors import ClientGone, IsthmusError, ResponseTooLarge, describe
from proxy.exchange.exchange import Body, ConnectionInfo, Exchange, Handler
from proxy.exchange.h2.body import StreamBody, Tunnel, too_large
from proxy.exchange.h2.connection import MultiplexedConnection
from proxy.exchange.h2.settings import Http2Settings
from proxy.exchange.h2.stream import Http2Stream, StreamLost
from proxy.exchange.server_settings import Drain, ServerSettings
from proxy.net.socket_stream import Stream
from proxy.wire.h1.body import Length
from proxy.wire.h1.connection import Role
from proxy.wire.h2.events import HeadTooLarge
from proxy.wire.h2.frames import Code
from proxy.wire.messages import EndOfMessage, Headers, ProtocolError, RequestHead, ResponseHead

_log = logging.getLogger("isthmus.exchange")

_NOTHING_READ = RequestHead(b"-", b"-", Headers(), b"2")


class Http2FastPath(Protocol):
    """The fast path, as seen by an HTTP/2 server. The connection is not lent; each of its streams
    takes one of the two paths."""

    def __call__(self, server: Http2Server, exchange: Http2Exchange) -> bool:
        """Return True if the fast path carries `exchange`. If it later needs the ordinary path, the
        fast path calls `server.serve`."""
        ...


class Http2Exchange(Exchange):
    """One stream of an HTTP/2 connection."""

    __slots__ = ("_settings", "last", "stream")

    def __init__(
        self, stream: Http2Stream, facts: ConnectionInfo, settings: ServerSettings
    ) -> None:
        request = stream.request or _NOTHING_READ
        malformed = None
        if stream.lost is not None:
            malformed = ProtocolError(str(stream.lost))
        elif len(request.target) > settings.limits.target:
            words = f"the request target is longer than {settings.limits.target} bytes"
            malformed = ProtocolError(words, 414)
        super().__init__(request, StreamBody(stream, settings.stream_timeout), facts, malformed)
        self.stream = stream
        self._settings = settings
        self.last = False  # the connection ends after this exchange

    def lose(self) -> None:
        """The stream has ended early. If the client caused it by a protocol error, record that as
        the failure of the exchange."""
        lost = self.stream.lost
        if lost is not None and lost.fault and self.failure is None:
            self.failure, self.failure_words = describe(ProtocolError(str(lost))).reason, str(lost)

    async def inform(self, head: ResponseHead) -> None:
        await trio.lowlevel.checkpoint()
        # too large for the client, and an interim response is optional
        with contextlib.suppress(ResponseTooLarge):
            self._send_head(head, end=False)

    async def respond(self, head: ResponseHead, body: Body) -> None:
        if self.malformed is not None and self.stream.lost is not None:
            # RFC 9113 §8.1.1: the reset is the response
            raise ClientGone("the stream was reset because the request was malformed")
        bodiless = self.frame(head, body.length)
        piece = body.receive_nowait()  # may raise; an error response can still be sent here
        if self.stream.mux.writer.behind:
            self.timer.expect(self._client_stalls, self._settings.write_timeout)
            await self.stream.mux.writer.paced()
            self.timer.rest()
        ended = bodiless or (isinstance(piece, EndOfMessage) and not len(piece.trailers))
        self._send_head(head, end=ended)
        self.response = head
        self.on_response(head.status)
        if ended:
            await trio.lowlevel.checkpoint()
            return
        try:
            await self._send_body(piece, body)
        except StreamLost as error:
            raise ClientGone(f"during the response: {error}") from error

    def frame(self, head: ResponseHead, length: Length) -> bool:
        """Add the `length` of the body to `head` if it is known and allowed. Returns True if there
        is no body."""
        bodiless = self.request.method == b"HEAD" or head.status in (204, 304)
        if head.status == 204:
            head.headers.remove(b"content-length")
        elif (
            isinstance(length, int)
            and not bodiless
            and b"content-length" not in head.headers
            and not self.is_grpc
        ):
            head.headers.add(b"content-length", b"%d" % length)
        return bodiless

    # frames are added whole, so `unsent` is empty
    async def go_on(self, unsent: bytes, body: Body) -> None:  # noqa: ARG002
        try:
            await self._send_body(body.receive_nowait(), body)
        except StreamLost as error:
            raise ClientGone(f"during the response: {error}") from error

    async def _send_body(self, piece: bytes | EndOfMessage | None, body: Body) -> None:
        """Send `piece` and what follows it. The last DATA frame carries the end, if the end is
        known in time."""
        while True:
            if piece is None:
                piece = await body.receive()
            if isinstance(piece, EndOfMessage):
                self._send_end(piece)
                return
            try:
                following = body.receive_nowait()
            except IsthmusError:  # the next receive raises it again; the piece is sent first
                following = None
            last = isinstance(following, EndOfMessage) and not len(following.trailers)
            self.response_bytes += len(piece)
            self.timer.expect(self._client_stalls, self._settings.write_timeout)
            await self.stream.send(piece, end=last)
            self.timer.rest()
            if last:
                return
            piece = following

    def _send_end(self, end: EndOfMessage) -> None:
        if len(end.trailers):
            self.grpc_status = end.trailers.get(b"grpc-status")
            try:
                self.stream.send_trailers(end.trailers)
            except HeadTooLarge as error:
                raise too_large(error) from error
        else:
            self.stream.put(b"", end=True)

    def _send_head(self, head: ResponseHead, *, end: bool) -> None:
        try:
            self.stream.send_head(head, end=end)
        except StreamLost as error:
            raise ClientGone(str(error)) from error
        except HeadTooLarge as error:
            if self.failure is not None:  # it is already an error response of the proxy
                raise ClientGone(
                    f"the client does not accept the error response: {error}"
                ) from error
            raise too_large(error) from error

    def _client_stalls(self) -> Exception:
        return ClientGone(f"the client accepted no data for {self._settings.write_timeout} s")

    async def switch(self, head: ResponseHead) -> Stream:
        """Return a tunnel within a stream: CONNECT (RFC 9113 §8.5), or a WebSocket by extended
        CONNECT (RFC 8441)."""
        self.response = head
        self.on_response(head.status)
        head.headers.remove(b"content-length")
        await trio.lowlevel.checkpoint()
        self._send_head(head, end=False)
        return Tunnel(self.stream)

    def retire(self) -> None:
        self.last = True

    def abort(self, code: int | None = None, trailers: Headers | None = None) -> None:
        """End the stream with an error: with `trailers` if the protocol has them (gRPC), otherwise
        with a reset."""
        if trailers is not None:
            self.grpc_status = trailers.get(b"grpc-status")
            with contextlib.suppress(StreamLost, HeadTooLarge):
                self.stream.send_trailers(trailers)
                return
            code = None
        self.stream.close(Code.INTERNAL_ERROR if code is None else code)


def _ignore(_: Http2Exchange) -> None:
    raise RuntimeError("this connection is not served")


def _lose(exchange: Http2Exchange, scope: trio.CancelScope) -> None:
    exchange.lose()
    scope.cancel()


class Http2Server:
    """One downstream connection. `run` returns when it has ended. `mux.fault`: the protocol error
    of the client, if that ended it."""

    def __init__(
        self,
        stream: Stream,
        facts: ConnectionInfo,
        settings: ServerSettings,
        mux: Http2Settings,
        drain: Drain,
    ) -> None:
        self.facts = facts
        self.settings = settings
        self.drain = drain
        self.mux = MultiplexedConnection(stream, Role.SERVER, mux, facts.share)
        # starts an exchange on the ordinary path, while `run` runs
        self.serve: Callable[[Http2Exchange], None] = _ignore
        self.fork: Http2FastPath | None = None  # the fast path, if there is one

    @property
    def waiting_since(self) -> float | None:
        """Implements net.connection_slots.Activity."""
        return None if self.mux.exchanges else self.mux.idle_since

    async def run(self, handler: Handler) -> None:
        self.drain.on_begin.add(self.mux.retire)
        self.facts.share.on_exhausted = self.mux.exhaust
        group = None
        try:
            async with trio.open_nursery() as exchanges:

                def serve(exchange: Http2Exchange) -> None:
                    exchanges.start_soon(self._serve, handler, exchange)

                self.serve = serve
                await self.mux.run(self._accept)
                exchanges.cancel_scope.cancel()
        except BaseExceptionGroup as error:
            group = error
        finally:
            self.drain.on_begin.discard(self.mux.retire)
            self.serve = _ignore  # breaks a reference cycle
        if group is not None:
            # Cancelled in every task: raise a single Cancelled, not a group.
            try:
                await trio.lowlevel.checkpoint_if_cancelled()
                raise group
            finally:
                del group  # it holds this frame

    def _accept(self, stream: Http2Stream) -> None:
        # the client cancelled it before it was processed
        if stream.lost is not None and not stream.lost.fault:
            stream.close()
        else:
            # An unreadable request passes the handler too, so that it is counted and logged like
            # any other.
            exchange = Http2Exchange(stream, self.facts, self.settings)
            if self.fork is None or exchange.malformed is not None or not self.fork(self, exchange):
                self.serve(exchange)
        if self.drain.draining:  # an accepted connection gets one response, as with HTTP/1
            self.mux.retire()

    async def _serve(self, handler: Handler, exchange: Http2Exchange) -> None:
        stream = exchange.stream
        if stream.lost is not None and not stream.lost.fault and not exchange.underway:
            stream.close()
            return
        code = None
        with trio.CancelScope() as scope:
            stream.on_lost = partial(_lose, exchange, scope)
            if stream.lost is not None and exchange.underway:
                stream.on_lost()  # the layers see a cancellation and clean up
            try:
                await handler(exchange)
            # the layers handle expected errors: a bug ends this stream, but not the others
            except Exception as error:
                _log.error("internal error while carrying an HTTP/2 stream", exc_info=error)
                code = Code.INTERNAL_ERROR
            finally:
                stream.on_lost = None  # breaks a reference cycle
        stream.close(code)
        if exchange.last:  # after the response: some clients read nothing after GOAWAY
            self.mux.retire_now()
