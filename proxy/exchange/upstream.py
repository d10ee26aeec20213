"""A carrier sends one request to an endpoint and receives its response: an HTTP/1 connection, or a
stream of an HTTP/2 connection.

client.py uses the same steps for both:

    admit()                                          whether the server accepts a WebSocket
    begin(head, length), put(data) ..., flush()      the request; flush sends what was put
    finish(end)                                      its end
    head()                                           the response heads, interim ones first
    body_nowait(), body()                            its body
    tunnel()                                         or raw bytes, after a 101 or a 2xx to CONNECT

If the client speaks the other HTTP version, a carrier translates a WebSocket handshake in both
directions (wire/websocket.py).
"""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from base64 import b64encode
from contextlib import suppress
from http import HTTPStatus
from secrets import token_bytes

import trio

from proxy.errors import (
    ClientGone,
    RequestError,
    UpgradeFailed,
    UpstreamClosed,
    UpstreamGoaway,
    UpstreamProtocolError,
    UpstreamReset,
)
from proxy.exchange.h1.pool import Upstream
from proxy.exchange.h2.body import Tunnel, body_length
from proxy.exchange.h2.connection import MultiplexedConnection
from proxy.exchange.h2.stream import ConnectionGoaway, Http2Stream, StreamLost
from proxy.exchange.prefixed_stream import READ_SIZE, PrefixedStream
from proxy.net.exceptions import ConnectionLost, NetError
from proxy.net.memory_budget import UNCOUNTED, Share
from proxy.net.socket_stream import SocketStream, Stream
from proxy.net.tls.handshake import TLSStream
from proxy.wire import websocket
from proxy.wire.h1.body import Framing, Length
from proxy.wire.h1.connection import At
from proxy.wire.h2.events import HeadTooLarge
from proxy.wire.messages import (
    EndOfMessage,
    Headers,
    ProtocolError,
    RequestHead,
    ResponseHead,
    Signal,
)


class Unanswered(Exception):
    """The server ended before it sent one byte of a final response.

    `again`: another connection may succeed, because the end belongs to this connection and is not
    an answer to the request. `untouched`: the server has certainly not processed the request, so it
    may be sent again with any method.
    """

    def __init__(self, message: str, *, again: bool, untouched: bool = False) -> None:
        super().__init__(message)
        self.again = again
        self.untouched = untouched


def oversized(error: HeadTooLarge) -> RequestError:
    """The error for a request whose head or trailers are larger than the server accepts (RFC 6585
    §5)."""
    failure = RequestError(f"the request: {error}", 431)
    failure.__cause__ = error
    return failure


class NoExtendedConnect(Exception):
    """The server has not announced support for CONNECT with :protocol, so the proxy must not send
    one (RFC 8441 §3), or it does not speak HTTP/2. Nothing has been sent."""


def unreadable(error: ProtocolError) -> UpstreamClosed:
    """The error for a response body with invalid framing."""
    failure = UpstreamClosed(f"the response's body: {error}")
    failure.__cause__ = error
    return failure


class Carrier(ABC):
    """One exchange on one connection. Created for the exchange and dropped after it."""

    stream: Stream  # the connection, for the logs
    share: Share = UNCOUNTED  # of the client's connection; buffers are charged to it

    @property
    def declined(self) -> int:
        """HTTP/1 heads of this exchange that needed the full parser."""
        return 0

    @abstractmethod
    async def admit(self) -> None:
        """Wait until it is known whether the server accepts a WebSocket. Call `begin` next, with no
        await in between. Raises NoExtendedConnect, Unanswered."""

    @abstractmethod
    def begin(self, head: RequestHead, length: Length) -> None:
        """Add the request head, without the hop-by-hop fields of the client's connection. Raises
        RequestError (as does `flush`) if the head is larger than the server accepts."""

    @abstractmethod
    def put(self, data: bytes) -> None: ...

    @abstractmethod
    def finish(self, end: EndOfMessage) -> None: ...

    @abstractmethod
    async def flush(self) -> None:
        """Send what was put. Raises ConnectionLost if the server accepts no more data (`head` may
        return its reason), UpstreamProtocolError, and Unanswered."""

    @abstractmethod
    async def head(self) -> ResponseHead:
        """Return the next head, including interim ones. Raises Unanswered, UpstreamProtocolError,
        UpstreamClosed."""

    def half_close(self) -> None:  # noqa: B027  # a stream has no half-close
        """The whole request has been sent and the client has ended its direction: end ours too, if
        the protocol supports it."""

    def bare_end(self) -> Headers | None:
        """After `head`: the trailers of a response that has already ended without a body. None: it
        has not, or this is not known."""
        return None

    @property
    @abstractmethod
    def length(self) -> Length:
        """The length of the response body."""

    @abstractmethod
    def body_nowait(self) -> bytes | EndOfMessage | None:
        """Return the next piece or the end of the body; None: not yet. Raises UpstreamClosed,
        UpstreamReset."""

    @abstractmethod
    async def body(self) -> bytes | EndOfMessage: ...

    @abstractmethod
    def tunnel(self) -> Stream | None:
        """The stream of raw bytes after a head that ended HTTP on this connection. None: it did
        not."""


