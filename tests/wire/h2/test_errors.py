"""The errors of RFC 9113, one by one: a stream error ends that stream, with its code, and the next
request is answered as usual. A connection error ends the connection, with its code in GOAWAY and no
frame after it."""

from __future__ import annotations

import struct

import pytest

from proxy.wire.h1.connection import Role
from proxy.wire.h2.events import (
    DataReceived,
    Event,
    GoingAway,
    HeadReceived,
    Http2Limits,
    StreamBroken,
    StreamGone,
    TrailersReceived,
    WindowOpened,
)
from proxy.wire.h2.frames import (
    ACK,
    END_HEADERS,
    END_STREAM,
    PADDED,
    PREFACE,
    PRIORITY,
    Code,
    Kind,
    Setting,
    frame,
    goaway,
)
from proxy.wire.messages import Headers, ProtocolError, RequestHead, ResponseHead
from tests.kit.chunkings import every_way
from tests.kit.http2 import (
    GET,
    OK,
    POST,
    Pair,
    RecordingEngine,
    data,
    headers,
    literal,
    long,
    settings,
)

LIMITS = Http2Limits(streams=4, head=4000, stream_window=65535, connection_window=65535)
OPEN = headers(1, POST, END_HEADERS)  # stream 1, its body to come
DONE = headers(1)  # stream 1, ended by the peer
BAD: list[Pair] = [(b":method", b"GET")]
TRAILER: list[Pair] = [(b"x", b"1")]


