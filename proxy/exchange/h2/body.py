"""The bodies of HTTP/2 messages, and the bytes of tunnels in streams."""

from __future__ import annotations

import trio

from proxy.errors import ClientGone, RequestTimeout, ResponseTooLarge
from proxy.exchange.h2.stream import Http2Stream, StreamLost
from proxy.net.address import Address
from proxy.net.exceptions import ConnectionLost
from proxy.net.socket_stream import End
from proxy.wire.h1.body import Framing, Length
from proxy.wire.h2.events import HeadTooLarge
from proxy.wire.h2.frames import Code
from proxy.wire.messages import EndOfMessage, Headers


class StreamBody:
    """A request body on a stream. An exchange.Body.

    The only limit here is on a silent stream. Streaming calls, such as gRPC's, may pause, and a
    PING detects a dead peer. A client that only receives while the response is being sent does not
    count as silent: a client that watches for changes may send nothing for days.
    """

    __slots__ = ("_length", "_patience", "_stream")

    def __init__(self, stream: Http2Stream, patience: float) -> None:
        self._stream = stream
        self._patience = patience
        self._length: Length | None = None

    @property
    def length(self) -> Length:
        """The length from the head. It is computed on first use, because the end of a request
        without a body may have arrived in the same read."""
        if self._length is None:
            headers = (
                self._stream.request.headers if self._stream.request is not None else Headers()
            )
            self._length = body_length(headers, ended=self._stream.empty)
        return self._length

    def receive_nowait(self) -> bytes | EndOfMessage | None:
        try:
            return self._stream.receive_nowait()
        except StreamLost as error:
            raise ClientGone(f"during the request: {error}") from error

    async def receive(self) -> bytes | EndOfMessage:
        piece = self.receive_nowait()
        while piece is None:
            sent = self._stream.sent
            with trio.move_on_after(self._patience):
                try:
                    return await self._stream.receive()
                except StreamLost as error:
                    raise ClientGone(f"during the request: {error}") from error
            if self._stream.sent == sent:
                raise RequestTimeout(
                    f"the request's body paused for {self._patience} s, and so did the response"
                )
            piece = self.receive_nowait()
        return piece


def body_length(headers: Headers, *, ended: bool) -> Length:
    """Return the body length of an HTTP/2 message from its head. `ended`: the message has ended
    without a body."""
    if ended:
        return 0
    value = headers.get(b"content-length")
    return int(value) if value is not None else Framing.CHUNKED


def too_large(error: HeadTooLarge) -> ResponseTooLarge:
    """The error for a response whose head or trailers are larger than the client accepts."""
    return ResponseTooLarge(f"the response: {error}")


class Tunnel:
    """The bytes of a stream after the head of a CONNECT, as a Stream for a relay."""

    def __init__(self, stream: Http2Stream) -> None:
        self._stream = stream
        self._rest = b""
        self._ended = False
        self.bytes_read = 0
        self.bytes_written = 0

    @property
    def peer(self) -> Address:
        return self._stream.mux.stream.peer

    @property
    def local(self) -> Address:
        return self._stream.mux.stream.local

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if not self._rest:
            try:
                piece = await self._stream.receive()
            except StreamLost as error:
                raise ConnectionLost(str(error), "reset") from error
            if isinstance(piece, EndOfMessage):
                return b""
            self._rest = piece
        data, self._rest = self._rest[:max_bytes], self._rest[len(self._rest[:max_bytes]) :]
        self.bytes_read += len(data)
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        try:
            await self._stream.send(bytes(data), end=False)
        except StreamLost as error:
            raise ConnectionLost(str(error), "reset") from error
        self.bytes_written += len(data)

    async def send_eof(self) -> None:
        if not self._ended:
            self._ended = True
            try:
                await self._stream.send(b"", end=True)
            except StreamLost as error:
                raise ConnectionLost(str(error), "reset") from error

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()
        self.close()

    def close(self) -> None:
        self._stream.close()

    def reset(self) -> None:
        self._stream.close(Code.CONNECT_ERROR)

    def is_idle(self) -> bool:
        return self._stream.lost is None and not self._stream.ended

    def ended(self) -> End:
        if self._stream.lost is not None:
            return "lost"
        return "half" if self._stream.empty and not self._rest else "open"