class Http1Carrier(Carrier):
    """An HTTP/1 connection, for one exchange. The owner of the lease gives it back."""

    def __init__(self, upstream: Upstream) -> None:
        self.stream = upstream.stream
        self._http = upstream.http
        self._reused = upstream.reused
        self._declined = upstream.http.declined
        self._interim = False
        self._key = b""  # the key of a WebSocket handshake, which an HTTP/2 client does not send
        self._half_closed = False
        self._out: list[bytes] = []

    @property
    def declined(self) -> int:
        return self._http.declined - self._declined

    async def admit(self) -> None:
        await trio.lowlevel.checkpoint()  # HTTP/1 servers tell by their response

    def begin(self, head: RequestHead, length: Length) -> None:
        if length is Framing.CHUNKED:
            head.headers.add(b"Transfer-Encoding", b"chunked")
        if websocket.asks(head):
            self._key = b64encode(token_bytes(16))
            head = websocket.to_get(head, self._key)
        self._out.append(self._http.send_request(head, length))

    def put(self, data: bytes) -> None:
        self._out.append(self._http.send_data(data))

    def finish(self, end: EndOfMessage) -> None:
        if last := self._http.send_end(end):
            self._out.append(last)

    async def flush(self) -> None:
        data = self._out[0] if len(self._out) == 1 else b"".join(self._out)
        self._out.clear()
        if data:
            try:
                with self.share.holding(len(data)):
                    await self.stream.send_all(data)
            except ConnectionLost:
                self._http.keep_alive = False
                raise

    def half_close(self) -> None:
        """End our direction. The server decides what this means, as it would without a proxy; many
        take it for the client's end."""
        self._half_closed = True
        self._http.keep_alive = False
        stream = self.stream
        with suppress(NetError, trio.ClosedResourceError, OSError):
            if isinstance(stream, SocketStream):
                stream.send_eof_nowait()
            elif isinstance(stream, TLSStream) and stream.send_eof_nowait():
                # so that the peer's kernel reports the end without a read
                stream.socket.shutdown(socket.SHUT_WR)

    async def head(self) -> ResponseHead:
        http = self._http
        while True:
            try:
                head = http.next_response()
            except ProtocolError as error:
                raise UpstreamProtocolError(f"the response's head: {error}") from error
            if isinstance(head, ResponseHead):
                self._interim = True
                return self._connected(head) if self._key else head
            if head is Signal.CLOSED:
                raise self._unanswered("the server closed the connection without a response")
            try:
                http.receive_data(await self.stream.receive_some(READ_SIZE))
            except ConnectionLost as loss:
                if http.buffered:
                    raise UpstreamClosed(
                        f"the connection broke during the response head: {loss}"
                    ) from loss
                raise self._unanswered(
                    f"the connection broke before a response came: {loss}", loss.reason == "timeout"
                ) from loss

    def _connected(self, head: ResponseHead) -> ResponseHead:
        """Translate the response to a WebSocket handshake for an HTTP/2 client, which takes any 2xx
        for an accepted tunnel."""
        if head.status == 101:
            try:
                return websocket.to_200(head, self._key)
            except ProtocolError as error:
                raise UpstreamProtocolError(str(error)) from error
        if 200 <= head.status < 300:
            raise UpgradeFailed(
                f"the server answered {head.status} to a WebSocket handshake instead of 101"
            )
        return head

    def _unanswered(self, words: str, silent: bool = False) -> Exception:
        if self._half_closed:
            return ClientGone(f"the client had ended its direction of the connection, and {words}")
        # Only a reused connection may have been closed for a reason other than our request. A
        # timeout means that the server did not close it and would not accept a new one either.
        return Unanswered(words, again=self._reused and not self._interim and not silent)

    @property
    def length(self) -> Length:
        return self._http.body_length

    def body_nowait(self) -> bytes | EndOfMessage | None:
        try:
            piece = self._http.next_body()
        except ProtocolError as error:
            raise self._broken(unreadable(error)) from error
        return None if isinstance(piece, Signal) else piece

    def _broken(self, error: UpstreamClosed) -> Exception:
        """The error for a body that breaks off. If the client has ended its direction, the server
        may have ended the body for that reason."""
        return (
            ClientGone(f"the client had ended its direction of the connection, and {error}")
            if self._half_closed
            else error
        )

    async def body(self) -> bytes | EndOfMessage:
        while (piece := self.body_nowait()) is None:
            try:
                self._http.receive_data(
                    await self.stream.receive_some(self.share.read_size(READ_SIZE))
                )
            except ConnectionLost as error:
                raise self._broken(
                    UpstreamClosed(f"the connection broke during the response body: {error}")
                ) from error
        return piece

    def tunnel(self) -> Stream | None:
        if self._http.reading is not At.TUNNEL:
            return None
        if self._http.writing is not At.DONE:
            raise UpstreamProtocolError(
                "the server switched protocols before it received the whole request"
            )
        self._http.keep_alive = False
        return PrefixedStream(self.stream, self._http.take_rest())