CONNECTION_ERRORS: dict[str, tuple[Code, bytes]] = {
    "HEADERS on stream 0": (Code.PROTOCOL_ERROR, headers(0)),
    "DATA on stream 0": (Code.PROTOCOL_ERROR, data(0)),
    "PRIORITY on stream 0": (Code.PROTOCOL_ERROR, frame(Kind.PRIORITY, 0, 0, bytes(5))),
    "RST_STREAM on stream 0": (Code.PROTOCOL_ERROR, long(Kind.RST_STREAM, 0, 8)),
    "CONTINUATION on stream 0": (Code.PROTOCOL_ERROR, frame(Kind.CONTINUATION, END_HEADERS, 0, b"")),
    "SETTINGS on a stream": (Code.PROTOCOL_ERROR, settings(stream=1)),
    "PING on a stream": (Code.PROTOCOL_ERROR, frame(Kind.PING, 0, 1, bytes(8))),
    "GOAWAY on a stream": (Code.PROTOCOL_ERROR, frame(Kind.GOAWAY, 0, 1, bytes(8))),
    "PUSH_PROMISE": (Code.PROTOCOL_ERROR, OPEN + frame(Kind.PUSH_PROMISE, END_HEADERS, 1, struct.pack(">L", 2) + literal(GET))),
    "DATA on an idle stream": (Code.PROTOCOL_ERROR, data(1)),
    "RST_STREAM on an idle stream": (Code.PROTOCOL_ERROR, long(Kind.RST_STREAM, 1, 8)),
    "WINDOW_UPDATE on an idle stream": (Code.PROTOCOL_ERROR, long(Kind.WINDOW_UPDATE, 1, 8)),
    "RST_STREAM on an idle stream of ours": (Code.PROTOCOL_ERROR, long(Kind.RST_STREAM, 2, 8)),
    "an even stream opened by a client": (Code.PROTOCOL_ERROR, headers(2)),
    "a stream below the last one": (Code.STREAM_CLOSED, headers(5) + headers(3)),
    "DATA on a stream below the last one": (Code.STREAM_CLOSED, headers(5) + data(3)),
    "DATA behind the peer's own reset": (Code.STREAM_CLOSED, OPEN + long(Kind.RST_STREAM, 1, 8) + data(1)),
    "HEADERS behind the peer's own reset": (Code.STREAM_CLOSED, OPEN + long(Kind.RST_STREAM, 1, 8) + headers(1)),
    "a frame over the largest size": (Code.FRAME_SIZE_ERROR, OPEN + data(1, bytes(16385))),
    "a frame of another kind over the largest size": (Code.FRAME_SIZE_ERROR, frame(99, 0, 0, bytes(16385))),
    "PING of 7 bytes": (Code.FRAME_SIZE_ERROR, frame(Kind.PING, 0, 0, bytes(7))),
    "PING of 9 bytes": (Code.FRAME_SIZE_ERROR, frame(Kind.PING, ACK, 0, bytes(9))),
    "GOAWAY of 7 bytes": (Code.FRAME_SIZE_ERROR, frame(Kind.GOAWAY, 0, 0, bytes(7))),
    "RST_STREAM of 3 bytes": (Code.FRAME_SIZE_ERROR, OPEN + frame(Kind.RST_STREAM, 0, 1, bytes(3))),
    "WINDOW_UPDATE of 5 bytes": (Code.FRAME_SIZE_ERROR, frame(Kind.WINDOW_UPDATE, 0, 0, bytes(5))),
    "SETTINGS of 5 bytes": (Code.FRAME_SIZE_ERROR, frame(Kind.SETTINGS, 0, 0, bytes(5))),
    "SETTINGS ACK with a payload": (Code.FRAME_SIZE_ERROR, settings((3, 1), flags=ACK)),
    "HEADERS too short for its priority": (Code.FRAME_SIZE_ERROR, frame(Kind.HEADERS, END_HEADERS | PRIORITY, 1, bytes(4))),
    "padding of DATA over its frame": (Code.PROTOCOL_ERROR, OPEN + data(1, b"\3ab", PADDED)),
    "padding of HEADERS over its frame": (Code.PROTOCOL_ERROR, frame(Kind.HEADERS, END_HEADERS | PADDED, 1, b"\xff" + literal(GET))),
    "padding without its length": (Code.PROTOCOL_ERROR, OPEN + data(1, b"", PADDED)),
    "ENABLE_PUSH of 2": (Code.PROTOCOL_ERROR, settings((Setting.ENABLE_PUSH, 2))),
    "INITIAL_WINDOW_SIZE of 2^31": (Code.FLOW_CONTROL_ERROR, settings((Setting.INITIAL_WINDOW_SIZE, 2**31))),
    "MAX_FRAME_SIZE of 16383": (Code.PROTOCOL_ERROR, settings((Setting.MAX_FRAME_SIZE, 16383))),
    "MAX_FRAME_SIZE of 2^24": (Code.PROTOCOL_ERROR, settings((Setting.MAX_FRAME_SIZE, 2**24))),
    "ENABLE_CONNECT_PROTOCOL of 2": (Code.PROTOCOL_ERROR, settings((Setting.ENABLE_CONNECT_PROTOCOL, 2))),
    "ENABLE_CONNECT_PROTOCOL withdrawn": (Code.PROTOCOL_ERROR, settings((8, 1)) + settings((8, 0))),
    "WINDOW_UPDATE of 0": (Code.PROTOCOL_ERROR, long(Kind.WINDOW_UPDATE, 0, 0)),
    "the connection's window over 2^31-1": (Code.FLOW_CONTROL_ERROR, long(Kind.WINDOW_UPDATE, 0, 2**31 - 1)),
    "a stream's window over 2^31-1 by SETTINGS": (
        Code.FLOW_CONTROL_ERROR,
        OPEN + long(Kind.WINDOW_UPDATE, 1, 2**31 - 1 - 65535) + settings((Setting.INITIAL_WINDOW_SIZE, 65536)),
    ),
    "DATA over the connection's window": (
        Code.FLOW_CONTROL_ERROR,
        b"".join(headers(n, POST, END_HEADERS) + data(n, bytes(16384)) for n in (1, 3, 5, 7)),
    ),
    "CONTINUATION of nothing": (Code.PROTOCOL_ERROR, frame(Kind.CONTINUATION, END_HEADERS, 1, literal(GET))),
    "CONTINUATION behind END_HEADERS": (Code.PROTOCOL_ERROR, OPEN + frame(Kind.CONTINUATION, END_HEADERS, 1, literal(GET))),
    "another frame in a header block": (Code.PROTOCOL_ERROR, headers(1, flags=0) + frame(Kind.PING, 0, 0, bytes(8))),
    "an unknown frame in a header block": (Code.PROTOCOL_ERROR, headers(1, flags=0) + frame(99, 0, 1, b"")),
    "another stream's CONTINUATION in a header block": (
        Code.PROTOCOL_ERROR, headers(1, flags=0) + frame(Kind.CONTINUATION, END_HEADERS, 3, b"")
    ),
    "an index of no table": (Code.COMPRESSION_ERROR, frame(Kind.HEADERS, END_HEADERS, 1, b"\xff\x80\x01")),
    "index 0": (Code.COMPRESSION_ERROR, frame(Kind.HEADERS, END_HEADERS, 1, b"\x80")),
    "half a header block": (Code.COMPRESSION_ERROR, frame(Kind.HEADERS, END_HEADERS, 1, b"\x00\x05ab")),
    "a table size over ours": (Code.COMPRESSION_ERROR, frame(Kind.HEADERS, END_HEADERS, 1, b"\x3f\xe2\x1f")),
    "a table size behind a field": (Code.COMPRESSION_ERROR, frame(Kind.HEADERS, END_HEADERS, 1, b"\x82\x20")),
    "a broken block on a closed stream": (
        Code.COMPRESSION_ERROR, headers(1, BAD) + frame(Kind.HEADERS, END_HEADERS, 1, b"\x80")
    ),
    "PRIORITY of 4 bytes on an idle stream": (Code.FRAME_SIZE_ERROR, frame(Kind.PRIORITY, 0, 1, bytes(4))),
    "an idle stream that depends on itself": (Code.PROTOCOL_ERROR, frame(Kind.PRIORITY, 0, 1, b"\0\0\0\1\0")),
}  # fmt: skip


