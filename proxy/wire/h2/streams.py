"""The streams of an HTTP/2 connection: states, windows, and what we send (RFC 9113 §5).

The state of a stream is two bits, one for each direction: a direction is open until END_STREAM or
RST_STREAM passes in it.

        idle --HEADERS--> open --END_STREAM from one side--> half closed --END_STREAM--> closed
                            +--------------------- RST_STREAM, either side ----------------^

Flow control: DATA counts against the peer's window until `consumed` reports that a consumer has
taken it. So a slow or missing consumer stops only its own sender: each stream has its own window,
and the connection's window is large enough for several streams.
"""

from __future__ import annotations

from collections import OrderedDict

from proxy.wire.h1.connection import Role
from proxy.wire.h2 import frames
from proxy.wire.h2.events import (
    Event,
    Exhausted,
    Http2Limits,
    StreamBroken,
    StreamGone,
    WindowOpened,
)
from proxy.wire.h2.fields import Pair, field_pairs, request_pairs, response_pairs
from proxy.wire.h2.flood_budget import (
    BUDGET,
    COST_CONTROL,
    COST_RESET,
    FLOOD,
    PER_FRAME,
    PER_STREAM,
    FrameBudget,
)
from proxy.wire.h2.frames import Code, ConnectionFault, Kind, Setting, StreamFault
from proxy.wire.h2.hpack import UNLIMITED, Encoder
from proxy.wire.h2.late_frames import Late
from proxy.wire.messages import Headers, RequestHead, ResponseHead

# The number of reset streams whose late frames are covered. Late frames of older ones cost budget.
_FORGIVEN = 1024
# A peer may allow frames of up to 16 MiB. One larger than this would only delay the other streams.
_LARGEST_SENT = 65536


class Stream:
    """One stream.

    `sends`, `receives`: whether the direction is still open. `expected`: bytes of the body that are
    announced by the head and have not arrived; None: the head announces no length.
    """

    __slots__ = (
        "expected",
        "headless",
        "method",
        "number",
        "opened",
        "receives",
        "send_window",
        "sends",
        "taken",
        "window",
    )

    def __init__(self, number: int, send_window: int, window: int, opened: float = 0.0) -> None:
        self.number = number
        self.opened = opened
        self.sends = True
        self.receives = True
        self.headless = True  # the peer's (final) head has not arrived
        self.method = b""
        self.expected: int | None = None
        self.send_window = send_window
        self.window = window  # bytes that the peer may still send
        self.taken = 0  # bytes that are consumed, but not returned to the peer yet


class Streams(FrameBudget):
    """All streams of one connection, and its output. connection.py reads what the peer sends."""

    def __init__(self, role: Role, limits: Http2Limits, budget: float = BUDGET) -> None:
        """`budget`: see flood_budget.FrameBudget."""
        super().__init__(budget)
        self._client = role is Role.CLIENT
        self._limits = limits
        self._encoder = Encoder()
        self._streams: dict[int, Stream] = {}
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

    def _late(self, number: int, what: str, stream: Stream | None, credit: int = 0) -> None:
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

    def _opened_by_peer(self, number: int) -> Stream | None:
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
        stream = self._streams[number] = Stream(
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
        stream = self._streams[number] = Stream(
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

    def _send_block(self, stream: Stream, block: bytes, end: bool) -> None:
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

    def _sending(self, number: int) -> Stream:
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
