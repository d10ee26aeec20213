"""Windows and numbers of streams that change during a connection, and reads with more streams than
are started at a time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.wire.h2.events import DataReceived, HeadReceived, Http2Limits, WindowOpened
from proxy.wire.h2.frames import END_HEADERS, Code, Kind, Setting
from proxy.wire.messages import ResponseHead
from tests.kit.http2 import POST, RecordingEngine, data, headers, long, settings

LIMITS = Http2Limits(streams=256, stream_window=65536, connection_window=1024 * 1024)


def test_a_stream_whose_window_is_opened_by_settings_is_reported() -> None:
    ours = RecordingEngine()
    ours.receive(headers(1), headers(3))
    engine = ours.engine
    engine.send_response(1, ResponseHead(200), end=False)
    engine.send_response(3, ResponseHead(200), end=False)
    engine.send_data(1, bytes(65535), end=False)
    ours.receive(long(Kind.WINDOW_UPDATE, 0, 65535))
    events = ours.receive(settings((Setting.INITIAL_WINDOW_SIZE, 65536)))
    assert [event.stream for event in events if isinstance(event, WindowOpened)] == [1, 0]
    assert ours.receive(settings((Setting.INITIAL_WINDOW_SIZE, 65537)))[:-1] == []


def test_streams_of_one_read_are_started_some_at_a_time() -> None:
    engine = RecordingEngine().engine
    begun = [
        len(engine.receive_data(b"".join(headers(number) for number in range(1, 201, 2)), 1.0))
    ]
    while engine.paused:
        begun.append(len(engine.receive_data(b"", 1.0)))
    assert begun == [32, 32, 32, 4]
    assert engine.buffered == 0


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=40))
def test_however_a_read_is_divided_the_same_streams_are_started(sizes: list[int]) -> None:
    whole = b"".join(
        headers(number, POST, END_HEADERS) + data(number, b"x" * 10) for number in range(1, 301, 2)
    )
    engine, seen, at = RecordingEngine().engine, list[tuple[str, int]](), 0
    pieces = []
    for size in sizes:
        pieces.append(whole[at : at + size])
        at += size
    for piece in [*pieces, whole[at:]]:
        more = piece
        while True:
            for event in engine.receive_data(more, 1.0):
                assert isinstance(event, HeadReceived | DataReceived)
                seen.append((type(event).__name__, event.stream))
            if not engine.paused:
                break
            more = b""
    assert seen == [
        (kind, number) for number in range(1, 301, 2) for kind in ("HeadReceived", "DataReceived")
    ]


def test_more_streams_than_may_be_open_are_refused_and_counted() -> None:
    ours = RecordingEngine(limits=LIMITS)
    ours.engine.stream_limit = 3
    ours.receive(b"".join(headers(number) for number in range(1, 11, 2)))
    assert ours.codes(Kind.RST_STREAM) == [(7, Code.REFUSED_STREAM), (9, Code.REFUSED_STREAM)]
    assert (ours.engine.refused, ours.engine.opened_by_peer) == (2, 3)
    ours.engine.stream_limit = 4
    ours.receive(headers(11))
    assert ours.engine.opened_by_peer == 4


def given_back(ours: RecordingEngine) -> int:
    """The bytes by which the connection's window was enlarged."""
    return sum(
        int.from_bytes(payload, "big")
        for kind, _, stream, payload in ours.sent
        if kind == Kind.WINDOW_UPDATE and stream == 0
    )


def upload(ours: RecordingEngine, size: int, first: int = 1) -> None:
    """On new streams, each within its window; nothing is consumed."""
    number = first
    while size > 0:
        ours.receive(headers(number, POST, END_HEADERS))
        for _ in range(4):
            part = min(size, 16384)
            if part > 0:
                ours.receive(data(number, bytes(part)))
            size -= part
        number += 2


def test_a_smaller_window_is_reached_as_the_peer_uses_up_what_it_has() -> None:
    ours = RecordingEngine(limits=LIMITS)
    upload(ours, 600_000)
    engine = ours.engine
    engine.resize(128 * 1024)
    assert given_back(ours) == 0
    for _ in range(4):
        engine.consumed(0, 100_000)
    ours.receive(b"")  # its output is recorded
    assert given_back(ours) == 0
    assert engine._window + engine._held > 128 * 1024  # what was announced stays
    engine.consumed(0, 200_000)
    upload(ours, 1024 * 1024 - 600_000 - 1000, first=101)
    while engine._held:
        engine.consumed(0, min(engine._held, 16384))
    assert engine._window + engine._grant == 128 * 1024
    assert engine._window <= 128 * 1024


@pytest.mark.parametrize("size", [0, 1000, 65535, 10**9])
def test_a_window_has_its_bounds(size: int) -> None:
    engine = RecordingEngine(limits=LIMITS).engine
    engine.resize(size)
    assert engine._target == min(max(size, 65535), LIMITS.connection_window)


def test_a_window_that_grows_again_is_announced() -> None:
    ours = RecordingEngine(limits=LIMITS)
    engine = ours.engine
    engine.resize(65535)
    upload(ours, 1024 * 1024 - 10_000)
    while engine._held:
        engine.consumed(0, min(engine._held, 16384))
    assert engine._window < 70_000
    engine.resize(10**9)
    assert engine._window == LIMITS.connection_window
    ours.receive(b"")
    assert given_back(ours) >= LIMITS.connection_window - 70_000