def outcome(
    pieces: list[bytes],
) -> tuple[list[Event], list[tuple[int, Code]], list[tuple[int, Code]], bool]:
    """Events, resets and GOAWAYs of a server, and whether the connection was ended."""
    ours = RecordingEngine(Role.SERVER, LIMITS)
    events: list[Event] = []
    over = False
    for piece in pieces:
        try:
            events += ours.receive(piece)
        except ProtocolError:
            events += ours.engine.before_fault
            over = True
            break
    return merged(events), ours.codes(Kind.RST_STREAM), ours.codes(Kind.GOAWAY), over


def merged(events: list[Event]) -> list[Event]:
    return [event for event in events if not isinstance(event, WindowOpened)]


@pytest.mark.parametrize(("code", "sent"), CONNECTION_ERRORS.values(), ids=CONNECTION_ERRORS)
def test_an_error_of_the_connection_ends_it(code: Code, sent: bytes) -> None:
    _, _, goaways, over = every_way(sent, outcome)
    assert over
    assert [found for _, found in goaways] == [code]


STREAM_ERRORS: dict[str, tuple[Code, bytes]] = {
    "PRIORITY of 4 bytes": (Code.FRAME_SIZE_ERROR, OPEN + frame(Kind.PRIORITY, 0, 1, bytes(4))),
    "a stream that depends on itself": (
        Code.PROTOCOL_ERROR,
        OPEN + frame(Kind.PRIORITY, 0, 1, b"\0\0\0\1\0"),
    ),
    "HEADERS that depend on themselves": (
        Code.PROTOCOL_ERROR,
        frame(Kind.HEADERS, END_HEADERS | END_STREAM | PRIORITY, 1, b"\0\0\0\1\0" + literal(GET)),
    ),
    "DATA behind END_STREAM": (Code.STREAM_CLOSED, DONE + data(1, b"x")),
    "HEADERS behind END_STREAM": (Code.STREAM_CLOSED, DONE + headers(1, TRAILER)),
    "WINDOW_UPDATE of 0": (Code.PROTOCOL_ERROR, OPEN + long(Kind.WINDOW_UPDATE, 1, 0)),
    "a window over 2^31-1": (
        Code.FLOW_CONTROL_ERROR,
        OPEN + long(Kind.WINDOW_UPDATE, 1, 2**31 - 1),
    ),
    "a malformed head": (Code.PROTOCOL_ERROR, headers(1, BAD)),
    "less DATA than Content-Length": (
        Code.PROTOCOL_ERROR,
        headers(1, [*POST, (b"content-length", b"3")], END_HEADERS) + data(1, b"ab", END_STREAM),
    ),
    "more DATA than Content-Length": (
        Code.PROTOCOL_ERROR,
        headers(1, [*POST, (b"content-length", b"3")], END_HEADERS)
        + data(1, b"ab")
        + data(1, b"cd"),
    ),
    "no DATA, and Content-Length": (
        Code.PROTOCOL_ERROR,
        headers(1, [*POST, (b"content-length", b"3")]),
    ),
    "trailers before the end of Content-Length": (
        Code.PROTOCOL_ERROR,
        headers(1, [*POST, (b"content-length", b"3")], END_HEADERS)
        + data(1, b"ab")
        + headers(1, TRAILER),
    ),
    "trailers without END_STREAM": (Code.PROTOCOL_ERROR, OPEN + headers(1, TRAILER, END_HEADERS)),
    "a pseudo-field in trailers": (Code.PROTOCOL_ERROR, OPEN + headers(1, [(b":path", b"/")])),
    "a header list over the limit": (
        Code.ENHANCE_YOUR_CALM,
        headers(1, [*GET, *[(b"x", b"")] * 130]),
    ),
    "a fifth stream": (
        Code.REFUSED_STREAM,
        b"".join(headers(n, POST, END_HEADERS) for n in (11, 13, 15, 17))
        + headers(19)
        + long(Kind.RST_STREAM, 17, 8),
    ),
}