class Http2Carrier(Carrier):
    """A stream of an HTTP/2 connection. A request without a body ends with its head. A CONNECT does
    not end, because its stream is the tunnel."""

    def __init__(self, mux: MultiplexedConnection) -> None:
        self.stream = mux.stream
        self._mux = mux
        self._request: RequestHead | None = None
        self._stream: Http2Stream | None = None
        self._response: ResponseHead | None = None
        self._pieces: list[bytes] = []
        self._end: EndOfMessage | None = None
        self._sends = True
        self._key: bytes | None = None  # the key of the client's WebSocket handshake over HTTP/1.1

    @classmethod
    def of_stream(
        cls,
        mux: MultiplexedConnection,
        stream: Http2Stream,
        request: RequestHead,
        response: ResponseHead | None,
    ) -> Http2Carrier:
        """Return a carrier for an open stream. `response`: the head that was already received from
        it."""
        carrier = cls(mux)
        carrier._request, carrier._stream, carrier._response = request, stream, response
        return carrier

    async def admit(self) -> None:
        mux = self._mux
        await mux.settings_received.wait()
        # also if the connection ended without SETTINGS: servers without HTTP/2 close it after our
        # preface
        if not mux.http.extended_connect:
            raise NoExtendedConnect
        if not mux.capacity:
            raise Unanswered("the connection accepted no more streams", again=True, untouched=True)

    def begin(self, head: RequestHead, length: Length) -> None:
        self._key = websocket.key_of(head)
        if self._key is not None:
            head = websocket.to_connect(head)
        self._request = head
        self._sends = length != 0
        try:
            self._stream = self._mux.open(head, end=length == 0 and head.method != b"CONNECT")
        except HeadTooLarge as error:
            raise oversized(error) from error
        self._stream.share = self.share

    def put(self, data: bytes) -> None:
        self._pieces.append(data)

    def finish(self, end: EndOfMessage) -> None:
        self._end = end

    async def flush(self) -> None:
        stream = self._opened()
        pieces, self._pieces = self._pieces, []
        end, self._end = self._end, None
        if not self._sends or (not pieces and end is None):
            return
        trailers = end is not None and bool(len(end.trailers))
        try:
            await stream.send(
                b"".join(pieces) if len(pieces) != 1 else pieces[0],
                end=end is not None and not trailers,
            )
            if end is not None and trailers:
                stream.send_trailers(end.trailers)
        except HeadTooLarge as excess:
            raise oversized(excess) from excess
        except StreamLost as error:
            raise ConnectionLost(str(error), "reset") from error

    def _opened(self) -> Http2Stream:
        if self._stream is None:
            raise RuntimeError("begin was not called")
        return self._stream

    async def head(self) -> ResponseHead:
        stream = self._opened()
        try:
            head = await stream.head()
        except StreamLost as error:
            if error.refused:
                raise Unanswered(str(error), again=not error.reset, untouched=True) from error
            raise self._broken(error) from error
        if not head.reason:
            head.reason = _reason(head.status)
        if self._key is not None and 200 <= head.status < 300:
            head = websocket.to_101(head, self._key)
        self._response = head
        return head

    def bare_end(self) -> Headers | None:
        return self._opened().bare_end

    def _broken(self, error: StreamLost) -> Exception:
        if error.fault:
            return UpstreamProtocolError(f"the response: {error}")
        if self._mux.http.speaks_http1:
            return UpstreamProtocolError(str(error))
        if error.reset:
            return UpstreamReset(str(error), error.code)
        if isinstance(error, ConnectionGoaway):
            return UpstreamGoaway(str(error))
        return UpstreamClosed(
            f"the connection broke: {error}" if self._mux.broken is not None else str(error)
        )

    @property
    def length(self) -> Length:
        if self._response is None or self._request is None or self._request.method == b"HEAD":
            return 0
        return body_length(self._response.headers, ended=self._opened().empty)

    def body_nowait(self) -> bytes | EndOfMessage | None:
        try:
            return self._opened().receive_nowait()
        except StreamLost as error:
            raise self._broken(error) from error

    async def body(self) -> bytes | EndOfMessage:
        try:
            return await self._opened().receive()
        except StreamLost as error:
            raise self._broken(error) from error

    def tunnel(self) -> Stream | None:
        if (
            self._request is None
            or self._request.method != b"CONNECT"
            or self._response is None
            or self._response.status >= 300
        ):
            return None
        return Tunnel(self._opened())

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        else:
            self._mux.on_capacity()  # the unused capacity is free for another request


def _reason(status: int) -> bytes:
    """The usual reason phrase. HTTP/2 has none, but HTTP/1 clients expect one."""
    try:
        return HTTPStatus(status).phrase.encode("ascii")
    except ValueError:
        return b""
