"""One HTTP/2 connection, as client or server: reads frames and returns events (RFC 9113).

An error of one stream ends that stream (StreamFault: RST_STREAM). An error of the connection ends
the connection (ConnectionFault: GOAWAY, and ProtocolError to the caller). A GOAWAY of the peer,
with any code, only stops the opening of new streams.

The peer may be a proxy whose connection carries the requests of many clients. Therefore nothing
that one client can cause through a correct proxy is an error of the connection. A header list over
the limit is still decoded, because HPACK's table must stay in sync, and then its stream is reset.
Only a list far over the limit ends the connection (hpack.hard_limit).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from proxy.wire.h1.connection import Role
from proxy.wire.h2 import frames
from proxy.wire.h2.events import (
    DataReceived,
    Event,
    GoingAway,
    HeadReceived,
    Http2Limits,
    PingAnswered,
    StreamBroken,
    TrailersReceived,
    WindowOpened,
)
from proxy.wire.h2.fields import Pair, request_head, response_head, trailers
from proxy.wire.h2.flood_budget import BUDGET, COST_CONTROL, COST_RESET, COST_WINDOW, OF_AGE
from proxy.wire.h2.frames import Code, ConnectionFault, Kind, StreamFault
from proxy.wire.h2.hpack import Decoder, hard_limit
from proxy.wire.h2.streams import Stream, Streams
from proxy.wire.messages import ProtocolError, RequestHead, ResponseHead

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


class Http2Connection(Streams):
    """One connection, from its first byte.

    Methods raise ProtocolError when the connection must end. The caller must still send what
    `data_to_send` returns then (GOAWAY).
    """

    def __init__(self, role: Role, limits: Http2Limits, budget: float = BUDGET) -> None:
        super().__init__(role, limits, budget)
        self._buffer = b""
        self._preface_pending = not self._client
        self._settings_pending = True
        self._decoder = Decoder(limits.head)
        self._block: _Block | None = None
        self._largest_block = hard_limit(limits.head)
        self.speaks_http1 = False  # the server answered our preface by HTTP/1
        self.paused = False  # complete frames are left: call `receive_data` again, with b""

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
    def _promised(stream: Stream, size: int, ended: bool) -> bool:
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

    def _on_head(self, stream: Stream, pairs: Sequence[Pair], ended: bool) -> None:
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

    def _on_trailers(self, stream: Stream, pairs: Sequence[Pair], ended: bool) -> None:
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