@pytest.mark.parametrize(("code", "sent"), STREAM_ERRORS.values(), ids=STREAM_ERRORS)
def test_an_error_of_a_stream_ends_the_stream_alone(code: Code, sent: bytes) -> None:
    events, resets, goaways, over = every_way(sent + headers(21), outcome)
    assert not over
    assert not goaways
    assert [found for _, found in resets] == [code]
    assert isinstance(events[-1], HeadReceived)
    assert events[-1].stream == 21
    number = resets[0][0]
    broken = [event for event in events if isinstance(event, StreamBroken) and not event.by_peer]
    known = any(isinstance(event, HeadReceived) and event.stream == number for event in events)
    assert [(event.stream, event.code) for event in broken] == [(number, code)] * bool(
        known or broken
    )


def test_data_over_a_streams_window_ends_the_stream() -> None:
    ours = RecordingEngine(Role.SERVER, Http2Limits(stream_window=65535, connection_window=2**20))
    ours.receive(OPEN, *[data(1, bytes(16384))] * 3, data(1, bytes(16383)))
    assert ours.codes(Kind.RST_STREAM) == []
    events = ours.receive(data(1, b"x"))
    assert ours.codes(Kind.RST_STREAM) == [(1, Code.FLOW_CONTROL_ERROR)]
    assert [type(event) for event in events] == [StreamBroken]


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (headers(1), Code.PROTOCOL_ERROR),
        (settings(flags=ACK), Code.PROTOCOL_ERROR),
        (frame(Kind.PING, 0, 0, bytes(8)), Code.PROTOCOL_ERROR),
        (frame(99, 0, 0, b""), Code.PROTOCOL_ERROR),
    ],
)
def test_the_first_frame_has_to_be_settings(sent: bytes, code: Code) -> None:
    ours = RecordingEngine(greeted=False)
    with pytest.raises(ProtocolError, match="SETTINGS"):
        ours.receive(PREFACE + sent)
    assert ours.codes(Kind.GOAWAY) == [(0, code)]


@pytest.mark.parametrize(
    "sent", [b"GET / HTTP/1.1\r\n\r\n", PREFACE[:-1] + b"x", b"\0\0\0\4\0\0\0\0\0", b"P\0"]
)
def test_a_client_begins_with_the_preface(sent: bytes) -> None:
    def fails(pieces: list[bytes]) -> list[tuple[int, Code]]:
        ours = RecordingEngine(greeted=False)
        with pytest.raises(ProtocolError, match="preface"):
            ours.receive(*pieces)
        return ours.codes(Kind.GOAWAY)

    assert every_way(sent, fails) == [(0, Code.PROTOCOL_ERROR)]


def test_after_the_end_nothing_is_sent_or_received() -> None:
    ours = RecordingEngine()
    ours.receive(OPEN)
    with pytest.raises(ProtocolError):
        ours.receive(data(0))
    before = len(ours.sent)
    engine = ours.engine
    engine.consumed(1, 10**6)
    engine.consumed(0, 10**7)
    engine.ping(bytes(8))
    engine.reset(1, 8)
    engine.go_away()
    engine.close(Code.NO_ERROR)
    with pytest.raises(StreamGone):
        engine.send_response(1, ResponseHead(200), end=True)
    with pytest.raises(ProtocolError, match="has ended"):
        ours.receive(headers(3))
    assert engine.data_to_send() == b""
    assert len(ours.sent) == before
    assert engine.capacity == 0


