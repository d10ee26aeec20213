"""The streams of an HTTP/2 connection: their life, their windows, and what we send on them (RFC 9113 §5).

The states of a stream are two bits, one for each direction, because that is all they are: a direction is open until END_STREAM or
RST_STREAM passes in it.

        idle --HEADERS--> open --END_STREAM from one side--> half closed --END_STREAM from the other--> closed
                            +------------------------- RST_STREAM, either side ------------------------^

Credit. What DATA carried counts against the peer's window until `consumed` says that somebody took it. So a consumer that is slow, or
gone, stops its sender and nobody else: each stream has a window of its own, and the connection's is large enough for several.
"""

from __future__ import annotations

from collections import OrderedDict

from proxy.wire.h1.connection import Role
from proxy.wire.h2 import frames
from proxy.wire.h2.events import Event, Exhausted, Http2Limits, StreamBroken, StreamGone, WindowOpened
from proxy.wire.h2.fields import Pair, field_pairs, request_pairs, response_pairs
from proxy.wire.h2.flood_budget import BUDGET, COST_CONTROL, COST_RESET, FLOOD, PER_FRAME, PER_STREAM, FrameBudget
from proxy.wire.h2.frames import Code, ConnectionFault, Kind, Setting, StreamFault
from proxy.wire.h2.hpack import UNLIMITED, Encoder
from proxy.wire.h2.late_frames import Late
from proxy.wire.messages import Headers, RequestHead, ResponseHead

# Streams that we reset, and whose late frames we therefore forgive. Of older ones we do not know, and forgive for a price.
_FORGIVEN = 1024
# A peer may allow frames of up to 16 MiB; a larger one than this would only keep the other streams waiting.
_LARGEST_SENT = 65536


class Stream:
    """One stream. `sends`, `receives`: the direction is still open. `expected`: bytes of the body that its head promised and that have
    not come yet; None: it promised nothing."""

    __slots__ = ("expected", "headless", "method", "number", "opened", "receives", "send_window", "sends", "taken", "window")

    def __init__(self, number: int, send_window: int, window: int, opened: float = 0.0) -> None:
        self.number = number
        self.opened = opened
        self.sends = True
        self.receives = True
        self.headless = True  # the peer's (final) head has not come
        self.method = b""
        self.expected: int | None = None
        self.send_window = send_window
        self.window = window  # what the peer may still send
        self.taken = 0  # consumed, and not given back yet


