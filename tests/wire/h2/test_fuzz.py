"""The law of the reader: whatever bytes come, however they are cut, there are events, or events and
one ProtocolError with its GOAWAY for the last word; and they are the same for every way to cut
them. Held over random bytes, over frames that are nearly right, and over those with a few bytes
spoiled."""

from __future__ import annotations

import random
import struct

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
from tests.kit.http2 import GET, OK, POST, Ours, Pair, literal
from tests.kit.http2 import settings as settings_frame

LIMITS = Http2Limits(streams=3, head=600, stream_window=65535, connection_window=65535)

STREAM = st.sampled_from([0, 1, 1, 1, 2, 3, 3, 5, 7, 9, 2**31 - 1, 2**31 + 1])
FLAGS = st.one_of(
    st.sampled_from([0, 1, 4, 4, 5, 5, 5, 8, 0xC, 0xD, 0x20, 0x24, 0x25, 0x2D]), st.integers(0, 255)
)
FIELDS: list[Pair] = [
    (b":method", b"HEAD"), (b":status", b"103"), (b":status", b"204"), (b"content-length", b"5"), (b"content-length", b"0"), (b"x", b"y"),
    (b"X", b"y"), (b"te", b"trailers"), (b"cookie", b"a"), (b"x", b"\n"), (b"connection", b"close"), (b"x", b"y" * 500), (b"", b""),
]  # fmt: skip
LIST = st.builds(
    lambda start, more: start + more,
    st.sampled_from([GET, POST, OK, [], [(b"x", b"1")]]),
    st.lists(st.sampled_from(FIELDS), max_size=3),
)
BLOCK = st.one_of(
    st.builds(literal, LIST, st.sampled_from([0, 0x10, 0x40])),
    st.sampled_from(
        [b"\x82\x86\x84\x41\1a", b"\x82\x86\x84\xbe", b"\x20", b"\xbe\xbf\xc0", b"\x80", b"\x88"]
    ),
    st.binary(max_size=12),
)
LONG = st.sampled_from([0, 1, 2, 3, 8, 65535, 2**31 - 1, 2**31, 2**32 - 1]).map(
    struct.Struct(">L").pack
)
SETTING = st.builds(
    struct.Struct(">HL").pack,
    st.integers(0, 9),
    st.sampled_from([0, 1, 2, 10, 4096, 16384, 65535, 2**24 - 1, 2**31 - 1, 2**31]),
)
PADDING = st.builds(
    lambda size, rest: bytes([size]) + rest, st.integers(0, 255), st.binary(max_size=20)
)


def frames_of(
    kind: int, payload: st.SearchStrategy[bytes], flags: st.SearchStrategy[int] = FLAGS
) -> st.SearchStrategy[bytes]:
    return st.builds(frame, st.just(kind), flags, STREAM, payload)


NO_FLAGS = st.sampled_from([0, 0, 0, 1])
FRAME = st.one_of(
    frames_of(Kind.HEADERS, BLOCK, st.sampled_from([4, 5])),
    frames_of(Kind.HEADERS, BLOCK),
    frames_of(Kind.HEADERS, PADDING, st.just(0xD)),
    frames_of(Kind.CONTINUATION, BLOCK),
    frames_of(
        Kind.DATA, st.sampled_from([b"", b"hello", b"hel", bytes(16384)]), st.sampled_from([0, 1])
    ),
    frames_of(Kind.DATA, PADDING, st.sampled_from([8, 9])),
    frames_of(Kind.WINDOW_UPDATE, LONG),
    frames_of(Kind.RST_STREAM, LONG),
    frames_of(Kind.PRIORITY, st.builds(lambda number: number + b"\0", LONG)),
    st.builds(
        lambda values: frame(Kind.SETTINGS, 0, 0, b"".join(values)), st.lists(SETTING, max_size=3)
    ),
    st.builds(lambda flags: frame(Kind.PING, flags, 0, bytes(8)), NO_FLAGS),
    st.builds(lambda last, code: frame(Kind.GOAWAY, 0, 0, last + code), LONG, LONG),
    frames_of(Kind.PUSH_PROMISE, BLOCK),
    st.builds(frame, st.integers(0, 255), FLAGS, STREAM, st.binary(max_size=20)),
)
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
RIGHT = st.builds(
    lambda number, script, length: b"".join([frame(kind, flags, number, payload) for kind, flags, payload in script[:length]]),
    st.sampled_from([1, 3, 5]), st.sampled_from(SCRIPTS), st.integers(1, 4),
)  # fmt: skip
SEQUENCE = st.lists(st.one_of(FRAME, RIGHT, RIGHT), max_size=8).map(b"".join)


def run(
    role: Role, pieces: list[bytes]
) -> tuple[list[Event], list[tuple[int, int, int, bytes]], bool]:
    """Events, what was said, and whether the connection was ended by a fault. Credit is given back,
    and every request answered."""
    ours = Ours(role, LIMITS)
    if role is Role.CLIENT:
        for method in (b"GET", b"POST", b"HEAD"):
            ours.request(method, end=method != b"POST")
        ours.engine.data_to_send()
    events: list[Event] = []
    for piece in pieces:
        try:
            found = ours.hear(piece)
        except ProtocolError:
            events += ours.engine.before_fault
            assert ours.said[-1][0] == Kind.GOAWAY, "not the last word"
            assert int.from_bytes(ours.said[-1][3][4:8], "big") in set(Code) - {
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
    assert not [said for said in ours.said if said[0] == Kind.GOAWAY]
    return [event for event in events if not isinstance(event, WindowOpened)], resets(ours), False


def resets(ours: Ours) -> list[tuple[int, int, int, bytes]]:
    return [
        said
        for said in ours.said
        if said[0] in (Kind.RST_STREAM, Kind.GOAWAY, Kind.PING, Kind.SETTINGS)
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
        ours = Ours(greeted=False)
        try:
            ours.hear(*pieces)
        except ProtocolError:
            assert ours.said[-1][0] == Kind.GOAWAY
            return True
        return False

    every_way(PREFACE[:length] + sent, begin)


@settings(max_examples=200, deadline=None)
@given(sent=st.lists(FRAME, max_size=12), seed=st.integers(0, 2**16))
def test_what_is_answered_in_between_breaks_nothing(sent: list[bytes], seed: int) -> None:
    source = random.Random(seed)
    ours = Ours(limits=LIMITS)
    numbers: list[int] = []
    for piece in [*sent, settings_frame()]:
        try:
            events = ours.hear(piece)
        except ProtocolError:
            return
        for event in events:
            if isinstance(event, HeadReceived):
                numbers.append(event.stream)
            elif isinstance(event, DataReceived):
                ours.engine.consumed(event.stream, event.credit)
        for number in source.sample(numbers, len(numbers) // 2):
            speak(ours, number, source.randrange(4))


def speak(ours: Ours, number: int, what: int) -> None:
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
    ours.hear()


def kinds(role: Role, sent: bytes) -> set[str]:
    events, said, over = run(role, [sent])
    found = {type(event).__name__ for event in events} | {
        Kind(kind).name for kind, *_ in said if kind == Kind.RST_STREAM
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
