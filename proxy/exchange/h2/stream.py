"""One stream of a shared HTTP/2 connection, as an exchange uses it: a buffer for received data, and
the sending side."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import trio
from trio.lowlevel import ParkingLot

from proxy.exchange.h2.writer import Writer
from proxy.net.memory_budget import Share
from proxy.net.socket_stream import Stream
from proxy.wire.h2.connection import Http2Connection
from proxy.wire.h2.events import (
    DataReceived,
    HeadReceived,
    StreamBroken,
    StreamGone,
    TrailersReceived,
)
from proxy.wire.h2.frames import Code
from proxy.wire.messages import END, EndOfMessage, Headers, RequestHead, ResponseHead

# Pieces are joined up to this size: single bytes would take a hundred times their size in memory.
_PIECE = 4096
# The number of output bytes that a header block counts as. Most are far smaller after compression.
_HEAD = 1024
# The most received heads that are not consumed yet: interim responses may arrive faster than they
# are passed on.
_HEADS = 64


StreamEvent = HeadReceived | DataReceived | TrailersReceived | StreamBroken


class StreamLost(Exception):
    """A stream ended before its message did.

    `code`: the code of RST_STREAM. `refused`: the peer has certainly not processed the request.
    `fault`: this side reset the stream, because of a protocol error of the peer. `reset`: the peer
    reset the stream, and only this stream. If both are false, the connection has ended or is
    ending.
    """

    def __init__(
        self,
        message: str,
        code: int,
        *,
        refused: bool = False,
        fault: bool = False,
        reset: bool = False,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.refused = refused
        self.fault = fault
        self.reset = reset

    def again(self) -> StreamLost:
        """Return an equal error to raise. A stream keeps its error, and an error that was raised
        holds its traceback, and with it the stream: that would be a cycle."""
        return type(self)(
            str(self), self.code, refused=self.refused, fault=self.fault, reset=self.reset
        )


class ConnectionGoaway(StreamLost):
    """The connection has ended, after the peer had announced it (GOAWAY)."""


class SendOrder(Protocol):
    """The order in which streams send (send_scheduler.py)."""

    @property
    def waiting(self) -> bool: ...

    async def wait(self, stream: Http2Stream) -> None: ...

    def next(self) -> bool: ...


class StreamOwner(Protocol):
    """The parts of a connection (connection.py) that its streams use."""

    client: bool  # which of the two ends this is
    http: Http2Connection
    stream: Stream
    share: Share
    writer: Writer
    with_events: list[Http2Stream]
    broken: str | None
    last_read: float

    @property
    def scheduler(self) -> SendOrder: ...

    def put(self, size: int) -> None:
        """Count `size` bytes that `http` has to write."""
        ...

    def consumed(self, number: int, credit: int) -> None:
        """`credit` bytes of stream `number` were consumed."""
        ...

    def forget(self, stream: Http2Stream) -> None:
        """`stream` is closed."""
        ...


class Http2Stream:
    """One stream: received data that was not consumed yet, and its end."""

    __slots__ = (
        "_chunks",
        "_end",
        "_heads",
        "_lost",
        "_receivers",
        "_senders",
        "mux",
        "number",
        "on_events",
        "on_lost",
        "request",
        "sent",
        "share",
    )  # fmt: skip

    def __init__(self, mux: StreamOwner, number: int) -> None:
        self.mux = mux
        self.number = number
        self.share = mux.share  # buffers are charged to it
        self.sent = 0  # bytes of DATA
        self.request: RequestHead | None = None
        self.on_lost: Callable[[], None] | None = None  # called when the stream is lost
        # called when the data of one read is stored; used instead of waiting
        self.on_events: Callable[[], None] | None = None
        self._heads: deque[ResponseHead] = deque()
        self._chunks: deque[tuple[bytes, int]] = deque()
        self._end: EndOfMessage | None = None
        self._lost: StreamLost | None = None
        self._receivers: ParkingLot | None = None  # receivers wait here; created for the first one
        self._senders: ParkingLot | None = None  # senders wait here

    # Called by the reader...

    def on_event(self, event: StreamEvent) -> None:
        match event:
            case DataReceived():
                if event.data:
                    self.share.charge(event.credit)
                    self._append(event.data, event.credit)
                elif event.credit:  # padding, which no exchange will consume
                    self.mux.consumed(self.number, event.credit)
                if event.ended:
                    self._end = END
            case HeadReceived(head=ResponseHead() as head):
                if len(self._heads) == _HEADS:
                    self.mux.http.reset(self.number, Code.ENHANCE_YOUR_CALM)
                    self.lose(
                        StreamLost(
                            f"more than {_HEADS} interim responses at once",
                            Code.ENHANCE_YOUR_CALM,
                            fault=True,
                        )
                    )
                    return
                self._heads.append(head)
                if event.ended:
                    self._end = END
            case HeadReceived():
                self._end = END if event.ended else None
            case TrailersReceived():
                self._end = EndOfMessage(event.trailers)
            case StreamBroken():
                refused = event.by_peer and event.code == Code.REFUSED_STREAM
                self.lose(
                    StreamLost(
                        event.words,
                        event.code,
                        refused=refused,
                        fault=not event.by_peer,
                        reset=event.by_peer,
                    )
                )
        if self.on_events is not None:
            self.mux.with_events.append(self)
        elif self._receivers is not None:
            self._receivers.unpark_all()

    def _append(self, data: bytes, credit: int) -> None:
        if self._chunks and len(self._chunks[-1][0]) + len(data) <= _PIECE:
            before = self._chunks.pop()
            data, credit = before[0] + data, before[1] + credit
        self._chunks.append((data, credit))

    def lose(self, error: StreamLost) -> None:
        """The stream has ended early. This is no error for a client that has the whole response:
        the server needs no more of the request."""
        if self._lost is None and not (self.mux.client and self._end is not None):
            self._lost = error
            if self.on_lost is not None:
                self.on_lost()
        if self._receivers is not None:
            self._receivers.unpark_all()
        self.wake()

    def wake(self) -> None:
        """The windows have opened."""
        if self._senders is not None:
            self._senders.unpark_all()

    async def window_opens(self) -> None:
        if self._senders is None:
            self._senders = ParkingLot()
        await self._senders.park()

    async def _more(self) -> None:
        """Wait until something was received, or the stream is lost."""
        if self._receivers is None:
            self._receivers = ParkingLot()
        await self._receivers.park()

    # Called by the exchange...

    @property
    def ended(self) -> bool:
        """Whether the whole message has arrived. It may not have been consumed yet."""
        return self._end is not None

    @property
    def empty(self) -> bool:
        """Whether the whole message has arrived and was consumed, or had no body and no
        trailers."""
        return self._end is not None and not self._chunks and not len(self._end.trailers)

    @property
    def bare_end(self) -> Headers | None:
        """The trailers of a message that has ended and has no unread body. None: it has one, or has
        not ended."""
        return self._end.trailers if self._end is not None and not self._chunks else None

    @property
    def lost(self) -> StreamLost | None:
        return self._lost

    @property
    def next_head(self) -> ResponseHead | None:
        """The head that `head` would return without waiting. It is not consumed."""
        return self._heads[0] if self._heads else None

    @property
    def next_size(self) -> int:
        """The size in bytes of the piece that `receive_nowait` would return. 0: none."""
        return len(self._chunks[0][0]) if self._chunks else 0

    def head_nowait(self) -> None:
        """Consume `next_head`."""
        self._heads.popleft()

    async def head(self) -> ResponseHead:
        """Return the next head of the response, including interim ones. Raises StreamLost."""
        while not self._heads:
            if self._lost is not None:
                raise self._lost.again()
            await self._more()
        return self._heads.popleft()

    def receive_nowait(self) -> bytes | EndOfMessage | None:
        """Return the next piece of the body, or its end. None: not yet. Returned bytes count as
        consumed: the peer may send as many more. Raises StreamLost."""
        if self._chunks:
            data, credit = self._chunks.popleft()
            self.share.release(credit)
            self.mux.consumed(self.number, credit)
            return data
        if self._lost is not None:
            raise self._lost.again()
        return self._end

    async def receive(self) -> bytes | EndOfMessage:
        while (piece := self.receive_nowait()) is None:
            await self._more()
        return piece

    def send_head(self, head: ResponseHead, *, end: bool) -> None:
        """Send a response head. Raises StreamLost, like all methods that send, and HeadTooLarge,
        like `send_trailers`."""
        try:
            self.mux.http.send_response(self.number, head, end=end)
        except StreamGone as error:
            raise StreamLost(str(error), Code.STREAM_CLOSED) from error
        self.mux.put(_HEAD)

    def send_trailers(self, fields: Headers) -> None:
        try:
            self.mux.http.send_trailers(self.number, fields)
        except StreamGone as error:
            raise StreamLost(str(error), Code.STREAM_CLOSED) from error
        self.mux.put(_HEAD)

    async def send(self, data: bytes, *, end: bool) -> None:
        """Send DATA as fast as the windows and the writer allow. Raises StreamLost."""
        at = 0
        try:
            while True:
                await self.mux.writer.paced()
                window = self._send_window()
                piece = data if not at and len(data) <= window else data[at : at + window]
                if not piece and at < len(data):
                    await self.mux.scheduler.wait(self)
                    continue
                at += len(piece)
                self.put(piece, end=end and at >= len(data))
                if self.mux.scheduler.next():
                    await trio.lowlevel.checkpoint()
                if at >= len(data):
                    return
        except BaseException:
            self.mux.scheduler.next()
            raise

    def _send_window(self) -> int:
        if self._lost is not None:
            raise self._lost.again()
        if self.mux.broken is not None:
            raise StreamLost(self.mux.broken, Code.CANCEL)
        try:
            return self.mux.http.window(self.number)
        except StreamGone as error:
            raise StreamLost(str(error), Code.STREAM_CLOSED) from error

    def takes(self, size: int) -> bool:
        """Return whether `size` bytes can be `put` now, without overtaking another sender."""
        mux = self.mux
        if (
            self._lost is not None
            or mux.broken is not None
            or mux.writer.behind
            or mux.scheduler.waiting
        ):
            return False
        try:
            return mux.http.window(self.number) >= size
        except StreamGone:
            return False

    def put(self, data: bytes, *, end: bool) -> None:
        """Send DATA that fits into the windows. Raises StreamLost."""
        self.sent += len(data)
        try:
            self.mux.http.send_data(self.number, data, end=end)
        except StreamGone as error:
            raise StreamLost(str(error), Code.STREAM_CLOSED) from error
        self.mux.put(len(data))

    @property
    def may_send(self) -> bool:
        """Whether `send` would raise, or would not have to wait for a window."""
        try:
            return self._send_window() > 0
        except StreamLost:
            return True

    def close(self, code: int | None = None) -> None:
        """Abandon the stream: reset it if it has not ended (with `code`), and store nothing more
        for it."""
        if code is not None:
            self.mux.http.reset(self.number, code)
        self.mux.forget(self)

    def give_back(self) -> None:
        """Drop the received data that was not consumed, and return its window."""
        while self._chunks:
            credit = self._chunks.popleft()[1]
            self.share.release(credit)
            self.mux.consumed(self.number, credit)
