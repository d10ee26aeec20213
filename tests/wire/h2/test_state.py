"""What the user of an HTTP/2 engine asks it about its streams and windows, and tells it to say."""

from __future__ import annotations

import pytest

from proxy.wire.h1.connection import Role
from proxy.wire.h2.events import HeadReceived, StreamBroken
from proxy.wire.h2.frames import ACK, END_HEADERS, END_STREAM, Code, Kind, frame
from proxy.wire.messages import ProtocolError, ResponseHead
from tests.kit.http2 import (
    GET,
    POST,
    RecordingEngine,
    data,
    frames_in,
    headers,
    literal,
    long,
    settings,
)


def test_a_server_without_http2_is_told_from_one_that_sends_too_much() -> None:
    ours = RecordingEngine(Role.CLIENT, greeted=False)
    ours.request()
    with pytest.raises(ProtocolError, match="the server speaks HTTP/1, not HTTP/2"):
        ours.receive(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    assert ours.engine.speaks_http1
    late = RecordingEngine(Role.CLIENT)
    late.request()
    with pytest.raises(ProtocolError, match="a frame of 4740180 bytes"):
        late.receive(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    assert not late.engine.speaks_http1


def test_a_stream_is_open_until_it_has_ended_on_both_sides() -> None:
    ours = RecordingEngine(Role.CLIENT)
    engine = ours.engine
    assert not engine.pending
    number = ours.request(end=False)
    assert engine.pending
    assert engine.is_open(number)
    engine.data_to_send()
    assert not engine.pending
    engine.send_data(number, b"", end=True)
    assert frames_in(engine.data_to_send()) == [(Kind.DATA, 1, number, b"")]
    assert engine.is_open(number)
    ours.receive(headers(number, [(b":status", b"204")]))
    assert not engine.is_open(number)


def test_the_windows_shrink_by_what_is_sent_and_a_stream_has_its_own() -> None:
    ours = RecordingEngine(Role.CLIENT)
    engine = ours.engine
    ours.receive(settings((3, 7)))
    assert engine.streams_allowed == 7
    first, second = ours.request(end=False), ours.request(end=False)
    engine.send_data(first, bytes(1000), end=False)
    assert engine.stream_window(first) == engine.connection_window == 64535
    assert engine.stream_window(second) == 65535
    assert engine.window(second) == 64535
    ours.receive(settings((4, 100)))  # the initial window, for open streams too (RFC 9113 §6.9.2)
    assert engine.stream_window(first) == 100 - 1000
    assert engine.window(first) == 0


def test_a_window_of_a_stream_that_has_ended_is_ignored() -> None:
    ours = RecordingEngine(Role.CLIENT)
    number = ours.request()
    ours.receive(headers(number, [(b":status", b"204")]))
    window = ours.engine.connection_window
    assert ours.receive(long(Kind.WINDOW_UPDATE, number, 1000)) == []
    assert ours.engine.connection_window == window
    assert not ours.engine.is_open(number)


def test_a_ping_and_the_announcement_of_the_end_are_sent_until_the_end() -> None:
    engine = RecordingEngine().engine
    engine.ping(b"12345678")
    engine.announce_end()
    assert frames_in(engine.data_to_send()) == [
        (Kind.PING, 0, 0, b"12345678"),
        (Kind.GOAWAY, 0, 0, b"\x7f\xff\xff\xff" + bytes(4)),
    ]
    engine.go_away()
    assert frames_in(engine.data_to_send()) == [(Kind.GOAWAY, 0, 0, bytes(8))]
    engine.announce_end()
    assert not engine.pending, "it was said already that no new streams are accepted"
    engine.close(Code.NO_ERROR)
    engine.data_to_send()
    engine.ping(b"12345678")
    engine.announce_end()
    assert not engine.pending


def test_an_error_of_a_stream_that_has_ended_is_answered_each_time_and_breaks_nothing() -> None:
    ours = RecordingEngine()
    ours.receive(headers(1))
    ours.engine.send_response(1, ResponseHead(204), end=True)
    ours.engine.data_to_send()
    for _ in range(2):
        assert ours.receive(frame(Kind.PRIORITY, 0, 1, bytes(4))) == []
    assert ours.codes(Kind.RST_STREAM) == [(1, Code.FRAME_SIZE_ERROR)] * 2
    assert ours.receive(settings(flags=ACK)) == []


def test_frames_that_carry_nothing_cost_the_peer_its_budget_and_large_ones_do_not() -> None:
    ours = RecordingEngine()
    ours.receive(headers(1, POST, END_HEADERS))
    before = ours.engine._patience
    ours.receive(data(1))
    assert ours.engine._patience < before
    block = literal([*GET, (b"x", b"y" * 2000)])
    before = ours.engine._patience
    (event,) = ours.receive(
        frame(Kind.HEADERS, END_STREAM, 3, block[:10])
        + frame(Kind.CONTINUATION, END_HEADERS, 3, block[10:])
    )
    assert isinstance(event, HeadReceived)
    assert ours.engine._patience == before


def test_a_reset_of_a_stream_that_has_ended_costs_and_one_of_a_server_does_not() -> None:
    ours = RecordingEngine()
    ours.receive(headers(1))
    ours.engine.send_response(1, ResponseHead(204), end=True)
    before = ours.engine._patience
    assert ours.receive(long(Kind.RST_STREAM, 1, 8)) == []
    assert ours.engine._patience < before
    client = RecordingEngine(Role.CLIENT)
    number = client.request()
    before = client.engine._patience
    (event,) = client.receive(long(Kind.RST_STREAM, number, 8))
    assert isinstance(event, StreamBroken)
    assert client.engine._patience == before


@pytest.mark.parametrize(
    "sent",
    [
        frame(Kind.HEADERS, 0, 1, b"\x82") + frame(Kind.CONTINUATION, 0, 1, b"\x86") * 17,
        settings(*[(1, 0)] * 200),
    ],
    ids=["a header block in many pieces", "many settings"],
)
def test_what_is_in_too_many_pieces_ends_the_connection(sent: bytes) -> None:
    ours = RecordingEngine()
    with pytest.raises(ProtocolError):
        ours.receive(sent)
    assert [code for _, code in ours.codes(Kind.GOAWAY)] == [Code.ENHANCE_YOUR_CALM]


def test_the_memory_of_streams_that_we_have_reset_is_bounded() -> None:
    ours = RecordingEngine()
    for number in range(1, 2 * 1100, 2):
        ours.receive(headers(number, POST, END_HEADERS))
        ours.engine.reset(number, Code.CANCEL)
    assert len(ours.engine._forgiven) == 1024
    assert ours.receive(data(2 * 1100 - 1, b"late")) == []
