"""gRPC calls with a stream of answers: messages in any pieces, the end of a call with its status, and
each deviation of the server named. The other end is the proxy's HTTP/2 engine as a server."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.enrollment.grpc_stream import CallEnded, GrpcStreams, Item
from proxy.wire.h1.connection import Role
from proxy.wire.h2.connection import Http2Connection
from proxy.wire.h2.events import DataReceived, HeadReceived, Http2Limits
from proxy.wire.h2.frames import Code
from proxy.wire.messages import Headers, RequestHead, ResponseHead

GRPC = Headers([(b"content-type", b"application/grpc")])
LIMIT = 1000


def framed(message: bytes, flag: int = 0) -> bytes:
    return bytes([flag]) + len(message).to_bytes(4, "big") + message


class Pair:
    """Both ends; the calls /a (stream 1) and /b (stream 3)."""

    def __init__(self) -> None:
        self.calls = GrpcStreams((b"/a", b"/b"), [(b"x-test", b"yes")], LIMIT)
        self.server = Http2Connection(Role.SERVER, Http2Limits())
        self.events = self.server.receive_data(self.calls.data_to_send(), 0.0)

    def items(self) -> list[Item]:
        """What the client makes of all that the server has sent."""
        return self.calls.receive(self.server.data_to_send(), 0.0)

    def respond(self, *data: bytes) -> None:
        """The head of the answer to /a, and bytes of its body."""
        self.server.send_response(1, ResponseHead(200, GRPC), end=False)
        for piece in data:
            self.server.send_data(1, piece, end=False)

    def end(self) -> tuple[int | None, str]:
        """How the call /a ends."""
        (item,) = self.items()
        path, ended = item
        assert path == b"/a"
        assert isinstance(ended, CallEnded)
        return ended.status, ended.words


def test_each_request_is_an_empty_message_with_the_metadata() -> None:
    events = Pair().events
    heads = [event.head for event in events if isinstance(event, HeadReceived)]
    assert [head.target for head in heads if isinstance(head, RequestHead)] == [b"/a", b"/b"]
    for head in heads:
        assert head.headers.get(b"x-test") == b"yes"
        assert head.headers.get(b"te") == b"trailers"
        assert head.headers.get(b"content-type") == b"application/grpc"
    bodies = [event for event in events if isinstance(event, DataReceived)]
    assert [(body.data, body.ended) for body in bodies] == [(bytes(5), True)] * 2


def test_messages_and_the_status_of_one_read_come_in_order() -> None:
    pair = Pair()
    pair.respond(framed(b"one") + framed(b""), framed(b"three"))
    fields = [(b"grpc-status", b"14"), (b"grpc-message", b"agent%20stops%0a")]
    pair.server.send_trailers(1, Headers(fields))
    *messages, (path, ended) = pair.items()
    assert messages == [(b"/a", b"one"), (b"/a", b""), (b"/a", b"three")]
    assert path == b"/a"
    assert isinstance(ended, CallEnded)
    assert (ended.status, str(ended)) == (14, r"Unavailable: agent stops\n")


def test_the_other_call_continues() -> None:
    pair = Pair()
    pair.server.send_response(
        1, ResponseHead(200, Headers([*GRPC, (b"grpc-status", b"12")])), end=True
    )
    pair.server.send_response(3, ResponseHead(200, GRPC), end=False)
    pair.server.send_data(3, framed(b"message"), end=False)
    (first, ended), second = pair.items()
    assert (first, str(ended)) == (b"/a", "Unimplemented: no explanation")
    assert second == (b"/b", b"message")


@pytest.mark.no_cover
@given(st.lists(st.binary(max_size=40), max_size=6), st.lists(st.integers(1, 30), min_size=1))
def test_messages_arrive_in_any_pieces(messages: list[bytes], sizes: list[int]) -> None:
    pair = Pair()
    pair.respond()
    rest = b"".join(map(framed, messages))
    found = pair.items()
    turn = 0
    while rest:
        size = sizes[turn % len(sizes)]
        turn += 1
        pair.server.send_data(1, rest[:size], end=False)
        rest = rest[size:]
        found += pair.items()
    assert found == [(b"/a", message) for message in messages]
    assert not pair.calls.partial


def test_a_part_of_a_message_is_partial() -> None:
    pair = Pair()
    pair.respond(framed(b"message")[:7])
    assert pair.items() == []
    assert pair.calls.partial
    pair.server.send_data(1, framed(b"message")[7:], end=False)
    assert pair.items() == [(b"/a", b"message")]
    assert not pair.calls.partial


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (framed(b"x", 1), "a message is compressed, although the request does not allow that"),
        (framed(b"x", 2), "a message begins with the byte 2, not 0 or 1"),
        (framed(bytes(LIMIT + 1)), "a message has 1001 bytes, and the limit is 1000"),
        (b"\0\xff\xff\xff\xff", "a message has 4294967295 bytes, and the limit is 1000"),
    ],
)
def test_a_message_that_is_not_allowed_ends_the_call(data: bytes, words: str) -> None:
    pair = Pair()
    pair.respond(data)
    assert pair.end() == (None, words)
    # The server is told, and what it still sends is dropped.
    pair.server.send_data(1, framed(b"later"), end=False)
    assert pair.items() == []


def test_a_message_of_exactly_the_limit_is_read() -> None:
    pair = Pair()
    pair.respond(framed(bytes(LIMIT)))
    assert pair.items() == [(b"/a", bytes(LIMIT))]


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (
            ResponseHead(404, Headers([(b"content-type", b"text/html")])),
            "the answer is not gRPC: HTTP status 404, content-type 'text/html'",
        ),
        (ResponseHead(200), "the answer is not gRPC: HTTP status 200, content-type ''"),
    ],
)
def test_an_answer_that_is_not_grpc_ends_the_call(head: ResponseHead, words: str) -> None:
    pair = Pair()
    pair.server.send_response(1, head, end=False)
    assert pair.end() == (None, words)


@pytest.mark.parametrize("status", [b"", b"x", b"-1", b"1000"])
def test_a_status_that_is_no_number_is_named(status: bytes) -> None:
    pair = Pair()
    pair.respond()
    pair.server.send_trailers(1, Headers([(b"grpc-status", status)]))
    assert pair.end() == (None, "the call ended without a valid status")


def test_an_unknown_status_is_shown_as_a_number() -> None:
    assert str(CallEnded("words", 99)) == "status 99: words"


def test_an_end_without_trailers_is_named() -> None:
    pair = Pair()
    pair.respond()
    pair.server.send_data(1, b"", end=True)
    assert pair.end() == (None, "the stream ended without a status")


def test_a_reset_is_named() -> None:
    pair = Pair()
    pair.server.reset(1, Code.REFUSED_STREAM)
    assert "the stream was reset (" in pair.end()[1]


def test_a_goaway_ends_the_calls_that_the_server_does_not_take() -> None:
    calls = GrpcStreams((b"/a", b"/b"), [], LIMIT)
    server = Http2Connection(Role.SERVER, Http2Limits())
    server.go_away()
    words = "the server does not accept the call (GOAWAY)"
    ended = calls.receive(server.data_to_send(), 0.0)
    assert [(path, str(how)) for path, how in ended] == [(b"/a", words), (b"/b", words)]


def test_an_informational_answer_is_skipped() -> None:
    pair = Pair()
    pair.server.send_response(1, ResponseHead(103), end=False)
    assert pair.items() == []


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the connection ended without a status"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "the server speaks HTTP/1, not HTTP/2"),
        (bytes(100), "the first frame is not SETTINGS"),
    ],
)
def test_what_is_not_http2_ends_the_connection(data: bytes, words: str) -> None:
    with pytest.raises(CallEnded, match=words):
        GrpcStreams((b"/a",), [], LIMIT).receive(data, 0.0)


@pytest.mark.no_cover
@given(st.binary(max_size=200))
def test_any_body_gives_messages_or_ends_the_call(data: bytes) -> None:
    pair = Pair()
    pair.respond(data)
    items = pair.items()
    size = sum(len(item) + 5 for _, item in items if isinstance(item, bytes))
    assert size <= len(data)
    ends = [item for _, item in items if isinstance(item, CallEnded)]
    assert len(ends) <= 1