def test_what_was_read_before_a_fault_is_not_lost() -> None:
    ours = RecordingEngine()
    assert ours.engine.before_fault == []
    with pytest.raises(ProtocolError):
        ours.receive(headers(1) + data(0))
    assert [type(event) for event in ours.engine.before_fault] == [HeadReceived]


# Responses, seen by a client...


def client(method: bytes = b"GET", *sent: bytes) -> tuple[list[Event], RecordingEngine]:
    def run(pieces: list[bytes]) -> list[Event]:
        ours = RecordingEngine(Role.CLIENT, LIMITS)
        ours.request(method)
        return merged(ours.receive(*pieces))

    events = every_way(b"".join(sent), run)
    ours = RecordingEngine(Role.CLIENT, LIMITS)
    ours.request(method)
    ours.receive(*sent)
    return events, ours


def response(*pairs: Pair, status: bytes = b"200", end: bool = False) -> bytes:
    return headers(1, [(b":status", status), *pairs], END_HEADERS | (END_STREAM if end else 0))


LENGTH_3 = (b"content-length", b"3")


@pytest.mark.parametrize(
    ("method", "sent"),
    [
        (b"HEAD", response(LENGTH_3, end=True)),
        (b"HEAD", response(LENGTH_3) + data(1, b"", END_STREAM)),
        (b"GET", response(LENGTH_3, status=b"304", end=True)),
        (b"GET", response(status=b"204", end=True)),
        (b"GET", response(LENGTH_3) + data(1, b"abc", END_STREAM)),
        (b"GET", response(LENGTH_3) + data(1, b"abc") + data(1, b"", END_STREAM)),
        (b"GET", response(LENGTH_3) + data(1, b"abc") + headers(1, TRAILER)),
        (b"CONNECT", response(LENGTH_3) + data(1, b"tunnelled")),
        (b"GET", response(status=b"103") + response(end=True)),
    ],
)
def test_a_response_is_as_long_as_it_has_to_be(method: bytes, sent: bytes) -> None:
    events, ours = client(method, sent)
    assert not [event for event in events if isinstance(event, StreamBroken)]
    assert ours.codes(Kind.RST_STREAM) == []


@pytest.mark.parametrize(
    ("method", "sent"),
    [
        (b"HEAD", response() + data(1, b"x")),
        (b"GET", response(status=b"304") + data(1, b"x")),
        (b"GET", response(status=b"204") + data(1, b"x")),
        (b"GET", response(LENGTH_3, end=True)),
        (b"GET", response(LENGTH_3) + data(1, b"", END_STREAM)),
        (b"GET", data(1, b"x")),
        (b"GET", response(status=b"101")),
        (b"GET", response(status=b"103", end=True)),
        (b"GET", headers(1, TRAILER, END_HEADERS)),
        (b"GET", response() + response()),
    ],
)
def test_a_response_that_is_not_ends_its_stream(method: bytes, sent: bytes) -> None:
    events, ours = client(method, sent)
    assert isinstance(events[-1], StreamBroken)
    assert ours.codes(Kind.RST_STREAM) == [(1, Code.PROTOCOL_ERROR)]


@pytest.mark.parametrize(
    "sent", [headers(2, OK), headers(3, OK), data(3), settings((Setting.ENABLE_PUSH, 1))]
)
def test_a_server_neither_opens_streams_nor_pushes(sent: bytes) -> None:
    ours = RecordingEngine(Role.CLIENT)
    ours.request()
    with pytest.raises(ProtocolError):
        ours.receive(sent)
    assert ours.codes(Kind.GOAWAY) == [(0, Code.PROTOCOL_ERROR)]


# What only looks like an error...


def test_late_frames_of_a_stream_that_we_reset_are_forgiven_and_their_credit_given_back() -> None:
    ours = RecordingEngine(limits=Http2Limits(stream_window=65535, connection_window=65535))
    for number in range(1, 200, 2):
        ours.receive(headers(number, POST, END_HEADERS), data(number, bytes(8000)))
        ours.engine.consumed(number, 8000)
        ours.engine.reset(number, Code.CANCEL)
        assert (
            ours.receive(
                data(number, bytes(8000)),
                headers(number, TRAILER),
                long(Kind.RST_STREAM, number, 8),
            )
            == []
        )
    assert ours.engine._window + ours.engine._grant == 65535
    assert ours.codes(Kind.GOAWAY) == []


