"""One HTTP/2 connection of either role, shared by many exchanges.

Two tasks belong to the connection and not to an exchange. The reader parses what it reads and puts
it into the streams. It never waits for a consumer, so a slow consumer delays no other stream: the
window of its stream runs out, and the peer stops sending. The writer sends all pending frames in
one write. An exchange never writes to the socket itself, so cancelling an exchange cannot cut a
record that all exchanges share. Code that adds frames calls `touch`.

    exchange task --add frames--> Http2Connection --data_to_send--> writer --> socket
    socket --> reader --> Http2Connection --events--> Http2Stream buffers --receive--> exchange

The writer limits the pending output. The peer's windows limit DATA. When the connection window is
used up, the streams take turns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import trio

from proxy.exchange.h2.goaway import close_after_goaway
from proxy.exchange.h2.read_pacing import ReadPacer
from proxy.exchange.h2.reset_pacing import ResetQueue
from proxy.exchange.h2.send_scheduler import SendScheduler
from proxy.exchange.h2.settings import Http2Settings
from proxy.exchange.h2.stream import ConnectionGoaway, Http2Stream, StreamEvent, StreamLost
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

# Bytes per read. A TLS record has up to 16 KiB; larger reads would let one connection delay the
# others.
_READ = 16384
_PING, _GOAWAY_PING = b"isthmus\0", b"goodbye\0"
# Seconds between PINGs to an application's server that sends nothing. gRPC servers close a
# connection that sends more than a few PINGs within this time while they send no data themselves
# (gRFC A8, GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS). That would break the quiet
# streams that the PINGs are for.
_SELDOM = 300.0


def _ignore() -> None:
    pass


class MultiplexedConnection:
    """An HTTP/2 connection. `run` serves it until it ends. `broken`: why it cannot be used any
    more."""

    def __init__(
        self, stream: Stream, role: Role, settings: Http2Settings, share: Share = UNCOUNTED
    ) -> None:
        """`share`: of the client's connection. Buffers of a connection to a server are charged to
        the clients that they are for."""
        self.stream = stream
        self.share = share
        self._pacer = settings.streams.pacer
        self.client = role is Role.CLIENT
        verified = isinstance(stream, TLSStream)
        self.http = Http2Connection(
            role, settings.limits, settings.mesh_budget if verified else settings.budget
        )
        self._read_pacer = ReadPacer(self.http, share, settings)
        self._line = self._read_pacer.line
        self.settings = settings
        self.opened = self.idle_since = trio.current_time()
        self.broken: str | None = None
        # a protocol error of the peer, which ended the connection or ends it after its last stream
        self.fault: str | None = None
        self._goaway_code: str | None = None  # the error code of the peer's GOAWAY
        self.going_away = False  # no new streams; either side has announced the end
        # server: accepts until then the streams that the client opened before it got the GOAWAY
        self._goaway_deadline: float | None = None
        # set when the peer's SETTINGS have arrived, or the connection is broken
        self.settings_received = trio.Event()
        self.reserved = 0  # streams that are reserved for requests that have not opened them yet
        self._streams: dict[int, Http2Stream] = {}
        self.writer = Writer(stream, self.http, settings.write_timeout, share)
        self._held = 0  # received bytes of the connection window that were not consumed
        self.scheduler = SendScheduler(self.http)
        self._opened: list[Http2Stream] = []  # opened by the peer in this read
        # streams with events for `on_events` from this read; may contain duplicates
        self.with_events: list[Http2Stream] = []
        # called when the number of possible streams may have changed
        self.on_capacity: Callable[[], object] = _ignore
        self.last_read = self.opened  # trio's time of the last read
        self._pinged: float | None = None
        # the earliest next PING to an application's server, which may object; another proxy does
        # not
        self._ping_next = self.opened
        self._seldom = _SELDOM if self.client and not isinstance(stream, TLSStream) else 0.0
        self._scope = trio.CancelScope()
        if isinstance(stream, TLSStream) and stream.expiry is not None:
            stream.expiry.retire = self.retire
        self._nursery: trio.Nursery | None = None  # set while `run` runs
        self._resets = ResetQueue(
            self.http,
            settings.resets,
            OF_AGE * 1.5 if verified else settings.resets.hold,
            self._on_resets_sent,
        )

    async def run(self, on_request: Callable[[Http2Stream], None] | None = None) -> None:
        """Read and write until the connection ends. `on_request` is called for each stream that the
        peer opens, after the data of the same read is stored, also for streams that are already
        lost (server).

        Does not raise the errors that end the connection: every stream gets the error, and `broken`
        has its text. Always closes the stream.
        """
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    nursery.start_soon(self._write)
                    nursery.start_soon(self._watch)
                    ending = await self._read(on_request)
                    # no new streams while the end waits for its turn: thousands of connections may
                    # end at once
                    self.going_away = True
                    await self._pacer.turn(self._line)
                    self._end(ending)
                    nursery.cancel_scope.cancel()
            self._nursery = None
            self._end("the connection was closed")
            await self._line.emptied()
            await close_after_goaway(self.stream, self.http, lingers=not self.client)
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
                self.stream.expiry.retire = None  # breaks a reference cycle

    async def _read(self, on_request: Callable[[Http2Stream], None] | None) -> str:
        """Read until the connection ends. Returns the reason."""
        pacer = self._read_pacer
        try:
            while data := await self.stream.receive_some(_READ):
                self._take(data, on_request)
                if pacer.full:
                    await pacer.ready(partial(self._take, b"", on_request))
        except ProtocolError as error:
            self.fault = str(error)
            if self.client:  # responses that were complete before the error are valid
                for event in self.http.before_fault:
                    self._dispatch(event)
                self._notify(on_request)
            return str(error)
        except (NetError, trio.ClosedResourceError) as error:
            return str(error)
        return "the peer closed the connection"

    def _take(self, data: bytes, on_request: Callable[[Http2Stream], None] | None) -> None:
        """Process the data of one read."""
        if not self.client:
            self._read_pacer.prepare()
        self.last_read = trio.current_time()
        for event in self.http.receive_data(data, self.last_read):
            self._dispatch(event)
        self._read_pacer.note()
        self._notify(on_request)
        self.touch()

    def _notify(self, on_request: Callable[[Http2Stream], None] | None) -> None:
        """All data of one read is stored: call the callbacks of streams without a waiting task."""
        if self._opened:
            opened, self._opened = self._opened, []
            if on_request is not None:
                self._read_pacer.begin(opened, on_request)
        with_events, self.with_events = self.with_events, []
        for stream in with_events:
            if stream.on_events is not None:
                stream.on_events()

    def _dispatch(self, event: Event) -> None:
        match event:
            case HeadReceived(head=RequestHead() as head):
                stream = self._streams[event.stream] = Http2Stream(self, event.stream)
                stream.request = head
                self.settings.streams.opens(self.share)
                stream.on_event(event)
                if self.broken is not None:
                    # `_end` has told the streams of that time, and the reader had one more read
                    stream.lose(StreamLost(self.broken, Code.CANCEL))
                self._opened.append(stream)
            case HeadReceived() | DataReceived() | TrailersReceived() | StreamBroken():
                self._on_stream_event(event)
            case WindowOpened(stream=0):
                # this event comes with SETTINGS, which is always the peer's first frame
                self.settings_received.set()
                self.scheduler.next()
                self.on_capacity()
            case WindowOpened():
                if (known := self._streams.get(event.stream)) is not None:
                    self.scheduler.leave(known)
                    known.wake()
            case GoingAway():
                self._on_goaway(event)
            case Exhausted():
                self.going_away = True
                self.fault = event.words
                self.on_capacity()
            case PingAnswered():
                self._pinged = None
                if event.payload == _GOAWAY_PING:
                    self._send_final_goaway()

    def _on_stream_event(self, event: StreamEvent) -> None:
        self._ping_next = self.last_read
        if (known := self._streams.get(event.stream)) is not None:
            if isinstance(event, DataReceived):
                self._held += event.credit
            known.on_event(event)
        elif isinstance(event, DataReceived):
            self.http.consumed(0, event.credit)
        elif isinstance(event, StreamBroken) and not event.by_peer and not self.client:
            known = Http2Stream(self, event.stream)
            known.on_event(event)
            self._opened.append(known)
        if known is None and self._resets.waiting:
            self.on_capacity()  # an abandoned stream may have ended

    def _on_goaway(self, event: GoingAway) -> None:
        self.going_away = True
        self._goaway_code = code_name(event.code)
        for number, stream in list(self._streams.items()):
            # For a server, `last` in a client's GOAWAY concerns pushed streams, and we push none.
            if self.client and number > event.last:
                stream.lose(
                    StreamLost(
                        "the peer is going away (GOAWAY) and did not accept the stream",
                        Code.REFUSED_STREAM,
                        refused=True,
                    )
                )
        self.on_capacity()
        self.touch()

    async def _write(self) -> None:
        failure = await self.writer.run(
            lambda: self.going_away and not self._streams and self._goaway_deadline is None
        )
        if failure is not None:
            self._end(failure)
        self._scope.cancel()  # otherwise all frames have been sent

    async def _watch(self) -> None:
        """Send a PING to a silent peer while streams are open, and end a connection that was unused
        for too long."""
        while True:
            now = trio.current_time()
            if self._pinged is not None and self.last_read >= self._pinged:
                self._pinged = None
            if self._pinged is not None and now >= self._pinged + self.settings.ping_timeout:
                self._end(f"the peer did not answer a PING within {self.settings.ping_timeout} s")
                return
            if self._goaway_deadline is not None and now >= self._goaway_deadline:
                self._send_final_goaway()
            elif not self._streams and now >= self.idle_since + self.settings.idle_timeout:
                self.retire()
            elif self._streams and self._pinged is None and now >= self._next_ping:
                self._pinged = now
                self._ping_next = now + self._seldom
                self.http.ping(_PING)
                self.touch()
            await trio.sleep_until(self._next_check(now))

    @property
    def _next_ping(self) -> float:
        return max(self.last_read + self.settings.ping_interval, self._ping_next)

    def _next_check(self, now: float) -> float:
        if self._pinged is not None:
            return self._pinged + self.settings.ping_timeout
        if self._goaway_deadline is not None:
            return self._goaway_deadline
        if self._streams:
            return min(self._next_ping, now + self.settings.ping_interval)
        # Without a stream: one may be opened at any time.
        soon = now + self.settings.ping_interval / 4
        return soon if self.going_away else min(soon, self.idle_since + self.settings.idle_timeout)

    def _send_final_goaway(self) -> None:
        """The client has received our first GOAWAY, or did not confirm it in time: send the final
        one."""
        self._goaway_deadline = None
        self.http.go_away()
        self.touch()

    def _end(self, words: str) -> None:
        """The connection cannot be used any more: tell all streams, once."""
        if self.broken is None:
            self.broken = words
            self.going_away = True
            kind = StreamLost
            if self.client and self._goaway_code is not None:
                kind, words = (
                    ConnectionGoaway,
                    f"the server was going away (GOAWAY, {self._goaway_code}): {words}",
                )
            for stream in list(self._streams.values()):
                self._pacer.take(self._line, partial(stream.lose, kind(words, Code.CANCEL)))
            self.settings_received.set()
            self.writer.stop()
            self.on_capacity()
        self._scope.cancel()

    # For the exchanges...

    def touch(self) -> None:
        """Frames may be pending: wake the writer."""
        if self.http.pending or self.going_away:
            self.writer.touch()

    def put(self, size: int) -> None:
        """A stream has added `size` bytes of frames."""
        self.writer.put(size)
        self.touch()

    def consumed(self, number: int, credit: int) -> None:
        congested = self.congested
        self._held -= credit
        self.http.consumed(number, credit)
        self.touch()
        if congested and not self.congested:
            self.on_capacity()

    @property
    def congested(self) -> bool:
        """Whether slow consumers hold so much of the connection window that another stream might
        not get its share."""
        limits = self.settings.limits
        return self._held > max(0, limits.connection_window - limits.stream_window)

    @property
    def usable(self) -> bool:
        return self.broken is None and not self.going_away

    @property
    def unused(self) -> bool:
        """Whether it is usable and has no stream, open or reserved."""
        return self.usable and not self._streams and not self.reserved

    @property
    def capacity(self) -> int:
        """The number of exchanges that it can accept now. One, until the server has sent its
        limit."""
        if not self.usable or self.congested:
            return 0
        free = (
            self.http.capacity
            if self.settings_received.is_set()
            else min(self.http.capacity, 1 - len(self._streams))
        )
        return max(0, free - self.reserved)

    def open(self, head: RequestHead, *, end: bool) -> Http2Stream:
        """Open a stream with this head. Only while there is `capacity`, with no await in between.
        Raises HeadTooLarge."""
        return self._open(self.http.send_request(head, end=end))

    def open_fields(self, method: bytes, pairs: list[Pair], *, end: bool) -> Http2Stream:
        """Open a stream with a head that is already a list of fields. Otherwise like `open`."""
        return self._open(self.http.send_request_fields(method, pairs, end=end))

    def _open(self, number: int) -> Http2Stream:
        stream = self._streams[number] = Http2Stream(self, number)
        self.touch()
        return stream

    def forget(self, stream: Http2Stream) -> None:
        """The exchange of `stream` has ended."""
        if self._streams.pop(stream.number, None) is None:
            return
        if not self.client:
            self.settings.streams.closes(self.share)
        if not self.client or self._nursery is None:
            # RFC 9113 §8.1: a server that has sent its response may reset the rest of the request
            # with NO_ERROR.
            self.http.reset(stream.number, Code.CANCEL if self.client else Code.NO_ERROR)
        elif self._resets.add(stream.number):
            self._nursery.start_soon(self._resets.run)
        stream.give_back()
        self.idle_since = trio.current_time()
        self.on_capacity()
        self.touch()

    def retire_now(self) -> None:
        """End the connection after its last stream, and refuse streams that the client opens from
        now on. Unlike `retire`, there is no grace time for streams that are on their way."""
        self.going_away = True
        self._send_final_goaway()
        self.on_capacity()

    def exhaust(self) -> None:
        """End the connection, because its client has held too much memory for too long."""
        words = "the connection has exceeded its memory limit for too long"
        self.http.close(Code.ENHANCE_YOUR_CALM, words)
        self._end(words)

    def _on_resets_sent(self) -> None:
        self.on_capacity()
        self.touch()

    @property
    def exchanges(self) -> int:
        return len(self._streams)

    def retire(self) -> None:
        """Accept no new streams. The connection ends with its last stream.

        A server announces the end in two steps. A stream that crosses with a final GOAWAY would be
        refused, and clients repeat it once at most. So the first GOAWAY refuses nothing, and a PING
        follows it. When the PING is answered, the client has read the GOAWAY, and no more streams
        are on their way.
        """
        if not self.going_away:
            self.going_away = True
            if self.client:
                self.http.go_away()
            else:
                self._goaway_deadline = trio.current_time() + self.settings.last_call
                self.http.announce_end()
                self.http.ping(_GOAWAY_PING)
            self.on_capacity()
            self.touch()
