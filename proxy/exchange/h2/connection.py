"""One HTTP/2 connection shared by many exchanges; either role.

Two tasks belong to a connection and to nobody's exchange. The reader parses and files what it has read into the streams; it never
waits for a consumer, so one that is slow delays nobody: its stream's window runs out, and the peer stops. The writer sends what has
been put down since it last looked, everything in one write; no exchange ever sends by itself, so cancelling one cannot tear a record
that belongs to all. Whoever puts something down says `touch`.

    exchange task --put down frames--> Http2Connection --data_to_send--> writer --> socket
    socket --> reader --> Http2Connection --events--> MuxStream buffers --receive--> exchange task

What is put down is bounded by the writer. DATA is also bound by the peer's windows; where it is the connection's that is used up, the
streams take turns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import trio

from proxy.exchange.h2.goaway import say_goodbye
from proxy.exchange.h2.read_pacing import Intake
from proxy.exchange.h2.reset_pacing import Resets
from proxy.exchange.h2.send_scheduler import SendScheduler
from proxy.exchange.h2.settings import MuxSettings
from proxy.exchange.h2.stream import ConnectionLeft, Filed, MuxStream, StreamLost
from proxy.exchange.h2.writer import Writer
from proxy.net.exceptions import NetError
from proxy.net.memory_budget import UNCOUNTED, Share
from proxy.net.socket_stream import Stream
from proxy.net.tls.handshake import TLSStream
from proxy.wire.h1.connection import Role
from proxy.wire.h2.connection import Http2Connection
from proxy.wire.h2.events import (
    DataReceived,
    Event,
    Exhausted,
    GoingAway,
    HeadReceived,
    PingAnswered,
    StreamBroken,
    TrailersReceived,
    WindowOpened,
)
from proxy.wire.h2.fields import Pair
from proxy.wire.h2.flood_budget import OF_AGE
from proxy.wire.h2.frames import Code, code_name
from proxy.wire.messages import ProtocolError, RequestHead

# One TLS record carries 16 KiB; reading more at a time would let one connection's frames hold up the others for longer.
_READ = 16384
_PING, _GOODBYE = b"isthmus\0", b"goodbye\0"
# gRPC servers end a connection on which they are asked more than a few times within this (seconds) while they have nothing to say
# themselves (gRFC A8, GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS), and with it the quiet streams that we ask for.
_SELDOM = 300.0


def _nobody() -> None:
    pass


class Mux:
    """A connection. `run` serves it until it ends; `broken` says why it is of no further use."""

    def __init__(self, stream: Stream, role: Role, settings: MuxSettings, share: Share = UNCOUNTED) -> None:
        """`share`: of the client's connection. What is buffered on a connection to a server is charged to the clients it is for."""
        self.stream = stream
        self.share = share
        self._pacer = settings.streams.pacer
        self.client = role is Role.CLIENT
        verified = isinstance(stream, TLSStream)
        self.http = Http2Connection(role, settings.limits, settings.mesh_budget if verified else settings.budget)
        self._intake = Intake(self.http, share, settings)
        self._line = self._intake.line
        self.settings = settings
        self.opened = self.idle_since = trio.current_time()
        self.broken: str | None = None
        self.fault: ProtocolError | None = None  # of the peer's, which ended it, or ends it when its streams have ended
        self._farewell: str | None = None  # the code of the peer's GOAWAY
        self.going_away = False  # no new streams, from whichever side it was said
        self._last_call: float | None = None  # until then, those that the client opened before it could know
        self.greeted = trio.Event()  # the peer's SETTINGS are known; or the connection is broken
        self.reserved = 0  # streams that have been promised to somebody who has not opened them yet
        self._streams: dict[int, MuxStream] = {}
        self.writer = Writer(stream, self.http, settings.write_timeout, share)
        self._held = 0  # bytes of the connection's window that wait for consumers
        self.scheduler = SendScheduler(self.http)
        self._opened: list[MuxStream] = []  # by the peer, in this read
        self.news: list[MuxStream] = []  # streams that have some for `on_news`, from this read; perhaps more than once
        self.on_room: Callable[[], object] = _nobody  # told when there may be more room for streams, or none any more
        self.heard = self.opened  # when something came last; trio's time
        self._pinged: float | None = None
        self._ping_next = self.opened  # not before: an application's server may mind, another proxy does not
        self._seldom = _SELDOM if self.client and not isinstance(stream, TLSStream) else 0.0
        self._scope = trio.CancelScope()
        if isinstance(stream, TLSStream) and stream.expiry is not None:
            stream.expiry.retire = self.retire
        self._nursery: trio.Nursery | None = None  # while it runs
        self._resets = Resets(self.http, settings.resets, OF_AGE * 1.5 if verified else settings.resets.hold, self._have_reset)

    async def run(self, on_request: Callable[[MuxStream], None] | None = None) -> None:
        """Read and write until the connection ends. `on_request` is told of each stream that the peer opens, when all that came with
        it is filed; of lost ones too (server).

        Does not raise what ends the connection: every stream is told, and `broken` says it. Closes the stream in every case.
        """
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    nursery.start_soon(self._write)
                    nursery.start_soon(self._watch)
                    ending = await self._read(on_request)
                    self.going_away = True  # nothing new while the end waits: thousands may end in one moment
                    await self._pacer.turn(self._line)
                    self._end(ending)
                    nursery.cancel_scope.cancel()
            self._nursery = None
            self._end("the connection was closed")
            await self._line.emptied()
            await say_goodbye(self.stream, self.http, lingers=not self.client)
        finally:
            self._nursery = None
            self._resets.stop()
            self._end("the connection was cut")
            self._pacer.hurry(self._line)
            if not self.client:
                self.settings.streams.closes(self.share, len(self._streams))
                self._streams.clear()
            self.stream.close()
            if isinstance(self.stream, TLSStream) and self.stream.expiry is not None:
                self.stream.expiry.retire = None  # which leads back here

    async def _read(self, on_request: Callable[[MuxStream], None] | None) -> str:
        """Read until the connection ends; why it did."""
        intake = self._intake
        try:
            while data := await self.stream.receive_some(_READ):
                self._take(data, on_request)
                if intake.full:
                    await intake.ready(partial(self._take, b"", on_request))
        except ProtocolError as error:
            self.fault = error
            if self.client:  # responses that were complete in front of the fault count
                for event in self.http.before_fault:
                    self._dispatch(event)
                self._tell(on_request)
            return str(error)
        except (NetError, trio.ClosedResourceError) as error:
            return str(error)
        return "the peer closed the connection"

    def _take(self, data: bytes, on_request: Callable[[MuxStream], None] | None) -> None:
        """File what has been read."""
        if not self.client:
            self._intake.prepare()
        self.heard = trio.current_time()
        for event in self.http.receive_data(data, self.heard):
            self._dispatch(event)
        self._intake.note()
        self._tell(on_request)
        self.touch()

    def _tell(self, on_request: Callable[[MuxStream], None] | None) -> None:
        """What one read has brought is filed: whoever hears of it without waiting for it hears of it now."""
        if self._opened:
            opened, self._opened = self._opened, []
            if on_request is not None:
                self._intake.begin(opened, on_request)
        news, self.news = self.news, []
        for stream in news:
            if stream.on_news is not None:
                stream.on_news()

    def _dispatch(self, event: Event) -> None:
        match event:
            case HeadReceived(head=RequestHead() as head):
                stream = self._streams[event.stream] = MuxStream(self, event.stream)
                stream.request = head
                self.settings.streams.opens(self.share)
                stream.file(event)
                self._opened.append(stream)
            case HeadReceived() | DataReceived() | TrailersReceived() | StreamBroken():
                self._file(event)
            case WindowOpened(stream=0):
                self.greeted.set()  # it comes with SETTINGS, and a peer's first frame is SETTINGS
                self.scheduler.next()
                self.on_room()
            case WindowOpened():
                if (known := self._streams.get(event.stream)) is not None:
                    self.scheduler.leave(known)
                    known.wake()
            case GoingAway():
                self._peer_goes(event)
            case Exhausted():
                self.going_away = True
                self.fault = ProtocolError(event.words)
                self.on_room()
            case PingAnswered():
                self._pinged = None
                if event.payload == _GOODBYE:
                    self._close_door()

    def _file(self, event: Filed) -> None:
        self._ping_next = self.heard
        if (known := self._streams.get(event.stream)) is not None:
            if isinstance(event, DataReceived):
                self._held += event.credit
            known.file(event)
        elif isinstance(event, DataReceived):
            self.http.consumed(0, event.credit)
        elif isinstance(event, StreamBroken) and not event.by_peer and not self.client:
            known = MuxStream(self, event.stream)
            known.file(event)
            self._opened.append(known)
        if known is None and self._resets.waiting:
            self.on_room()  # a stream that was given up may have ended

    def _peer_goes(self, event: GoingAway) -> None:
        self.going_away = True
        self._farewell = code_name(event.code)
        for number, stream in list(self._streams.items()):
            # What a client says of streams that a server has pushed, and nobody pushes, is nothing about its requests.
            if self.client and number > event.last:
                stream.lose(StreamLost("the peer is going away and did not take the stream", Code.REFUSED_STREAM, refused=True))
        self.on_room()
        self.touch()

    async def _write(self) -> None:
        failure = await self.writer.run(lambda: self.going_away and not self._streams and self._last_call is None)
        if failure is not None:
            self._end(failure)
        self._scope.cancel()  # otherwise everything has been said

    async def _watch(self) -> None:
        """Ask a silent peer whether it is there, while somebody waits for it; end a connection that nobody has used for long."""
        while True:
            now = trio.current_time()
            if self._pinged is not None and self.heard >= self._pinged:
                self._pinged = None
            if self._pinged is not None and now >= self._pinged + self.settings.ping_timeout:
                self._end(f"the peer did not answer a PING for {self.settings.ping_timeout} s")
                return
            if self._last_call is not None and now >= self._last_call:
                self._close_door()
            elif not self._streams and now >= self.idle_since + self.settings.idle_timeout:
                self.retire()
            elif self._streams and self._pinged is None and now >= self._next_ping:
                self._pinged = now
                self._ping_next = now + self._seldom
                self.http.ping(_PING)
                self.touch()
            await trio.sleep_until(self._next_look(now))

    @property
    def _next_ping(self) -> float:
        return max(self.heard + self.settings.ping_interval, self._ping_next)

    def _next_look(self, now: float) -> float:
        if self._pinged is not None:
            return self._pinged + self.settings.ping_timeout
        if self._last_call is not None:
            return self._last_call
        if self._streams:
            return min(self._next_ping, now + self.settings.ping_interval)
        # Without a stream: one may be opened at any moment.
        soon = now + self.settings.ping_interval / 4
        return soon if self.going_away else min(soon, self.idle_since + self.settings.idle_timeout)

    def _close_door(self) -> None:
        """The client has heard our first GOAWAY, or will not hear of it."""
        self._last_call = None
        self.http.go_away()
        self.touch()

    def _end(self, words: str) -> None:
        """The connection is of no further use: everybody is told, once."""
        if self.broken is None:
            self.broken = words
            self.going_away = True
            kind = StreamLost
            if self.client and self._farewell is not None:
                kind, words = ConnectionLeft, f"the server was going away (GOAWAY, {self._farewell}): {words}"
            for stream in list(self._streams.values()):
                self._pacer.take(self._line, partial(stream.lose, kind(words, Code.CANCEL)))
            self.greeted.set()
            self.writer.stop()
            self.on_room()
        self._scope.cancel()

    # For the exchanges...

    def touch(self) -> None:
        """Something may have been put down: the writer is to look."""
        if self.http.pending or self.going_away:
            self.writer.touch()

    def put(self, size: int) -> None:
        """A stream has put down `size` bytes."""
        self.writer.put(size)
        self.touch()

    def consumed(self, number: int, credit: int) -> None:
        clogged = self.clogged
        self._held -= credit
        self.http.consumed(number, credit)
        self.touch()
        if clogged and not self.clogged:
            self.on_room()

    @property
    def clogged(self) -> bool:
        """Slow consumers hold so much of the connection's window that one more stream might not get its share."""
        limits = self.settings.limits
        return self._held > max(0, limits.connection_window - limits.stream_window)

    @property
    def usable(self) -> bool:
        return self.broken is None and not self.going_away

    @property
    def unused(self) -> bool:
        """It could be used, and has no stream, nor is one promised to anybody."""
        return self.usable and not self._streams and not self.reserved

    @property
    def room(self) -> int:
        """How many more exchanges it can take now; one until its server has said how many it takes."""
        if not self.usable or self.clogged:
            return 0
        free = self.http.room if self.greeted.is_set() else min(self.http.room, 1 - len(self._streams))
        return max(0, free - self.reserved)

    def open(self, head: RequestHead, *, end: bool) -> MuxStream:
        """A new stream with this head; only while there is `room`, and with no await in between."""
        return self._open(self.http.send_request(head, end=end))

    def open_fields(self, method: bytes, pairs: list[Pair], *, end: bool) -> MuxStream:
        """The same with a head that is a header list already."""
        return self._open(self.http.send_request_fields(method, pairs, end=end))

    def _open(self, number: int) -> MuxStream:
        stream = self._streams[number] = MuxStream(self, number)
        self.touch()
        return stream

    def forget(self, stream: MuxStream) -> None:
        """The exchange is over."""
        if self._streams.pop(stream.number, None) is None:
            return
        if not self.client:
            self.settings.streams.closes(self.share)
        if not self.client or self._nursery is None:
            # RFC 9113 §8.1: a server that has answered wants no more of the request, and that is no error.
            self.http.reset(stream.number, Code.CANCEL if self.client else Code.NO_ERROR)
        elif self._resets.add(stream.number):
            self._nursery.start_soon(self._resets.run)
        stream.give_back()
        self.idle_since = trio.current_time()
        self.on_room()
        self.touch()

    def retire_now(self) -> None:
        """As `retire`, but what the client opens from now on is refused: it has nothing to expect here."""
        self.going_away = True
        self._close_door()
        self.on_room()

    def exhaust(self) -> None:
        """End the connection because its client has held too much memory for too long."""
        words = "the connection has held more memory than it may for too long"
        self.http.close(Code.ENHANCE_YOUR_CALM, words)
        self._end(words)

    def _have_reset(self) -> None:
        self.on_room()
        self.touch()

    @property
    def exchanges(self) -> int:
        return len(self._streams)

    def retire(self) -> None:
        """Take nothing new; the connection ends with its last stream.

        A server says it in two steps. A stream that crosses with GOAWAY would be refused, and clients repeat that once at most; so the
        first GOAWAY refuses none, and a PING behind it tells by its answer that the client has read it: nothing is on its way any more.
        """
        if not self.going_away:
            self.going_away = True
            if self.client:
                self.http.go_away()
            else:
                self._last_call = trio.current_time() + self.settings.last_call
                self.http.announce_end()
                self.http.ping(_GOODBYE)
            self.on_room()
            self.touch()
