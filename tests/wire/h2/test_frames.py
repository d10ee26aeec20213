"""HTTP/2 frames: hyperframe reads what we write as the same; what cannot be parsed is an error with
the code of RFC 9113."""

from __future__ import annotations

import pytest
from hyperframe.frame import (
    ContinuationFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)
from hypothesis import given
from hypothesis import strategies as st

from proxy.wire.h2 import frames
from proxy.wire.h2.frames import Code, ConnectionFault, Kind, StreamFault
from tests.kit.http2 import frames_in

LONG = st.integers(0, 2**31 - 1)


def parsed(data: bytes) -> list[Frame]:
    """By hyperframe."""
    found = []
    while data:
        frame, size = Frame.parse_frame_header(memoryview(data[:9]))
        frame.parse_body(memoryview(data[9 : 9 + size]))
        found.append(frame)
        data = data[9 + size :]
    return found


@given(stream=LONG, number=st.integers(0, 2**32 - 1), increment=st.integers(1, 2**31 - 1))
def test_frames_of_one_number_are_read_back_by_hyperframe(
    stream: int, number: int, increment: int
) -> None:
    (update,) = parsed(frames.window_update(stream, increment))
    assert isinstance(update, WindowUpdateFrame)
    assert (update.stream_id, update.window_increment) == (stream, increment)
    (reset,) = parsed(frames.rst_stream(stream or 1, number))
    assert isinstance(reset, RstStreamFrame)
    assert (reset.stream_id, reset.error_code) == (stream or 1, number)
    (goaway,) = parsed(frames.goaway(stream, number, "why \u00e4"))
    assert isinstance(goaway, GoAwayFrame)
    assert (goaway.last_stream_id, goaway.error_code, goaway.additional_data) == (
        stream,
        number,
        b"why ?",
    )


@given(values=st.dictionaries(st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1), max_size=8))
def test_settings_are_read_back_by_hyperframe_and_by_us(values: dict[int, int]) -> None:
    data = frames.settings(values)
    (frame,) = parsed(data)
    assert isinstance(frame, SettingsFrame)
    assert frame.settings == values
    assert dict(frames.read_settings(data[9:])) == values


@given(block=st.binary(max_size=300), size=st.integers(1, 100), end=st.booleans())
def test_a_header_block_is_cut_into_frames_of_the_peers_size(
    block: bytes, size: int, end: bool
) -> None:
    first, *rest = parsed(b"".join(frames.headers(5, block, size, end=end)))
    assert isinstance(first, HeadersFrame)
    assert all(isinstance(frame, ContinuationFrame) for frame in rest)
    pieces = [
        payload for *_, payload in frames_in(b"".join(frames.headers(5, block, size, end=end)))
    ]
    assert b"".join(pieces) == block
    assert all(len(piece) <= size for piece in pieces)
    assert {frame.stream_id for frame in [first, *rest]} == {5}
    assert ("END_STREAM" in first.flags) == end
    assert ["END_HEADERS" in frame.flags for frame in [first, *rest]] == [False] * len(rest) + [
        True
    ]


def test_a_header_block_over_the_peers_size_continues() -> None:
    assert frames.headers(1, b"a" * 10, 10, end=True) == [
        frames.frame(Kind.HEADERS, frames.END_HEADERS | frames.END_STREAM, 1, b"a" * 10)
    ]
    assert frames.headers(1, b"a" * 10 + b"b" * 10 + b"c", 10, end=True) == [
        frames.frame(Kind.HEADERS, frames.END_STREAM, 1, b"a" * 10),
        frames.frame(Kind.CONTINUATION, 0, 1, b"b" * 10),
        frames.frame(Kind.CONTINUATION, frames.END_HEADERS, 1, b"c"),
    ]


def test_a_frame_of_the_largest_size_says_so() -> None:
    assert frames.header(frames.LARGEST_FRAME_SIZE, Kind.DATA, 0, 1)[:3] == b"\xff\xff\xff"


@given(body=st.binary(max_size=40), padding=st.integers(0, 255))
def test_padding_is_taken_off(body: bytes, padding: int) -> None:
    assert frames.unpadded(bytes([padding]) + body + bytes(padding), frames.PADDED) == body
    assert frames.unpadded(body, 0) == body


@pytest.mark.parametrize("payload", [b"", b"\1", b"\3ab", b"\xff" + bytes(254)])
def test_padding_that_is_as_long_as_what_follows_it_or_longer_is_a_fault(payload: bytes) -> None:
    with pytest.raises(ConnectionFault) as caught:
        frames.unpadded(payload, frames.PADDED)
    assert caught.value.code is Code.PROTOCOL_ERROR


def test_the_priority_of_headers_is_taken_off() -> None:
    assert frames.without_priority(b"\x80\0\0\3\x10block", frames.PRIORITY, 5) == b"block"
    assert frames.without_priority(b"\0\0\0\5\x10block", 0, 5) == b"\0\0\0\5\x10block"
    with pytest.raises(StreamFault, match="depends on itself"):
        frames.without_priority(b"\x80\0\0\5\x10", frames.PRIORITY, 5)


@pytest.mark.parametrize(
    "read",
    [
        lambda: frames.read_settings(bytes(7)),
        lambda: frames.read_long(bytes(3), "PING"),
        lambda: frames.read_long(bytes(5), "PING"),
        lambda: frames.read_goaway(bytes(7)),
        lambda: frames.without_priority(bytes(4), frames.PRIORITY, 1),
    ],
)
def test_a_payload_of_the_wrong_size_is_a_frame_size_error(read: object) -> None:
    assert callable(read)
    with pytest.raises(ConnectionFault) as caught:
        read()
    assert caught.value.code is Code.FRAME_SIZE_ERROR


def test_codes_have_names_and_unknown_ones_have_numbers() -> None:
    assert frames.code_name(7) == "REFUSED_STREAM"
    assert frames.code_name(99) == "code 99"


def test_the_kits_own_reading_of_frames_is_right() -> None:
    data = frames.PREFACE + frames.rst_stream(3, 8) + frames.frame(Kind.PING, 1, 0, bytes(8))
    assert frames_in(data) == [(3, 0, 3, b"\0\0\0\x08"), (6, 1, 0, bytes(8))]
