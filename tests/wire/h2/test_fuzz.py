"""The law of the reader: whatever bytes come, however they are cut, there are events, or events and
one ProtocolError with its GOAWAY for the last word; and they are the same for every way to cut
them. Held over random bytes, over frames that are nearly right, and over those with a few bytes
spoiled."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from proxy.wire.h1.connection import Role
from proxy.wire.h2.events import (
    DataReceived,
    Event,
    HeadReceived,
    Http2Limits,
    StreamGone,
    WindowOpened,
)
from proxy.wire.h2.frames import PREFACE, Code, Kind, frame
from proxy.wire.messages import Headers, ProtocolError, ResponseHead
from tests.kit.chunkings import every_way
from tests.kit.drawn import Choices, drawn
from tests.kit.http2 import GET, OK, POST, Pair, RecordingEngine, literal
from tests.kit.http2 import settings as settings_frame

LIMITS = Http2Limits(streams=3, head=600, stream_window=65535, connection_window=65535)

STREAMS = [1, 0, 1, 1, 2, 3, 3, 5, 7, 9, 2**31 - 1, 2**31 + 1]
FLAGS = [0, 1, 4, 4, 5, 5, 5, 8, 0xC, 0xD, 0x20, 0x24, 0x25, 0x2D]
FIELDS: list[Pair] = [
    (b":method", b"HEAD"), (b":status", b"103"), (b":status", b"204"), (b"content-length", b"5"), (b"content-length", b"0"), (b"x", b"y"),
    (b"X", b"y"), (b"te", b"trailers"), (b"cookie", b"a"), (b"x", b"\n"), (b"connection", b"close"), (b"x", b"y" * 500), (b"", b""),
]  # fmt: skip
BLOCKS = [b"\x82\x86\x84\x41\1a", b"\x82\x86\x84\xbe", b"\x20", b"\xbe\xbf\xc0", b"\x80", b"\x88"]
LONG = [0, 1, 2, 3, 8, 65535, 2**31 - 1, 2**31, 2**32 - 1]
SETTINGS = [0, 1, 2, 10, 4096, 16384, 65535, 2**24 - 1, 2**31 - 1, 2**31]


def block(choices: Choices) -> bytes:
    match choices.below(3):
        case 0:
            start = choices.of([GET, POST, OK, [], [(b"x", b"1")]])
            more = choices.some(3, lambda: choices.of(FIELDS))
            return literal(start + more, choices.of([0, 0x10, 0x40]))
        case 1:
            return choices.of(BLOCKS)
        case _:
            return choices.binary(12)


def long(choices: Choices) -> bytes:
    return struct.pack(">L", choices.of(LONG))


def setting(choices: Choices) -> bytes:
    return struct.pack(">HL", choices.below(10), choices.of(SETTINGS))


def padding(choices: Choices) -> bytes:
    return choices.raw(1) + choices.binary(20)


def flags(choices: Choices) -> int:
    return choices.of(FLAGS) if choices.below(2) else choices.below(256)


DATA = [b"", b"hello", b"hel", bytes(16384)]
FRAMES: list[Callable[[Choices, int], bytes]] = [
    lambda c, stream: frame(Kind.HEADERS, c.of([4, 5]), stream, block(c)),
    lambda c, stream: frame(Kind.HEADERS, flags(c), stream, block(c)),
    lambda c, stream: frame(Kind.HEADERS, 0xD, stream, padding(c)),
    lambda c, stream: frame(Kind.CONTINUATION, flags(c), stream, block(c)),
    lambda c, stream: frame(Kind.DATA, c.below(2), stream, c.of(DATA)),
    lambda c, stream: frame(Kind.DATA, c.of([8, 9]), stream, padding(c)),
    lambda c, stream: frame(Kind.WINDOW_UPDATE, flags(c), stream, long(c)),
    lambda c, stream: frame(Kind.RST_STREAM, flags(c), stream, long(c)),
    lambda c, stream: frame(Kind.PRIORITY, flags(c), stream, long(c) + b"\0"),
    lambda c, _: frame(Kind.SETTINGS, 0, 0, b"".join(c.some(3, lambda: setting(c)))),
    lambda c, _: frame(Kind.PING, c.of([0, 0, 0, 1]), 0, bytes(8)),
    lambda c, _: frame(Kind.GOAWAY, 0, 0, long(c) + long(c)),
    lambda c, stream: frame(Kind.PUSH_PROMISE, flags(c), stream, block(c)),
    lambda c, stream: frame(c.below(256), flags(c), stream, c.binary(20)),
]


def any_frame(choices: Choices) -> bytes:
    """A frame that is nearly right."""
    return choices.of(FRAMES)(choices, choices.of(STREAMS))


# What is right, so that the rest is not all about the first frame: exchanges, or the beginnings of
# some, on a few streams.
TRAILERS = (Kind.HEADERS, 5, literal([(b"x", b"1")]))
SOME, LAST = (Kind.DATA, 0, b"some"), (Kind.DATA, 1, b"last")
SCRIPTS = [
    [(Kind.HEADERS, 5, literal(GET))],
    [(Kind.HEADERS, 4, literal(POST)), SOME, SOME, LAST],
    [(Kind.HEADERS, 4, literal(POST)), SOME, TRAILERS],
    [
        (Kind.HEADERS, 4, literal([(b":status", b"103")])),
        (Kind.HEADERS, 4, literal(OK)),
        SOME,
        LAST,
    ],
    [(Kind.HEADERS, 4, literal(OK)), SOME, TRAILERS],
    [(Kind.HEADERS, 4, literal(POST)), (Kind.RST_STREAM, 0, b"\0\0\0\x08")],
]


def right(choices: Choices) -> bytes:
    number = choices.of([1, 3, 5])
    script = choices.of(SCRIPTS)[: 1 + choices.below(4)]
    return b"".join([frame(kind, flags, number, payload) for kind, flags, payload in script])


def sequence(choices: Choices) -> bytes:
    frames = choices.some(8, lambda: (any_frame, right, right)[choices.below(3)](choices))
    return b"".join(frames)


SEQUENCE = drawn(150, sequence)


def run(
    role: Role, pieces: list[bytes]
) -> tuple[list[Event], list[tuple[int, int, int, bytes]], bool]:
    """Events, the frames sent, and whether the connection was ended by a fault. Credit is returned,
    and every request answered."""
    ours = RecordingEngine(role, LIMITS)
    if role is Role.CLIENT:
        for method in (b"GET", b"POST", b"HEAD"):
            ours.request(method, end=method != b"POST")
        ours.engine.data_to_send()
    events: list[Event] = []
    for piece in pieces:
        try:
            found = ours.receive(piece)
        except ProtocolError:
            events += ours.engine.before_fault
            assert ours.sent[-1][0] == Kind.GOAWAY, "not the last word"
            assert int.from_bytes(ours.sent[-1][3][4:8], "big") in set(Code) - {
                Code.NO_ERROR,
                Code.INTERNAL_ERROR,
            }
            assert ours.engine.data_to_send() == b""
            return (
                [event for event in events if not isinstance(event, WindowOpened)],
                resets(ours),
                True,
            )
        events += found
        assert len(ours.engine._buffer) < 16384 + 9
        assert 0 <= ours.engine._open_theirs <= LIMITS.streams
        assert ours.engine.open_streams == ours.engine._open_theirs + ours.engine._open_ours
    assert not [output for output in ours.sent if output[0] == Kind.GOAWAY]
    return [event for event in events if not isinstance(event, WindowOpened)], resets(ours), False


def resets(ours: RecordingEngine) -> list[tuple[int, int, int, bytes]]:
    return [
        output
        for output in ours.sent
        if output[0] in (Kind.RST_STREAM, Kind.GOAWAY, Kind.PING, Kind.SETTINGS)
    ]


ROLE = st.sampled_from(list(Role))


@settings(max_examples=600, deadline=None)
@given(role=ROLE, sent=SEQUENCE)
def test_frames_that_are_nearly_right(role: Role, sent: bytes) -> None:
    hold(role, sent)


@settings(max_examples=300, deadline=None)
@given(role=ROLE, sent=SEQUENCE, seed=st.integers(0, 2**16))
def test_frames_with_a_few_bytes_spoiled(role: Role, sent: bytes, seed: int) -> None:
    source = random.Random(seed)
    spoiled = bytearray(sent[:3000])
    for _ in range(source.randint(1, 4) if spoiled else 0):
        at = source.randrange(len(spoiled))
        match source.randrange(3):
            case 0:
                spoiled[at] = source.randrange(256)
            case 1:
                spoiled[at] ^= 1 << source.randrange(8)
            case _:
                del spoiled[at]
        if not spoiled:
            break
    hold(role, bytes(spoiled))


@settings(max_examples=100, deadline=None)
@given(role=ROLE, sent=st.binary(max_size=200))
def test_random_bytes(role: Role, sent: bytes) -> None:
    hold(role, sent)


def hold(role: Role, sent: bytes) -> None:
    if len(sent) <= 2000:
        every_way(sent, lambda pieces: run(role, pieces))
    else:
        whole = run(role, [sent])
        assert run(role, [sent[at : at + 1000] for at in range(0, len(sent), 1000)]) == whole


@settings(max_examples=100, deadline=None)
@given(
    sent=st.one_of(st.binary(max_size=40), SEQUENCE.map(lambda data: data[:100])),
    length=st.integers(0, len(PREFACE)),
)
def test_whatever_follows_a_part_of_the_preface(sent: bytes, length: int) -> None:
    def begin(pieces: list[bytes]) -> bool:
        ours = RecordingEngine(greeted=False)
        try:
            ours.receive(*pieces)
        except ProtocolError:
            assert ours.sent[-1][0] == Kind.GOAWAY
            return True
        return False

    every_way(PREFACE[:length] + sent, begin)


@settings(max_examples=200, deadline=None)
@given(
    sent=drawn(200, lambda choices: choices.some(12, lambda: any_frame(choices))),
    seed=st.integers(0, 2**16),
)
def test_what_is_answered_in_between_breaks_nothing(sent: list[bytes], seed: int) -> None:
    source = random.Random(seed)
    ours = RecordingEngine(limits=LIMITS)
    numbers: list[int] = []
    for piece in [*sent, settings_frame()]:
        try:
            events = ours.receive(piece)
        except ProtocolError:
            return
        for event in events:
            if isinstance(event, HeadReceived):
                numbers.append(event.stream)
            elif isinstance(event, DataReceived):
                ours.engine.consumed(event.stream, event.credit)
        for number in source.sample(numbers, len(numbers) // 2):
            speak(ours, number, source.randrange(4))


def speak(ours: RecordingEngine, number: int, what: int) -> None:
    engine = ours.engine
    try:
        if what == 0:
            engine.send_response(number, ResponseHead(200), end=False)
        elif what == 1 and (room := engine.window(number)):
            engine.send_data(number, bytes(min(room, 20000)), end=False)
        elif what == 2:
            engine.send_trailers(number, Headers([(b"x", b"1")]))
        else:
            engine.reset(number, Code.CANCEL)
    except StreamGone:
        pass
    ours.receive()


def kinds(role: Role, sent: bytes) -> set[str]:
    events, output, over = run(role, [sent])
    found = {type(event).__name__ for event in events} | {
        Kind(kind).name for kind, *_ in output if kind == Kind.RST_STREAM
    }
    return found | {"the end" if over else "no end"}


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize(
    "wanted",
    [
        {"HeadReceived", "no end"}, {"HeadReceived", "DataReceived"}, {"HeadReceived", "TrailersReceived"}, {"StreamBroken", "no end"},
        {"RST_STREAM", "no end"}, {"HeadReceived", "the end"}, {"GoingAway"},
    ],
    ids=lambda wanted: " and ".join(sorted(wanted)),
)  # fmt: skip
def test_the_generator_reaches_what_it_is_for(role: Role, wanted: set[str]) -> None:
    """A few hundred draws are enough as a rule; the limit is only there for a generator that never
    gets there. Short ones will do: `find` prints what it has found, and hypothesis warns of a text
    of more than 30 kB."""
    enough = settings(max_examples=20_000, deadline=None, database=None, phases=[Phase.generate])
    find(SEQUENCE, lambda sent: len(sent) < 5000 and wanted <= kinds(role, sent), settings=enough)