class Streams(FrameBudget):
    """All streams of one connection, and its output. What the peer sends is connection.py's to read."""

    def __init__(self, role: Role, limits: Http2Limits, budget: float = BUDGET) -> None:
        """`budget`: what frames that only cost time may cost together before the peer is asked to stop; a tenth comes back each second."""
        super().__init__(budget)
        self._client = role is Role.CLIENT
        self._limits = limits
        self._encoder = Encoder()
        self._streams: dict[int, Stream] = {}
        self._forgiven: OrderedDict[int, Late] = OrderedDict()  # what may still be under way to streams that we have reset
        self._forgotten = 0  # the highest number that is not forgiven any more
        self._events: list[Event] = []
        self._out: list[bytes] = []
        self._highest_theirs = 0
        self._next_ours = 1 if self._client else 2
        self._open_ours = 0
        self._open_theirs = 0
        self._last_allowed: int | None = None  # of the peer's GOAWAY
        self._refuse_above: int | None = None  # of ours
        self._send_window = frames.DEFAULT_WINDOW
        # The peer may send `_window` bytes; `_held` have come and were not consumed. Together they are as large as the connection's window,
        # or will be: what is missing (`_grant`) has not been announced yet.
        self._window = max(limits.connection_window, frames.DEFAULT_WINDOW)
        self._held = 0
        self._target = self._window
        self._opened = 0  # streams of the peer's, in this read
        self.refused = 0  # and such that were refused, until the reader sets this to 0
        self.stream_limit = limits.streams  # how many streams the peer may have open; no more than it has been told
        self._refilled = 0.0  # when the peer was heard last
        self._over = False
        # What the peer has set, with the initial values of RFC 9113 §6.5.2.
        self._peer_window = frames.DEFAULT_WINDOW
        self._peer_frame_size = frames.DEFAULT_FRAME_SIZE
        self._peer_head = UNLIMITED
        self._peer_streams = 100  # until it says otherwise; the RFC's "no limit" would have us send streams that are refused
        self.extended_connect = False  # the peer takes CONNECT with :protocol (RFC 8441)
        self._greet()

    def _greet(self) -> None:
        values: dict[int, int] = {
            Setting.INITIAL_WINDOW_SIZE: self._limits.stream_window,
            Setting.MAX_HEADER_LIST_SIZE: self._limits.head,
        }
        if self._client:
            self._out.append(frames.PREFACE)
            values[Setting.ENABLE_PUSH] = 0
        else:
            values[Setting.MAX_CONCURRENT_STREAMS] = self._limits.streams
            values[Setting.ENABLE_CONNECT_PROTOCOL] = 1
        self._out.append(frames.settings(values))
        if self._window > frames.DEFAULT_WINDOW:
            self._out.append(frames.window_update(0, self._window - frames.DEFAULT_WINDOW))

    def _set(self, key: int, value: int) -> None:
        match key:
            case Setting.HEADER_TABLE_SIZE:
                self._encoder.resize(value)
            case Setting.ENABLE_PUSH if value > 1 or (self._client and value):
                raise ConnectionFault(Code.PROTOCOL_ERROR, f"ENABLE_PUSH of {value}")
            case Setting.MAX_CONCURRENT_STREAMS:
                self._peer_streams = value
            case Setting.INITIAL_WINDOW_SIZE:
                if value > frames.LARGEST_WINDOW:
                    raise ConnectionFault(Code.FLOW_CONTROL_ERROR, f"INITIAL_WINDOW_SIZE of {value}")
                self._set_window(value)
            case Setting.MAX_FRAME_SIZE:
                if not frames.DEFAULT_FRAME_SIZE <= value <= frames.LARGEST_FRAME_SIZE:
                    raise ConnectionFault(Code.PROTOCOL_ERROR, f"MAX_FRAME_SIZE of {value}")
                self._peer_frame_size = value
            case Setting.MAX_HEADER_LIST_SIZE:
                self._peer_head = value
            case Setting.ENABLE_CONNECT_PROTOCOL:
                if value > 1 or (self.extended_connect and not value):
                    raise ConnectionFault(Code.PROTOCOL_ERROR, f"ENABLE_CONNECT_PROTOCOL of {value}")
                self.extended_connect = value == 1

    def _set_window(self, value: int) -> None:
        for stream in self._streams.values():
            before, stream.send_window = stream.send_window, stream.send_window + value - self._peer_window
            if before <= 0 < stream.send_window:  # a sender that waits for this window alone has to hear of it
                self._events.append(WindowOpened(stream.number))
            if stream.send_window > frames.LARGEST_WINDOW:
                raise ConnectionFault(Code.FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE opens a window too far")
        self._peer_window = value

    # The life of streams...

    def _idle(self, number: int) -> bool:
        """Nobody has opened it yet."""
        ours = (number % 2 == 1) == self._client
        return number >= self._next_ours if ours else number > self._highest_theirs

    def _check_not_idle(self, number: int, what: str) -> None:
        if number == 0 or self._idle(number):
            raise ConnectionFault(Code.PROTOCOL_ERROR, f"{what} on stream {number}, which nobody has opened")

    def _late(self, number: int, what: str, stream: Stream | None, credit: int = 0) -> None:
        """A frame for a stream that does not receive any more: forgiven if it could not know, a fault otherwise (§5.1)."""
        self._check_not_idle(number, what)
        if stream is not None:
            raise StreamFault(number, Code.STREAM_CLOSED, f"{what} behind the end of the stream")
        late = self._forgiven.get(number)
        if late is not None and late.takes(credit):
            return
        self._spend(COST_CONTROL)
        if late is None and number > self._forgotten:
            raise ConnectionFault(Code.STREAM_CLOSED, f"{what} on the closed stream {number}")

    def _opened_by_peer(self, number: int) -> Stream | None:
        """A new stream of the peer's; None: refused, or the rest of one that is gone."""
        if number <= self._highest_theirs or self._client or number % 2 == 0:
            self._late(number, "HEADERS", None)
            return None
        self._highest_theirs = number
        self._opened += 1
        refused = self._open_theirs >= self.stream_limit
        if refused or (self._refuse_above is not None and number > self._refuse_above):
            # Not dear: a client may open many before it has read our SETTINGS, and it costs us no more than a PING.
            self._spend(COST_CONTROL)
            self.refused += 1
            self._forgive(number, None)
            self._out.append(frames.rst_stream(number, Code.REFUSED_STREAM))
            return None
        stream = self._streams[number] = Stream(number, self._peer_window, self._limits.stream_window, self._refilled)
        self._open_theirs += 1
        return stream

    def _break(self, fault: StreamFault) -> None:
        """RST_STREAM for what the peer did, and the event if the stream was one. An idle stream cannot be reset (§6.4)."""
        if self._idle(fault.stream):
            raise ConnectionFault(fault.code, str(fault))
        stream = self._streams.get(fault.stream)
        if stream is None or not self._client:
            self._spend(COST_RESET)
        self._out.append(frames.rst_stream(fault.stream, fault.code))
        self._forgive(fault.stream, stream)
        if stream is not None:
            self._forget(stream)
            self._events.append(StreamBroken(fault.stream, int(fault.code), False, str(fault)))

    def _received_end(self, stream: Stream) -> None:
        stream.receives = False
        if not stream.sends:
            self._ended_well(stream)

    def _sent_end(self, stream: Stream) -> None:
        stream.sends = False
        if not stream.receives:
            self._ended_well(stream)

    def _ended_well(self, stream: Stream) -> None:
        self._earn(PER_STREAM)
        self._forget(stream)

    def _forget(self, stream: Stream) -> None:
        if self._streams.pop(stream.number, None) is not None:
            if (stream.number % 2 == 1) == self._client:
                self._open_ours -= 1
            else:
                self._open_theirs -= 1

    def _forgive(self, number: int, stream: Stream | None) -> None:
        if number not in self._forgiven:
            self._forgiven[number] = Late(self._limits.stream_window if stream is None else max(0, stream.window))
        if len(self._forgiven) > _FORGIVEN:
            self._forgotten = max(self._forgotten, self._forgiven.popitem(last=False)[0])

    def _ask_to_stop(self) -> None:
        self._refuse_above = self._highest_theirs
        self._out.append(frames.goaway(self._highest_theirs, Code.ENHANCE_YOUR_CALM, FLOOD))
        self._events.append(Exhausted(f"HTTP/2: {FLOOD} ({Code.ENHANCE_YOUR_CALM.name})"))

    # Writing...

    def data_to_send(self) -> bytes:
        """All frames since the last call."""
        if not self._out:
            return b""
        data = self._out[0] if len(self._out) == 1 else b"".join(self._out)
        self._out.clear()
        return data

    @property
    def pending(self) -> bool:
        """There is something to send."""
        return bool(self._out)

    @property
    def room(self) -> int:
        """How many more streams of ours the peer takes now; 0 behind its GOAWAY, and when the numbers are used up."""
        if self._last_allowed is not None or self._over or self._next_ours > frames.LARGEST_WINDOW:
            return 0
        return max(0, self._peer_streams - self._open_ours)

    @property
    def open_streams(self) -> int:
        return len(self._streams)

    @property
    def opened_by_peer(self) -> int:
        """Streams of the peer's that are open."""
        return self._open_theirs

    def send_request(self, head: RequestHead, *, end: bool) -> int:
        """Open a stream; only while there is `room`. Returns its number."""
        return self.send_request_fields(head.method, request_pairs(head), end=end)

    def send_request_fields(self, method: bytes, pairs: list[Pair], *, end: bool) -> int:
        """The same for a head that is a header list already. Both raise HeadTooLarge."""
        block = self._encoder.encode(pairs, self._peer_head)
        number = self._next_ours
        self._next_ours += 2
        stream = self._streams[number] = Stream(number, self._peer_window, self._limits.stream_window)
        stream.method = method
        self._open_ours += 1
        self._send_block(stream, block, end)
        return number

    def send_response(self, number: int, head: ResponseHead, *, end: bool) -> None:
        """Raises StreamGone, as all of these do, and HeadTooLarge, as `send_trailers` does."""
        stream = self._sending(number)
        self._send_block(stream, self._encoder.encode(response_pairs(head), self._peer_head), end)

    def send_trailers(self, number: int, fields: Headers) -> None:
        stream = self._sending(number)
        self._send_block(stream, self._encoder.encode(field_pairs(fields), self._peer_head), end=True)

    def _send_block(self, stream: Stream, block: bytes, end: bool) -> None:
        self._out += frames.headers(stream.number, block, self._peer_frame_size, end=end)
        if end:
            self._sent_end(stream)

    def window(self, number: int) -> int:
        """How many bytes of DATA may be sent on a stream now. Raises StreamGone."""
        return max(0, min(self._sending(number).send_window, self._send_window))

    def stream_window(self, number: int) -> int:
        """What `window` would say if only the stream's own window counted. Raises StreamGone."""
        return self._sending(number).send_window

    @property
    def connection_window(self) -> int:
        """How many bytes of DATA may be sent on all streams together."""
        return self._send_window

    def send_data(self, number: int, data: bytes, *, end: bool) -> None:
        """Send no more than `window` says; it is cut to the peer's frame size. The bytes themselves are not copied here."""
        stream = self._sending(number)
        size, largest = len(data), min(self._peer_frame_size, _LARGEST_SENT)
        if size <= largest:
            self._out.append(frames.header(size, Kind.DATA, frames.END_STREAM if end else 0, number))
            if data:
                self._out.append(data)
        else:
            for at in range(0, size, largest):
                piece = data[at : at + largest]
                last = end and at + largest >= size
                self._out.append(frames.header(len(piece), Kind.DATA, frames.END_STREAM if last else 0, number))
                self._out.append(piece)
        stream.send_window -= size
        self._send_window -= size
        self._earn(PER_FRAME + size / frames.DEFAULT_FRAME_SIZE)
        if end:
            self._sent_end(stream)

    def _sending(self, number: int) -> Stream:
        stream = self._streams.get(number)
        if stream is None or not stream.sends or self._over:
            raise StreamGone(f"stream {number} has ended")
        return stream

    @property
    def _grant(self) -> int:
        """What may be announced of the connection's window."""
        return self._target - self._window - self._held

    def resize(self, window: int) -> None:
        """Make the connection's window `window` bytes, at least 65535 and at most what the limits say. What has been announced stays; a
        smaller window is reached as the peer uses that up (RFC 9113 §6.9.2 has no frame that takes credit back)."""
        grows = window > self._target
        self._target = max(frames.DEFAULT_WINDOW, min(window, self._limits.connection_window))
        if grows and not self._over and self._window < self._limits.stream_window:
            self._give_back()

    def _give_back(self) -> None:
        """What is free of the connection's window: half of it at a time, or, while the peer has less than one stream may use, a
        quarter of that. What is kept back must not be what one more stream lives on while slow consumers hold the rest."""
        grant = self._grant
        if grant * 4 >= min(2 * self._target, self._limits.stream_window):
            self._out.append(frames.window_update(0, grant))
            self._window += grant

    def consumed(self, number: int, credit: int) -> None:
        """`credit` bytes have been taken by a consumer, or dropped: the peer may send as many more. Stream 0: the stream is gone."""
        if self._over:
            return
        self._held -= credit
        window, target = self._window, self._target
        if (target - window - self._held) * 2 >= target or window < self._limits.stream_window:
            self._give_back()
        stream = self._streams.get(number)
        if stream is not None and stream.receives:
            stream.taken += credit
            if stream.taken * 2 >= self._limits.stream_window:
                self._out.append(frames.window_update(number, stream.taken))
                stream.window += stream.taken
                stream.taken = 0

    @property
    def streams_allowed(self) -> int:
        """How many streams of ours the peer takes at a time."""
        return self._peer_streams

    def is_open(self, number: int) -> bool:
        """Whether the stream is open in one direction at least."""
        return number in self._streams

    def reset(self, number: int, code: int) -> None:
        """End a stream in both directions; nothing happens if it has ended already."""
        stream = self._streams.get(number)
        if stream is not None and not self._over:
            self._forget(stream)
            self._forgive(number, stream)
            self._out.append(frames.rst_stream(number, code))

    def announce_end(self) -> None:
        """Ask the peer to open no new streams; those that it does open are taken still, for they may be on their way (RFC 9113 §6.8)."""
        if self._refuse_above is None and not self._over:
            self._out.append(frames.goaway(frames.LARGEST_WINDOW, Code.NO_ERROR))

    def go_away(self) -> None:
        """Take no new streams of the peer's; those that are open go on."""
        if self._refuse_above is None and not self._over:
            self._refuse_above = self._highest_theirs
            self._out.append(frames.goaway(self._highest_theirs, Code.NO_ERROR))

    def close(self, code: Code, words: str = "") -> None:
        """The connection is over."""
        if not self._over:
            self._over = True
            self._out.append(frames.goaway(self._highest_theirs, code, words))

    def ping(self, payload: bytes) -> None:
        """`payload` has 8 bytes; PingAnswered comes back with it."""
        if not self._over:
            self._out.append(frames.frame(Kind.PING, 0, 0, payload))
