"""One HTTP/2 connection shared by many exchanges; either role.

Two tasks belong to a connection and to nobody's exchange. The reader parses and files what it has read into the streams; it never
waits for a consumer, so one that is slow delays nobody: its stream's window runs out, and the peer stops. The writer sends what has
been put down since it last looked, everything in one write; no exchange ever sends by itself, so cancelling one cannot tear a record
that belongs to all. Whoever puts something down says `touch`.

    exchange task --put down frames--> Http2Connection --data_to_send--> writer --> socket
    socket --> reader --> Http2Connection --events--> MuxStream buffers --receive--> exchange task

What is put down is bounded: heads by the number of streams, DATA by `_AHEAD` bytes for the connection, beyond which senders wait for
the writer; and by the peer's windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import trio
from trio.lowlevel import ParkingLot

from proxy.exchange.mux_stream import MuxStream, StreamLost
from proxy.net.errors import NetError
from proxy.net.streams import Stream
from proxy.wire.events2 import (
    DataReceived,
    Event,
    GoingAway,
    HeadReceived,
    Http2Limits,
    PingAnswered,
    StreamBroken,
    StreamGone,
    TrailersReceived,
    WindowOpened,
)
from proxy.wire.frames2 import Code
from proxy.wire.http1 import Role
from proxy.wire.http2 import Http2Connection
from proxy.wire.messages import ProtocolError, RequestHead

# One TLS record carries 16 KiB; reading more at a time would let one connection's frames hold up the others for longer.
_READ = 16384
# DATA that may be put down ahead of the writer: enough to fill a write while the next pieces are made.
_AHEAD = 256 * 1024
_PING = b"isthmus\0"


@dataclass(frozen=True, slots=True)
class MuxSettings:
    """Times in seconds."""

    limits: Http2Limits = field(default_factory=Http2Limits)
    idle_timeout: float = math.inf  # without a stream, until we say GOAWAY
    write_timeout: float = 60.0  # for the peer to take what it is sent
    ping_interval: float = 20.0  # of silence, while streams are open, until we ask whether the peer is there
    ping_timeout: float = 10.0


def _nobody() -> None:
    pass


class Mux:
    """A connection. `run` serves it until it ends; `broken` says why it is of no further use."""

    def __init__(self, stream: Stream, role: Role, settings: MuxSettings) -> None:
        self.stream = stream
        self.client = role is Role.CLIENT
        self.http = Http2Connection(role, settings.limits)
        self.settings = settings
        self.opened = trio.current_time()
        self.idle_since = self.opened
        self.broken: str | None = None
        self.going_away = False  # no new streams, from whichever side it was said
        self._streams: dict[int, MuxStream] = {}
        self._ahead = 0
        self._put_down = ParkingLot()  # the writer waits here
        self._sent = ParkingLot()  # senders of DATA wait here for the writer
        self.on_room: Callable[[], object] = _nobody  # told when there may be more room for streams, or none any more
        self._heard = self.opened
        self._pinged: float | None = None
        self._scope = trio.CancelScope()

    async def run(self, on_request: Callable[[MuxStream], None] | None = None) -> None:
        """Read and write until the connection ends. `on_request` is told of each stream that the peer opens (server).

        Does not raise what ends the connection: every stream is told, and `broken` says it. Closes the stream.
        """
        with self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                nursery.start_soon(self._watch)
                await self._read(on_request)
                nursery.cancel_scope.cancel()
        self._end(self.broken or "the connection was closed")
        await self._say_goodbye()

    async def _read(self, on_request: Callable[[MuxStream], None] | None) -> None:
        try:
            while data := await self.stream.receive_some(_READ):
                self._heard = trio.current_time()
                for event in self.http.receive_data(data, self._heard):
                    self._dispatch(event, on_request)
                self.touch()
            self._end("the peer closed the connection")
        except (NetError, ProtocolError, trio.ClosedResourceError) as error:
            self._end(str(error))

    def _dispatch(self, event: Event, on_request: Callable[[MuxStream], None] | None) -> None:
        match event:
            case WindowOpened(stream=0):
                for stream in self._streams.values():
                    stream.wake()
                self.on_room()
            case GoingAway():
                self._peer_goes(event)
            case PingAnswered():
                self._pinged = None
            case HeadReceived(head=RequestHead() as head):
                stream = self._streams[event.stream] = MuxStream(self, event.stream)
                stream.request = head
                stream.file(event)
                if on_request is not None:
                    on_request(stream)
            case WindowOpened():
                self._wake(event.stream)
            case DataReceived() | HeadReceived() | TrailersReceived() | StreamBroken():
                known = self._streams.get(event.stream)
                if known is not None:
                    known.file(event)
                elif isinstance(event, DataReceived):
                    self.http.consumed(event.stream, event.credit)

    def _wake(self, number: int) -> None:
        stream = self._streams.get(number)
        if stream is not None:
            stream.wake()

    def _peer_goes(self, event: GoingAway) -> None:
        self.going_away = True
        for number, stream in list(self._streams.items()):
            if number > event.last:
                stream.lose(StreamLost("the peer is going away and did not take the stream", Code.REFUSED_STREAM, refused=True))
        self.on_room()
        self.touch()

    async def _write(self) -> None:
        while True:
            data = self.http.data_to_send()
            if not data:
                if self.going_away and not self._streams:
                    self._scope.cancel()  # everything has been said
                await self._put_down.park()
                continue
            self._ahead = 0
            with trio.move_on_after(self.settings.write_timeout) as scope:
                try:
                    await self.stream.send_all(data)
                except (NetError, trio.ClosedResourceError) as error:
                    self._end(str(error))
                    return
            if scope.cancelled_caught:
                self._end(f"the peer took nothing for {self.settings.write_timeout} s")
                return
            self._sent.unpark_all()

    async def _watch(self) -> None:
        """Ask a silent peer whether it is there, while somebody waits for it."""
        interval, patience = self.settings.ping_interval, self.settings.ping_timeout
        while True:
            await trio.sleep(min(interval, patience) / 2)
            now = trio.current_time()
            if self._pinged is not None and now - self._pinged > patience and self._heard < self._pinged:
                self._end(f"the peer did not answer a PING for {patience} s")
                return
            if not self._streams and now - max(self.idle_since, self._heard) > self.settings.idle_timeout:
                self.retire()
            elif self._streams and self._pinged is None and now - self._heard > interval:
                self._pinged = now
                self.http.ping(_PING)
                self.touch()
            elif self._heard >= (self._pinged or 0.0):
                self._pinged = None

    def _end(self, words: str) -> None:
        """The connection is of no further use: everybody is told, once."""
        if self.broken is None:
            self.broken = words
            self.going_away = True
            for stream in list(self._streams.values()):
                stream.lose(StreamLost(words, Code.CANCEL))
            self._sent.unpark_all()
            self.on_room()
        self._scope.cancel()

    async def _say_goodbye(self) -> None:
        """The last frames (GOAWAY), if they can be sent at once, and the end of the connection."""
        self.http.close(Code.NO_ERROR)
        with trio.move_on_after(1, shield=True):
            try:
                await self.stream.send_all(self.http.data_to_send())
                await self.stream.aclose()
            except (NetError, trio.ClosedResourceError):
                pass
        self.stream.close()

    # For the exchanges...

    def touch(self) -> None:
        """Something may have been put down: the writer is to look."""
        if self.http.pending or self.going_away:
            self._put_down.unpark_all()

    def put_data(self, number: int, data: bytes, *, end: bool) -> None:
        """Put down DATA that the windows allow. Raises StreamLost."""
        try:
            self.http.send_data(number, data, end=end)
        except StreamGone as error:
            raise StreamLost(str(error), Code.STREAM_CLOSED) from error
        self._ahead += len(data)
        self.touch()

    async def paced(self) -> None:
        """Wait until the writer is not too far behind."""
        while self._ahead > _AHEAD and self.broken is None:
            await self._sent.park()

    def consumed(self, number: int, credit: int) -> None:
        self.http.consumed(number, credit)
        self.touch()

    @property
    def usable(self) -> bool:
        return self.broken is None and not self.going_away

    @property
    def room(self) -> int:
        """How many more exchanges it can take now."""
        return self.http.room if self.usable else 0

    def open(self, head: RequestHead, *, end: bool) -> MuxStream:
        """A new stream with this head; only while there is `room`, and with no await in between."""
        stream = MuxStream(self, self.http.send_request(head, end=end))
        self._streams[stream.number] = stream
        self.touch()
        return stream

    def forget(self, stream: MuxStream) -> None:
        """The exchange is over."""
        if self._streams.pop(stream.number, None) is None:
            return
        # RFC 9113 §8.1: a server that has answered wants no more of the request, and that is no error.
        self.http.reset(stream.number, Code.CANCEL if self.client else Code.NO_ERROR)
        stream.give_back()
        self.idle_since = trio.current_time()
        self.on_room()
        self.touch()

    @property
    def exchanges(self) -> int:
        return len(self._streams)

    def retire(self) -> None:
        """Take nothing new; the connection ends with its last stream."""
        if not self.going_away:
            self.going_away = True
            self.http.go_away()
            self.on_room()
            self.touch()

    def cut(self) -> None:
        """End it now."""
        self._end("the connection was cut")
