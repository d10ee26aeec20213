"""One HTTP/2 connection, as client or server (RFC 9113).

It reads the frames of the peer, returns events, and queues the frames that we send.

An error of one stream ends that stream (StreamFault: RST_STREAM). An error of the connection ends
the connection (ConnectionFault: GOAWAY, and ProtocolError to the caller). A GOAWAY of the peer,
with any code, only stops the opening of new streams.

The peer may be a proxy whose connection carries the requests of many clients. Therefore nothing
that one client can cause through a correct proxy is an error of the connection. A header list over
the limit is still decoded, because HPACK's table must stay in sync, and then its stream is reset.
Only a list far over the limit ends the connection (hpack.hard_limit).

Flow control: DATA counts against the peer's window until `consumed` reports that a consumer has
taken it. So a slow or missing consumer stops only its own sender: each stream has its own window,
and the connection's window is large enough for several streams.

This module is longer than others. Frames that arrive and frames that we send change the same state:
the table of streams, the two windows, the budget, the queue of frames. A class for each would use
all of it through private parts, and an object for the reading half costs 3 to 5 % of the engine's
time (perf/http2_engines.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from proxy.wire.h1.connection import Role
from proxy.wire.h2 import frames
from proxy.wire.h2.events import (
    DataReceived,
    Event,
    Exhausted,
    GoingAway,
    HeadReceived,
    Http2Limits,
    PingAnswered,
    StreamBroken,
    StreamGone,
    TrailersReceived,
    WindowOpened,
)
from proxy.wire.h2.fields import (
    Pair,
    field_pairs,
    request_head,
    request_pairs,
    response_head,
    response_pairs,
    trailers,
)
from proxy.wire.h2.flood_budget import (
    BUDGET,
    COST_CONTROL,
    COST_RESET,
    COST_WINDOW,
    FLOOD,
    OF_AGE,
    PER_FRAME,
    PER_STREAM,
    FrameBudget,
)
from proxy.wire.h2.frames import Code, ConnectionFault, Kind, Setting, StreamFault
from proxy.wire.h2.hpack import UNLIMITED, Decoder, Encoder, hard_limit
from proxy.wire.h2.late_frames import Late
from proxy.wire.h2.stream_state import StreamState
from proxy.wire.messages import Headers, ProtocolError, RequestHead, ResponseHead

# A header block in this many more pieces than necessary is an attack (CVE-2024-27316).
_MOST_CONTINUATIONS = 16
# A CONTINUATION of at least this many bytes costs the peer more than us.
_LARGE_PIECE = 1024
# The number of streams that a peer may open in one read; then the rest of the read must wait. One
# read can hold hundreds, and each costs us much more to start than it costs the peer to send.
_MOST_OPENED = 32
# Parameters of one SETTINGS frame. Each may change the window of every stream. nghttp2 has the same
# limit.
_MOST_SETTINGS = 32
# The number of reset streams whose late frames are covered. Late frames of older ones cost budget.
_FORGIVEN = 1024
# A peer may allow frames of up to 16 MiB. One larger than this would only delay the other streams.
_LARGEST_SENT = 65536
# A simple header block has END_HEADERS and neither of the other two.
_SHAPE = frames.END_HEADERS | frames.PADDED | frames.PRIORITY
_HEADER = frames.HEADER.unpack_from
# An internal flag, outside the eight bits of the wire.
_SELF_DEPENDENT = 0x100


@dataclass(slots=True)
class _Block:
    """A header block that is not complete yet."""

    stream: int
    flags: int
    pieces: list[bytes]
    size: int


class Http2Connection(FrameBudget):
    """One connection, from its first byte. `budget`: see flood_budget.FrameBudget.

    Methods raise ProtocolError when the connection must end. The caller must still send what
    `data_to_send` returns then (GOAWAY).
    """

    def __init__(self, role: Role, limits: Http2Limits, budget: float = BUDGET) -> None:
        super().__init__(budget)
        self._client = role is Role.CLIENT
        self._limits = limits
        self._encoder = Encoder()
        self._streams: dict[int, StreamState] = {}
        self._forgiven: OrderedDict[int, Late] = OrderedDict()  # late frames of reset streams
        self._forgotten = 0  # the highest stream number that was removed from it
        self._events: list[Event] = []
        self._out: list[bytes] = []
        self._highest_theirs = 0
        self._next_ours = 1 if self._client else 2
        self._open_ours = 0
        self._open_theirs = 0
        self._last_allowed: int | None = None  # by the peer's GOAWAY
        self._refuse_above: int | None = None  # by our GOAWAY
        self._send_window = frames.DEFAULT_WINDOW
        # The peer may send `_window` bytes. `_held` bytes have arrived and are not consumed. Their
        # sum reaches the connection's window in the end: `_grant` is what is not announced yet.
        self._window = max(limits.connection_window, frames.DEFAULT_WINDOW)
        self._held = 0
        self._target = self._window
        self._opened = 0  # streams that the peer has opened in this read
        self.refused = 0  # streams that were refused; the reader resets this
        self.stream_limit = limits.streams  # of open streams of the peer; at most what we announced
        self._refilled = 0.0  # when we last received from the peer
        self._over = False
        # The peer's settings, with the initial values of RFC 9113 §6.5.2.
        self._peer_window = frames.DEFAULT_WINDOW
        self._peer_frame_size = frames.DEFAULT_FRAME_SIZE
        self._peer_head = UNLIMITED
        self._peer_streams = 100  # until the peer sets it; without a limit, many might be refused
        self.extended_connect = False  # the peer accepts CONNECT with :protocol (RFC 8441)
        self._buffer = b""
        self._preface_pending = not self._client
        self._settings_pending = True
        self._decoder = Decoder(limits.head)
        self._block: _Block | None = None
        self._largest_block = hard_limit(limits.head)
        self.speaks_http1 = False  # the server answered our preface by HTTP/1
        self.paused = False  # complete frames are left: call `receive_data` again, with b""
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
                    raise ConnectionFault(
                        Code.FLOW_CONTROL_ERROR, f"INITIAL_WINDOW_SIZE of {value}"
                    )
                self._set_window(value)
            case Setting.MAX_FRAME_SIZE:
                if not frames.DEFAULT_FRAME_SIZE <= value <= frames.LARGEST_FRAME_SIZE:
                    raise ConnectionFault(Code.PROTOCOL_ERROR, f"MAX_FRAME_SIZE of {value}")
                self._peer_frame_size = value
            case Setting.MAX_HEADER_LIST_SIZE:
                self._peer_head = value
            case Setting.ENABLE_CONNECT_PROTOCOL:
                if value > 1 or (self.extended_connect and not value):
                    raise ConnectionFault(
                        Code.PROTOCOL_ERROR, f"ENABLE_CONNECT_PROTOCOL of {value}"
                    )
                self.extended_connect = value == 1

    def _set_window(self, value: int) -> None:
        for stream in self._streams.values():
            before, stream.send_window = (
                stream.send_window,
                stream.send_window + value - self._peer_window,
            )
            if before <= 0 < stream.send_window:  # wake a sender that waits for this window
                self._events.append(WindowOpened(stream.number))
            if stream.send_window > frames.LARGEST_WINDOW:
                raise ConnectionFault(
                    Code.FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE opens a window too far"
                )
        self._peer_window = value

    # Reading...

    @property
    def buffered(self) -> int:
        """Received bytes that are not a complete frame or header block yet."""
        return len(self._buffer) + (0 if self._block is None else self._block.size)

    @property
    def before_fault(self) -> list[Event]:
        """Events of the last `receive_data` before the error for which it raised."""
        return self._events if self._over else []

    def receive_data(self, data: bytes, now: float) -> list[Event]:
        """Process bytes that were read at `now` (seconds of any clock), and return the events.

        Raises ProtocolError when the connection must end.
        """
        if self._over:
            raise ProtocolError("HTTP/2: the connection has ended")
        self._earn((now - self._refilled) * self._per_second)
        self._refilled = now
        self._buffer = self._buffer + data if self._buffer else data
        self._events = []
        self._opened = 0
        self.paused = False
        try:
            self._read_frames()
        except ConnectionFault as fault:
            self._buffer = b""
            self._block = None
            self.close(fault.code, str(fault))
            raise ProtocolError(f"HTTP/2: {fault} ({fault.code.name})") from fault
        return self._events

    def _read_frames(self) -> None:
        buffer, at = self._buffer, 0
        if self._preface_pending:
            if not buffer.startswith(frames.PREFACE[: len(buffer)]):
                raise ConnectionFault(Code.PROTOCOL_ERROR, "no HTTP/2 preface")
            if len(buffer) < len(frames.PREFACE):
                return
            self._preface_pending = False
            at = len(frames.PREFACE)
        while len(buffer) - at >= frames.HEADER_SIZE:
            high, low, kind, flags, stream = _HEADER(buffer, at)
            size = high << 16 | low
            if size > frames.DEFAULT_FRAME_SIZE:
                raise self._too_large(size, buffer)
            end = at + frames.HEADER_SIZE + size
            if len(buffer) < end:
                break
            try:
                self._read_frame(
                    kind,
                    flags,
                    stream & frames.LARGEST_WINDOW,
                    buffer[at + frames.HEADER_SIZE : end],
                )
            except StreamFault as fault:
                self._break(fault)
            at = end
            if self._opened >= _MOST_OPENED:
                self.paused = len(buffer) - at >= frames.HEADER_SIZE
                break
        self._buffer = buffer[at:]

    def _too_large(self, size: int, buffer: bytes) -> ConnectionFault:
        """The error for a frame over our size limit.

        It may also be no frame at all: a server without HTTP/2 answers our preface by HTTP/1.
        """
        if self._client and self._settings_pending and buffer.startswith(b"HTTP/1."):
            self.speaks_http1 = True
            return ConnectionFault(Code.PROTOCOL_ERROR, "the server speaks HTTP/1, not HTTP/2")
        return ConnectionFault(Code.FRAME_SIZE_ERROR, f"a frame of {size} bytes")

    def _read_frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if self._settings_pending or self._block is not None:
            self._check_order(kind, flags, stream)
        match kind:
            case 0x0:  # DATA; HEADERS below: frequent, and an enum lookup is slower than a number
                self._on_data(stream, flags, payload)
            case 0x1:
                self._on_headers(stream, flags, payload)
            case Kind.CONTINUATION:
                self._on_continuation(flags, payload)
            case Kind.WINDOW_UPDATE:
                self._on_window_update(stream, payload)
            case Kind.RST_STREAM:
                self._on_reset(stream, payload)
            case Kind.SETTINGS:
                self._on_settings(stream, flags, payload)
            case Kind.PING:
                self._on_ping(stream, flags, payload)
            case Kind.GOAWAY:
                self._on_goaway(stream, payload)
            case Kind.PUSH_PROMISE:
                raise ConnectionFault(Code.PROTOCOL_ERROR, "a PUSH_PROMISE, which was not enabled")
            case Kind.PRIORITY:
                self._on_priority(stream, payload)
            case _:
                self._spend(COST_CONTROL)

    def _check_order(self, kind: int, flags: int, stream: int) -> None:
        if self._settings_pending and (kind != Kind.SETTINGS or flags & frames.ACK):
            raise ConnectionFault(Code.PROTOCOL_ERROR, "the first frame is not SETTINGS")
        if self._block is not None and (kind != Kind.CONTINUATION or stream != self._block.stream):
            raise ConnectionFault(Code.PROTOCOL_ERROR, "another frame within a header block")

    # ... bodies

    def _on_data(self, number: int, flags: int, payload: bytes) -> None:
        credit = len(payload)
        if credit > self._window:
            raise ConnectionFault(Code.FLOW_CONTROL_ERROR, "more DATA than the connection's window")
        self._window -= credit
        self._held += credit
        stream = self._streams.get(number)
        if stream is None or not stream.receives:
            self.consumed(0, credit)
            self._late(number, "DATA", stream, credit)
            return
        data = frames.unpadded(payload, flags)
        stream.window -= credit
        if self._window < self._limits.stream_window:
            self._give_back()
        ended = bool(flags & frames.END_STREAM)
        if not data and not ended:
            self._spend(COST_CONTROL)
        if stream.headless or stream.window < 0 or not self._promised(stream, len(data), ended):
            self.consumed(0, credit)
            if stream.window < 0:
                raise StreamFault(
                    number, Code.FLOW_CONTROL_ERROR, "more DATA than the stream's window"
                )
            raise StreamFault(
                number, Code.PROTOCOL_ERROR, "DATA before the head, or against Content-Length"
            )
        self._events.append(DataReceived(number, data, credit, ended))
        if ended:
            self._received_end(stream)

    @staticmethod
    def _promised(stream: StreamState, size: int, ended: bool) -> bool:
        """Whether the body can still have the length that its head announces (§8.1.1)."""
        if stream.expected is None:
            return True
        stream.expected -= size
        return stream.expected == 0 if ended else stream.expected >= 0

    # ... heads and trailers

    def _on_headers(self, number: int, flags: int, payload: bytes) -> None:
        if number == 0:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "HEADERS on stream 0")
        if flags & _SHAPE == frames.END_HEADERS and len(payload) <= self._limits.head:
            self._on_block(number, flags, self._decoder.decode(payload))
            return
        self._block = _Block(number, flags, [], 0)
        fragment = frames.unpadded(payload, flags)
        try:
            fragment = frames.without_priority(fragment, flags, number)
        except StreamFault:
            # The block must still be decoded to keep the HPACK table in sync.
            self._block.flags |= _SELF_DEPENDENT
            fragment = fragment[5:]
        self._add(self._block, fragment, flags)

    def _on_continuation(self, flags: int, payload: bytes) -> None:
        if self._block is None:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "a CONTINUATION without a header block")
        if len(payload) < _LARGE_PIECE:
            self._spend(COST_CONTROL)
        self._add(self._block, payload, flags)

    def _add(self, block: _Block, fragment: bytes, flags: int) -> None:
        block.pieces.append(fragment)
        block.size += len(fragment)
        if (
            block.size > self._largest_block
            or len(block.pieces) > _MOST_CONTINUATIONS + block.size // frames.DEFAULT_FRAME_SIZE
        ):
            raise ConnectionFault(
                Code.ENHANCE_YOUR_CALM,
                f"a header block of more than {self._largest_block} bytes, or in too many pieces",
            )
        if flags & frames.END_HEADERS:
            self._block = None
            whole = block.pieces[0] if len(block.pieces) == 1 else b"".join(block.pieces)
            self._on_block(block.stream, block.flags, self._decoder.decode(whole))

    def _on_block(self, number: int, flags: int, pairs: Sequence[Pair] | None) -> None:
        ended = bool(flags & frames.END_STREAM)
        stream = self._streams.get(number)
        if stream is None:
            stream = self._opened_by_peer(number)
            if stream is None:
                return
        elif not stream.receives:
            raise StreamFault(number, Code.STREAM_CLOSED, "HEADERS after the end of the stream")
        if flags & _SELF_DEPENDENT:
            raise StreamFault(number, Code.PROTOCOL_ERROR, "a stream that depends on itself")
        if pairs is None:
            raise StreamFault(
                number,
                Code.ENHANCE_YOUR_CALM,
                f"a header list of more than {self._limits.head} bytes",
            )
        try:
            if stream.headless:
                self._on_head(stream, pairs, ended)
            else:
                self._on_trailers(stream, pairs, ended)
        except ProtocolError as error:
            raise StreamFault(number, Code.PROTOCOL_ERROR, str(error)) from error

    def _on_head(self, stream: StreamState, pairs: Sequence[Pair], ended: bool) -> None:
        head: RequestHead | ResponseHead
        if self._client:
            head = response_head(pairs)
            if head.informational:  # the exchange limits their number, for its own stream only
                if ended:
                    raise ProtocolError("an informational response that ends its stream")
                self._events.append(HeadReceived(stream.number, head, False))
                return
            bodiless = stream.method == b"HEAD" or head.status in (204, 304)
            tunnel = stream.method == b"CONNECT" and 200 <= head.status < 300
        else:
            head = request_head(pairs)
            stream.method = head.method
            bodiless, tunnel = False, head.method == b"CONNECT"
        stream.headless = False
        length = head.headers.get(b"content-length")
        if bodiless:  # Content-Length then describes the body that a GET would have had
            stream.expected = 0
        elif length is not None and not tunnel:
            stream.expected = int(length)
            if ended and stream.expected:
                raise ProtocolError("a message has no body, but its Content-Length is not 0")
        self._events.append(HeadReceived(stream.number, head, ended))
        if ended:
            self._received_end(stream)

    def _on_trailers(self, stream: StreamState, pairs: Sequence[Pair], ended: bool) -> None:
        if not ended:
            raise ProtocolError("a second header block that does not end the stream")
        fields = trailers(pairs)
        if stream.expected:
            raise ProtocolError("trailers before the end of the body that Content-Length announces")
        self._events.append(TrailersReceived(stream.number, fields))
        self._received_end(stream)

    # ... the rest

    def _on_window_update(self, number: int, payload: bytes) -> None:
        self._spend(COST_WINDOW)
        increment = frames.read_long(payload, "WINDOW_UPDATE") & frames.LARGEST_WINDOW
        if number == 0:
            self._send_window += increment
            if not increment or self._send_window > frames.LARGEST_WINDOW:
                code = Code.FLOW_CONTROL_ERROR if increment else Code.PROTOCOL_ERROR
                raise ConnectionFault(
                    code, f"the connection's window changed by {increment}, to {self._send_window}"
                )
        else:
            self._check_not_idle(number, "WINDOW_UPDATE")
            stream = self._streams.get(number)
            if stream is None:
                return
            stream.send_window += increment
            if not increment or stream.send_window > frames.LARGEST_WINDOW:
                code = Code.FLOW_CONTROL_ERROR if increment else Code.PROTOCOL_ERROR
                raise StreamFault(
                    number,
                    code,
                    f"the stream's window changed by {increment}, to {stream.send_window}",
                )
        self._events.append(WindowOpened(number))

    def _on_reset(self, number: int, payload: bytes) -> None:
        code = frames.read_long(payload, "RST_STREAM")
        self._check_not_idle(number, "RST_STREAM")
        stream = self._streams.get(number)
        if stream is None:
            if (late := self._forgiven.get(number)) is None or not late.takes_reset():
                self._spend(COST_RESET)
            return
        if not self._client and stream.sends and self._refilled - stream.opened < OF_AGE:
            self._spend(COST_RESET)
        self._forget(stream)
        self._events.append(
            StreamBroken(
                number, code, True, f"the peer reset the stream ({frames.code_name(code)})"
            )
        )

    def _on_settings(self, number: int, flags: int, payload: bytes) -> None:
        if number:
            raise ConnectionFault(Code.PROTOCOL_ERROR, f"SETTINGS on stream {number}")
        self._settings_pending = False
        if flags & frames.ACK:
            if payload:
                raise ConnectionFault(
                    Code.FRAME_SIZE_ERROR, "a SETTINGS acknowledgement with a payload"
                )
            self._spend(COST_CONTROL)
            return
        self._spend(COST_RESET)
        values = frames.read_settings(payload)
        if len(values) > _MOST_SETTINGS:
            raise ConnectionFault(
                Code.ENHANCE_YOUR_CALM, f"{len(values)} parameters in a SETTINGS frame"
            )
        for key, value in values:
            self._set(key, value)
        self._out.append(frames.frame(Kind.SETTINGS, frames.ACK, 0, b""))
        self._events.append(WindowOpened(0))

    def _on_ping(self, number: int, flags: int, payload: bytes) -> None:
        if number:
            raise ConnectionFault(Code.PROTOCOL_ERROR, f"PING on stream {number}")
        if len(payload) != 8:
            raise ConnectionFault(Code.FRAME_SIZE_ERROR, f"a PING of {len(payload)} bytes")
        self._spend(COST_CONTROL)
        if flags & frames.ACK:
            self._events.append(PingAnswered(payload))
        else:
            self._out.append(frames.frame(Kind.PING, frames.ACK, 0, payload))

    def _on_goaway(self, number: int, payload: bytes) -> None:
        if number:
            raise ConnectionFault(Code.PROTOCOL_ERROR, f"GOAWAY on stream {number}")
        last, code = frames.read_goaway(payload)
        self._last_allowed = last if self._last_allowed is None else min(last, self._last_allowed)
        self._spend(COST_CONTROL)
        self._events.append(GoingAway(self._last_allowed, code))

    def _on_priority(self, number: int, payload: bytes) -> None:
        self._spend(COST_CONTROL)
        if number == 0:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "PRIORITY on stream 0")
        if len(payload) != 5:
            raise StreamFault(number, Code.FRAME_SIZE_ERROR, f"a PRIORITY of {len(payload)} bytes")
        if int.from_bytes(payload[:4], "big") & frames.LARGEST_WINDOW == number:
            raise StreamFault(number, Code.PROTOCOL_ERROR, "a stream that depends on itself")

    # The states of streams...

    def _idle(self, number: int) -> bool:
        """Whether the stream has not been opened."""
        ours = (number % 2 == 1) == self._client
        return number >= self._next_ours if ours else number > self._highest_theirs

    def _check_not_idle(self, number: int, what: str) -> None:
        if number == 0 or self._idle(number):
            raise ConnectionFault(
                Code.PROTOCOL_ERROR, f"{what} on stream {number}, which was never opened"
            )

    def _late(self, number: int, what: str, stream: StreamState | None, credit: int = 0) -> None:
        """Handle a frame for a stream that does not receive any more (§5.1).

        It is ignored if the peer may have sent it before our reset. Otherwise this raises
        StreamFault or ConnectionFault.
        """
        self._check_not_idle(number, what)
        if stream is not None:
            raise StreamFault(number, Code.STREAM_CLOSED, f"{what} after the end of the stream")
        late = self._forgiven.get(number)
        if late is not None and late.takes(credit):
            return
        self._spend(COST_CONTROL)
        if late is None and number > self._forgotten:
            raise ConnectionFault(Code.STREAM_CLOSED, f"{what} on the closed stream {number}")

    def _opened_by_peer(self, number: int) -> StreamState | None:
        """Open a stream for the peer. None: it was refused, or has ended already."""
        if number <= self._highest_theirs or self._client or number % 2 == 0:
            self._late(number, "HEADERS", None)
            return None
        self._highest_theirs = number
        self._opened += 1
        refused = self._open_theirs >= self.stream_limit
        if refused or (self._refuse_above is not None and number > self._refuse_above):
            # Cheap, because a client may open many before it has read our SETTINGS, and a refusal
            # costs us no more than a PING.
            self._spend(COST_CONTROL)
            self.refused += 1
            self._forgive(number, None)
            self._out.append(frames.rst_stream(number, Code.REFUSED_STREAM))
            return None
        stream = self._streams[number] = StreamState(
            number, self._peer_window, self._limits.stream_window, self._refilled
        )
        self._open_theirs += 1
        return stream

    def _break(self, fault: StreamFault) -> None:
        """Reset a stream because of the peer's error, and add the event if the stream is known.

        An idle stream cannot be reset (§6.4): this raises ConnectionFault.
        """
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

    def _received_end(self, stream: StreamState) -> None:
        stream.receives = False
        if not stream.sends:
            self._ended_well(stream)

    def _sent_end(self, stream: StreamState) -> None:
        stream.sends = False
        if not stream.receives:
            self._ended_well(stream)

    def _ended_well(self, stream: StreamState) -> None:
        self._earn(PER_STREAM)
        self._forget(stream)

    def _forget(self, stream: StreamState) -> None:
        del self._streams[stream.number]
        if (stream.number % 2 == 1) == self._client:
            self._open_ours -= 1
        else:
            self._open_theirs -= 1

    def _forgive(self, number: int, stream: StreamState | None) -> None:
        if number not in self._forgiven:
            self._forgiven[number] = Late(
                self._limits.stream_window if stream is None else max(0, stream.window)
            )
        if len(self._forgiven) > _FORGIVEN:
            self._forgotten = max(self._forgotten, self._forgiven.popitem(last=False)[0])

    def _ask_to_stop(self) -> None:
        self._refuse_above = self._highest_theirs
        self._out.append(frames.goaway(self._highest_theirs, Code.ENHANCE_YOUR_CALM, FLOOD))
        self._events.append(Exhausted(f"HTTP/2: {FLOOD} ({Code.ENHANCE_YOUR_CALM.name})"))

    # Writing...

    def data_to_send(self) -> bytes:
        """Return all frames since the last call, and clear the queue."""
        if not self._out:
            return b""
        data = self._out[0] if len(self._out) == 1 else b"".join(self._out)
        self._out.clear()
        return data

    @property
    def pending(self) -> bool:
        """Whether there is something to send."""
        return bool(self._out)

    @property
    def capacity(self) -> int:
        """The number of streams that we may open now.

        It is 0 after the peer's GOAWAY, and when all stream numbers are used.
        """
        if self._last_allowed is not None or self._over or self._next_ours > frames.LARGEST_WINDOW:
            return 0
        return max(0, self._peer_streams - self._open_ours)

    @property
    def open_streams(self) -> int:
        return len(self._streams)

    @property
    def opened_by_peer(self) -> int:
        """The number of open streams that the peer has opened."""
        return self._open_theirs

    def send_request(self, head: RequestHead, *, end: bool) -> int:
        """Open a stream and return its number. Raises HeadTooLarge.

        Call it only if `capacity` is above 0.
        """
        return self.send_request_fields(head.method, request_pairs(head), end=end)

    def send_request_fields(self, method: bytes, pairs: list[Pair], *, end: bool) -> int:
        """Open a stream for a head that is already a header list, and return its number.

        Raises HeadTooLarge. Call it only if `capacity` is above 0.
        """
        block = self._encoder.encode(pairs, self._peer_head)
        number = self._next_ours
        self._next_ours += 2
        stream = self._streams[number] = StreamState(
            number, self._peer_window, self._limits.stream_window
        )
        stream.method = method
        self._open_ours += 1
        self._send_block(stream, block, end)
        return number

    def send_response(self, number: int, head: ResponseHead, *, end: bool) -> None:
        """Send a response head. Raises StreamGone and HeadTooLarge."""
        stream = self._sending(number)
        self._send_block(stream, self._encoder.encode(response_pairs(head), self._peer_head), end)

    def send_trailers(self, number: int, fields: Headers) -> None:
        stream = self._sending(number)
        self._send_block(
            stream, self._encoder.encode(field_pairs(fields), self._peer_head), end=True
        )

    def _send_block(self, stream: StreamState, block: bytes, end: bool) -> None:
        self._out += frames.headers(stream.number, block, self._peer_frame_size, end=end)
        if end:
            self._sent_end(stream)

    def window(self, number: int) -> int:
        """The number of bytes of DATA that may be sent on a stream now. Raises StreamGone."""
        return max(0, min(self._sending(number).send_window, self._send_window))

    def stream_window(self, number: int) -> int:
        """The stream's own window; the connection's is ignored.

        May be negative. Raises StreamGone.
        """
        return self._sending(number).send_window

    @property
    def connection_window(self) -> int:
        """The number of bytes of DATA that may be sent on all streams together."""
        return self._send_window

    def send_data(self, number: int, data: bytes, *, end: bool) -> None:
        """Send at most `window` bytes, split by the peer's frame size. Raises StreamGone.

        The bytes are not copied here.
        """
        stream = self._sending(number)
        size, largest = len(data), min(self._peer_frame_size, _LARGEST_SENT)
        if size <= largest:
            self._out.append(
                frames.header(size, Kind.DATA, frames.END_STREAM if end else 0, number)
            )
            if data:
                self._out.append(data)
        else:
            for at in range(0, size, largest):
                piece = data[at : at + largest]
                last = end and at + largest >= size
                self._out.append(
                    frames.header(len(piece), Kind.DATA, frames.END_STREAM if last else 0, number)
                )
                self._out.append(piece)
        stream.send_window -= size
        self._send_window -= size
        self._earn(PER_FRAME + size / frames.DEFAULT_FRAME_SIZE)
        if end:
            self._sent_end(stream)

    def _sending(self, number: int) -> StreamState:
        stream = self._streams.get(number)
        if stream is None or not stream.sends or self._over:
            raise StreamGone(f"stream {number} has ended")
        return stream

    @property
    def _grant(self) -> int:
        """The part of the connection's window that is not announced yet."""
        return self._target - self._window - self._held

    def resize(self, window: int) -> None:
        """Change the connection's window to `window` bytes, from 65535 to the configured limit.

        What has been announced stays: RFC 9113 §6.9.2 has no frame that takes credit back. A
        smaller window is reached as the peer uses up the announced credit.
        """
        grows = window > self._target
        self._target = max(frames.DEFAULT_WINDOW, min(window, self._limits.connection_window))
        if grows and not self._over and self._window < self._limits.stream_window:
            self._give_back()

    def _give_back(self) -> None:
        """Announce the unannounced part of the connection's window, if it is large enough.

        This is half of the window, or a quarter of a stream's window if that is less. The held back
        part must be small, so that another stream can continue while slow consumers hold the rest.
        """
        grant = self._grant
        if grant * 4 >= min(2 * self._target, self._limits.stream_window):
            self._out.append(frames.window_update(0, grant))
            self._window += grant

    def consumed(self, number: int, credit: int) -> None:
        """Report that a consumer has taken or dropped `credit` bytes: the peer may send more.

        Stream 0: the stream has ended.
        """
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
        """The number of streams that the peer allows us to have open."""
        return self._peer_streams

    def is_open(self, number: int) -> bool:
        """Whether the stream is open in at least one direction."""
        return number in self._streams

    def reset(self, number: int, code: int) -> None:
        """End a stream in both directions by RST_STREAM. No effect if it has ended."""
        stream = self._streams.get(number)
        if stream is not None and not self._over:
            self._forget(stream)
            self._forgive(number, stream)
            self._out.append(frames.rst_stream(number, code))

    def announce_end(self) -> None:
        """Ask the peer to open no new streams, by a first GOAWAY.

        New streams are still accepted, because they may be in flight (RFC 9113 §6.8).
        """
        if self._refuse_above is None and not self._over:
            self._out.append(frames.goaway(frames.LARGEST_WINDOW, Code.NO_ERROR))

    def go_away(self) -> None:
        """Accept no new streams of the peer, by GOAWAY. Open ones continue."""
        if self._refuse_above is None and not self._over:
            self._refuse_above = self._highest_theirs
            self._out.append(frames.goaway(self._highest_theirs, Code.NO_ERROR))

    def close(self, code: Code, words: str = "") -> None:
        """End the connection by GOAWAY."""
        if not self._over:
            self._over = True
            self._out.append(frames.goaway(self._highest_theirs, code, words))

    def ping(self, payload: bytes) -> None:
        """Send a PING. `payload` has 8 bytes; the event PingAnswered returns it."""
        if not self._over:
            self._out.append(frames.frame(Kind.PING, 0, 0, payload))