@pytest.mark.parametrize("early", [False, True])
def test_what_is_left_of_the_window_is_not_kept_back_from_streams_that_are_still_to_come(
    early: bool,
) -> None:
    """Slow consumers hold most of the connection's window. Credit for what others have read is
    returned before the peer runs out of it."""
    ours = RecordingEngine(limits=Http2Limits(stream_window=65536, connection_window=4 * 65536))
    fills = {number: [data(number, bytes(16384))] * 4 for number in (1, 3, 5, 7)}
    for number in fills:
        ours.receive(headers(number, POST, END_HEADERS))
    if early:  # the window is used up by unread data
        ours.receive(*fills[1], *fills[3])
        ours.engine.consumed(1, 65536)
        ours.engine.consumed(3, 65535)  # less than half of the connection's window
        ours.receive(*fills[5], *fills[7])
    else:
        ours.receive(*fills[1], *fills[3], *fills[5], *fills[7])
        ours.engine.consumed(1, 65536)
        ours.engine.consumed(3, 65535)
    assert ours.engine._window + ours.engine._grant == 2 * 65536 - 1
    assert ours.engine._window >= 65536 * 3 / 4


def test_a_thousand_small_late_frames_are_no_flood() -> None:
    ours = RecordingEngine()
    ours.receive(OPEN)
    ours.engine.reset(1, Code.CANCEL)
    for _ in range(5000):
        assert ours.receive(data(1, b"small")) == []


def test_more_late_data_than_the_stream_had_room_for_is_not_forgiven_for_ever() -> None:
    ours = RecordingEngine(limits=Http2Limits(stream_window=65535, connection_window=2**20))
    ours.receive(OPEN)
    ours.engine.reset(1, Code.CANCEL)
    with pytest.raises(ProtocolError, match="too many"):
        ours.receive(*[data(1, bytes(16384))] * (4 + 1001 + 501))


def test_the_block_of_a_refused_stream_is_decoded_all_the_same() -> None:
    ours = RecordingEngine(limits=Http2Limits(streams=1))
    ours.receive(OPEN)
    # An entry for the table, on a stream that is refused; the next stream refers to it.
    ours.receive(frame(Kind.HEADERS, END_HEADERS | END_STREAM, 3, literal(GET) + b"\x40\1x\1y"))
    ours.receive(long(Kind.RST_STREAM, 1, 8))
    (event,) = ours.receive(
        frame(Kind.HEADERS, END_HEADERS | END_STREAM, 5, literal(GET) + b"\xbe")
    )
    assert isinstance(event, HeadReceived)
    assert event.head.headers.get(b"x") == b"y"


def test_unknown_frames_flags_settings_and_codes_are_passed_over() -> None:
    ours = RecordingEngine()
    events = ours.receive(
        frame(0x42, 0xFF, 7, b"whatever"), settings((0x4242, 7), (Setting.MAX_HEADER_LIST_SIZE, 0)),
        frame(Kind.PING, 0xFE, 0, bytes(8)), headers(1, POST, END_HEADERS | 0x40), long(Kind.RST_STREAM, 1, 0xFFFF),
        frame(Kind.PRIORITY, 0, 9, bytes(5)), frame(Kind.GOAWAY, 0, 0, struct.pack(">LL", 0x80000001, 0xFFFF) + b"words"),
        frame(Kind.WINDOW_UPDATE, 0, 0, struct.pack(">L", 0x80000001)),
    )  # fmt: skip
    assert [event for event in merged(events) if not isinstance(event, HeadReceived)] == [
        StreamBroken(1, 0xFFFF, True, "the peer reset the stream (code 65535)"),
        GoingAway(1, 0xFFFF),
    ]
    assert (Kind.PING, ACK, 0, bytes(8)) in ours.sent


def test_the_reserved_bit_of_a_stream_number_is_passed_over() -> None:
    ours = RecordingEngine()
    (event,) = ours.receive(frame(Kind.HEADERS, END_HEADERS | END_STREAM, 0x80000001, literal(GET)))
    assert isinstance(event, HeadReceived)
    assert event.stream == 1


def test_padding_and_priority_are_taken_off() -> None:
    ours = RecordingEngine()
    block = b"\4" + b"\0\0\0\3\xff" + literal(POST) + bytes(4)
    events = ours.receive(
        frame(Kind.HEADERS, END_HEADERS | PADDED | PRIORITY, 1, block),
        data(1, b"\2ab\0\0", PADDED),
        data(1, b"\0", PADDED | END_STREAM),
    )
    assert isinstance(events[0], HeadReceived)
    assert events[1:] == [DataReceived(1, b"ab", 5, False), DataReceived(1, b"", 1, True)]


def test_a_head_in_many_pieces_is_one_head() -> None:
    block = literal([*GET, (b"x", b"y" * 100)])
    pieces = [frame(Kind.HEADERS, END_STREAM, 1, b"")] + [
        frame(Kind.CONTINUATION, 0, 1, block[at : at + 20]) for at in range(0, len(block), 20)
    ]
    (event,) = RecordingEngine().receive(*pieces, frame(Kind.CONTINUATION, END_HEADERS, 1, b""))
    assert isinstance(event, HeadReceived)
    assert event.ended
    assert event.head.headers.get(b"x") == b"y" * 100


def test_an_initial_window_may_become_negative_and_comes_back() -> None:
    ours = RecordingEngine()
    ours.receive(DONE)
    engine = ours.engine
    engine.send_response(1, ResponseHead(200), end=False)
    engine.send_data(1, bytes(1000), end=False)
    ours.receive(settings((Setting.INITIAL_WINDOW_SIZE, 10)))
    assert engine.window(1) == 0
    ours.receive(long(Kind.WINDOW_UPDATE, 1, 990))
    assert engine.window(1) == 0
    ours.receive(long(Kind.WINDOW_UPDATE, 1, 5))
    assert engine.window(1) == 5


# Shutdown...


def test_behind_our_goaway_new_streams_are_refused_and_old_ones_go_on() -> None:
    ours = RecordingEngine()
    ours.receive(OPEN)
    ours.engine.go_away()
    ours.engine.go_away()
    events = ours.receive(headers(3), data(1, b"x", END_STREAM))
    assert events == [DataReceived(1, b"x", 1, True)]
    assert ours.codes(Kind.GOAWAY) == [(1, Code.NO_ERROR)]
    assert ours.codes(Kind.RST_STREAM) == [(3, Code.REFUSED_STREAM)]


def test_after_the_peers_goaway_open_streams_continue_and_no_new_one_starts() -> None:
    ours = RecordingEngine(Role.CLIENT)
    first, second = ours.request(), ours.request()
    assert ours.engine.capacity == 98
    events = ours.receive(
        goaway(2**31 - 1, 0) + goaway(first, 0), headers(first, OK), goaway(2**31 - 1, 0)
    )
    assert [event for event in events if isinstance(event, GoingAway)] == [
        GoingAway(2**31 - 1, 0),
        GoingAway(first, 0),
        GoingAway(first, 0),
    ]
    assert any(isinstance(event, HeadReceived) for event in events)
    assert ours.engine.capacity == 0
    ours.engine.reset(second, Code.CANCEL)
    assert ours.engine.open_streams == 0


@pytest.mark.parametrize(("allowed", "capacity"), [(0, 0), (5, 4), (1, 0), (2**32 - 1, 2**32 - 2)])
def test_the_peer_sets_the_number_of_streams(allowed: int, capacity: int) -> None:
    ours = RecordingEngine(Role.CLIENT)
    number = ours.request(end=False)
    ours.receive(settings((Setting.MAX_CONCURRENT_STREAMS, allowed)))
    assert ours.engine.capacity == capacity
    ours.engine.send_trailers(number, Headers([(b"x", b"1")]))
    with pytest.raises(StreamGone):
        ours.engine.send_data(number, b"", end=True)
    ours.receive(headers(number, OK))
    assert ours.engine.capacity == allowed


def test_numbers_are_used_up_one_day() -> None:
    ours = RecordingEngine(Role.CLIENT)
    ours.engine._next_ours = 2**31 - 1
    assert ours.engine.capacity == 100
    assert (
        ours.engine.send_request(RequestHead(b"GET", b"/", Headers([(b"host", b"a")])), end=True)
        == 2**31 - 1
    )
    assert ours.engine.capacity == 0


def test_trailers_are_reported_as_the_end() -> None:
    assert RecordingEngine().receive(OPEN, headers(1, TRAILER))[1:] == [
        TrailersReceived(1, Headers(TRAILER))
    ]
