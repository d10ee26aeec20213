"""One HTTP/1 connection in either role. The events of a stream do not depend on how it is cut. Any
bytes give events or a ProtocolError and nothing else. h11 reads what we write as the same
messages."""

from __future__ import annotations

import random
from dataclasses import dataclass

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.wire.h1.body import ChunkedReader, Framing, Length, WriteError
from proxy.wire.h1.connection import At, Http1Connection, Role
from proxy.wire.messages import (
    END,
    EndOfMessage,
    Field,
    Headers,
    Limits,
    ProtocolError,
    RequestHead,
    ResponseHead,
    Signal,
)
from tests.kit.chunkings import byte_by_byte, cut, every_way, halves
from tests.kit.drawn import Choices, drawn
from tests.wire.corpus import REQUESTS, RESPONSES, head, spoil

LIMITS = Limits(head=2048, target=256, fields=24)
Event = RequestHead | ResponseHead | bytes | EndOfMessage | str
OK = ResponseHead(200, Headers([(b"Content-Length", b"0")]), b"OK")


def server() -> Http1Connection:
    return Http1Connection(Role.SERVER, LIMITS)


def client(method: bytes = b"GET") -> Http1Connection:
    connection = Http1Connection(Role.CLIENT, LIMITS)
    connection.send_request(RequestHead(method, b"/", Headers([(b"Host", b"a")])), 0)
    connection.send_end(END)
    return connection


def step(connection: Http1Connection, role: Role) -> Event | Signal:
    """One event; a cycle ends with a response without a body."""
    if connection.reading is At.HEAD:
        return connection.next_request() if role is Role.SERVER else connection.next_response()
    return connection.next_body()


def answer(connection: Http1Connection) -> bool:
    """End the exchange on a server; True if there may be another one."""
    connection.send_response(OK, 0)
    connection.send_end(END)
    if not connection.reusable:
        return False
    connection.next_cycle()
    return True


def events(role: Role, pieces: list[bytes], method: bytes = b"GET") -> list[Event]:
    """All events of the pieces and the end after them; adjacent pieces of a body are joined."""
    connection = server() if role is Role.SERVER else client(method)
    found: list[Event] = []
    for piece in [*pieces, b""]:
        connection.receive_data(piece)
        assert connection.buffered <= LIMITS.head + len(piece)
        while True:
            if connection.reading is At.TUNNEL:
                found.append(connection.take_rest())
                break
            try:
                event = step(connection, role)
            except ProtocolError as error:
                return [*merged(found), f"refused with {error.status}"]
            if event is Signal.NEED_DATA:
                assert piece, "needs more data after the end"
                break
            if event is Signal.CLOSED:
                return [*merged(found), "closed"]
            assert not isinstance(event, Signal)
            found.append(event)
            if isinstance(event, EndOfMessage) and (role is Role.CLIENT or not answer(connection)):
                return [*merged(found), "done"]
    return merged(found)


def merged(found: list[Event]) -> list[Event]:
    out: list[Event] = []
    for event in found:
        if isinstance(event, bytes) and out and isinstance(out[-1], bytes):
            out[-1] += event
        else:
            out.append(event)
    return out


def req(
    method: bytes = b"GET", target: bytes = b"/", *headers: Field, version: bytes = b"1.1"
) -> RequestHead:
    return RequestHead(method, target, Headers([(b"Host", b"a"), *headers]), version)


# Requests, seen by a server...

PIPELINE = (
    head("POST /1 HTTP/1.1", "Host: a", "Content-Length: 5") + b"hello" + head("GET /2 HTTP/1.1", "Host: a") + b"\r\n"
    + head("PUT /3 HTTP/1.1", "Host: a", "Transfer-Encoding: chunked") + b"3\r\nabc\r\n0\r\nX: y\r\n\r\n"
    + head("GET /4 HTTP/1.1", "Host: a", "Connection: close") + head("GET /5 HTTP/1.1", "Host: a")
)  # fmt: skip


def test_requests_in_a_row_are_read_one_after_the_other_until_one_says_close() -> None:
    assert every_way(PIPELINE, lambda pieces: events(Role.SERVER, pieces)) == [
        req(b"POST", b"/1", (b"Content-Length", b"5")), b"hello", END,
        req(b"GET", b"/2"), END,
        req(b"PUT", b"/3", (b"Transfer-Encoding", b"chunked")), b"abc", EndOfMessage(Headers([(b"X", b"y")])),
        req(b"GET", b"/4", (b"Connection", b"close")), END,
        "done",
    ]  # fmt: skip


def test_requests_that_came_before_the_end_of_the_connection_are_all_read() -> None:
    data = head("GET /1 HTTP/1.1", "Host: a") * 3
    connection = server()
    connection.receive_data(data)
    connection.receive_data(b"")
    for more in (True, True, False):
        assert connection.next_request() == req(target=b"/1")
        assert connection.next_body() is END
        assert answer(connection) is more


@pytest.mark.parametrize(("lines", "goes_on"), [
    (["GET / HTTP/1.1", "Host: a"], True),
    (["GET / HTTP/1.1", "Host: a", "Connection: keep-alive"], True),
    (["GET / HTTP/1.1", "Host: a", "Connection: Close"], False),
    (["GET / HTTP/1.1", "Host: a", "Connection: x, close"], False),
    (["GET / HTTP/1.1", "Host: a", "Connection: keep-alive", "Connection: close"], False),
    (["GET / HTTP/1.0", "Host: a"], False),
    (["GET / HTTP/1.0"], False),
    (["GET / HTTP/1.0", "Connection: Keep-Alive"], True),
    (["GET / HTTP/1.0", "Connection: keep-alive, close"], False),
])  # fmt: skip
def test_a_request_tells_whether_the_connection_persists(lines: list[str], goes_on: bool) -> None:
    connection = server()
    connection.receive_data(head(*lines))
    request = connection.next_request()
    assert isinstance(request, RequestHead)
    assert connection.peer_version == request.version == (b"1.0" if "1.0" in lines[0] else b"1.1")
    assert connection.next_body() is END
    assert answer(connection) is goes_on


def test_an_answer_until_the_end_of_the_connection_is_the_last_one() -> None:
    connection = server()
    connection.receive_data(head("GET / HTTP/1.1", "Host: a"))
    connection.next_request()
    connection.next_body()
    connection.send_response(ResponseHead(200), Framing.CLOSE)
    connection.send_end(END)
    assert not connection.reusable


def test_an_early_answer_does_not_end_the_request() -> None:
    connection = server()
    connection.receive_data(head("POST / HTTP/1.1", "Host: a", "Content-Length: 5") + b"he")
    assert isinstance(connection.next_request(), RequestHead)
    assert not answer(connection)
    assert connection.writing is At.DONE
    assert connection.next_body() == b"he"
    assert connection.next_body() is Signal.NEED_DATA
    connection.receive_data(b"llo")
    assert connection.next_body() == b"llo"
    assert connection.next_body() is END
    assert connection.reusable


def test_the_length_of_the_body_is_available() -> None:
    for lines, length in (
        (["Content-Length: 5"], 5),
        (["Transfer-Encoding: chunked"], Framing.CHUNKED),
        ([], 0),
    ):
        connection = server()
        connection.receive_data(head("POST / HTTP/1.1", "Host: a", *lines))
        connection.next_request()
        assert connection.body_length == length
    until_close = client()
    until_close.receive_data(head("HTTP/1.1 200 OK"))
    until_close.next_response()
    assert until_close.body_length is Framing.CLOSE


def test_only_heads_that_need_judgement_take_the_longer_way() -> None:
    connection = server()
    connection.receive_data(
        head("GET / HTTP/1.1", "Host: a") + head("GET / HTTP/1.1", "Host: a", "X: \xe9")
    )
    for declined in (0, 1):
        connection.next_request()
        assert connection.declined == declined
        connection.next_body()
        answer(connection)


def test_what_follows_connect_is_not_http_once_it_was_granted() -> None:
    data = head("CONNECT db:5432 HTTP/1.1", "Host: db:5432")
    for pieces in halves(data + b"\x00raw"):
        connection = server()
        rest = b""
        for piece in pieces:
            connection.receive_data(piece)
            if connection.reading is At.HEAD and isinstance(connection.next_request(), RequestHead):
                assert connection.next_body() is END
        connection.send_response(ResponseHead(200), 0)
        assert connection.writing is At.TUNNEL
        rest += connection.take_rest()
        assert rest == b"\x00raw"
        assert connection.buffered == 0
        assert not connection.reusable


def test_a_refused_connect_is_an_exchange_like_any_other() -> None:
    connection = server()
    connection.receive_data(head("CONNECT db:5432 HTTP/1.1", "Host: db:5432"))
    connection.next_request()
    connection.next_body()
    connection.send_response(ResponseHead(502), 0)
    connection.send_end(END)
    assert connection.reusable


def test_empty_lines_before_a_request_are_skipped_up_to_a_few() -> None:
    one = head("GET / HTTP/1.1", "Host: a")
    assert every_way(b"\r\n" * 4 + one, lambda p: events(Role.SERVER, p)) == [req(), END, "closed"]
    assert every_way((b"\r\n" * 3 + one) * 2, lambda p: events(Role.SERVER, p)) == [
        req(),
        END,
        req(),
        END,
        "closed",
    ]
    assert every_way(b"\r\n" * 5 + one, lambda p: events(Role.SERVER, p)) == ["refused with 400"]
    assert every_way(b"\r\n" * 1000, lambda p: events(Role.SERVER, p)) == ["refused with 400"]


@pytest.mark.parametrize(("data", "expected"), [
    (b"", ["closed"]),
    (b"\r\n", ["closed"]),
    (b"G", ["refused with 400"]),
    (head("GET / HTTP/1.1", "Host: a")[:-1], ["refused with 400"]),
    (head("POST / HTTP/1.1", "Host: a", "Content-Length: 5") + b"hell",
     [req(b"POST", b"/", (b"Content-Length", b"5")), b"hell", "refused with 400"]),
    (head("POST / HTTP/1.1", "Host: a", "Transfer-Encoding: chunked") + b"5\r\nhello\r\n",
     [req(b"POST", b"/", (b"Transfer-Encoding", b"chunked")), b"hello", "refused with 400"]),
])  # fmt: skip
def test_a_clean_end_of_the_connection_differs_from_a_truncated_request(
    data: bytes, expected: list[Event]
) -> None:
    assert every_way(data, lambda pieces: events(Role.SERVER, pieces)) == expected


# Responses, seen by a client...


def resp(
    status: int, *headers: Field, reason: bytes = b"OK", version: bytes = b"1.1"
) -> ResponseHead:
    return ResponseHead(status, Headers(headers), reason, version)


CL5: Field = (b"Content-Length", b"5")
TE: Field = (b"Transfer-Encoding", b"chunked")


@pytest.mark.parametrize(("method", "data", "expected"), [
    (b"GET", head("HTTP/1.1 200 OK", "Content-Length: 5") + b"hello", [resp(200, CL5), b"hello", END, "done"]),
    (b"HEAD", head("HTTP/1.1 200 OK", "Content-Length: 5"), [resp(200, CL5), END, "done"]),
    (b"HEAD", head("HTTP/1.1 200 OK", "Transfer-Encoding: chunked"), [resp(200, TE), END, "done"]),
    (b"HEAD", head("HTTP/1.1 200 OK"), [resp(200), END, "done"]),
    (b"GET", head("HTTP/1.1 204 OK"), [resp(204), END, "done"]),
    (b"GET", head("HTTP/1.1 204 OK", "Content-Length: 5"), [resp(204, CL5), END, "done"]),
    (b"GET", head("HTTP/1.1 304 OK", "Content-Length: 5"), [resp(304, CL5), END, "done"]),
    (b"GET", head("HTTP/1.1 304 OK", "Transfer-Encoding: chunked"), [resp(304, TE), END, "done"]),
    (b"GET", head("HTTP/1.1 200 OK", "Transfer-Encoding: chunked") + b"2\r\nab\r\n0\r\nX: y\r\n\r\n",
     [resp(200, TE), b"ab", EndOfMessage(Headers([(b"X", b"y")])), "done"]),
    (b"GET", head("HTTP/1.1 200 OK") + b"until the end", [resp(200), b"until the end", END, "done"]),
    (b"GET", head("HTTP/1.0 200 OK") + b"until the end", [resp(200, version=b"1.0"), b"until the end", END, "done"]),
    (b"GET", head("HTTP/1.1 200 OK"), [resp(200), END, "done"]),
    (b"POST", head("HTTP/1.1 100 ") + head("HTTP/1.1 103 ", "Link: x") + head("HTTP/1.1 200 OK", "Content-Length: 5") + b"hello",
     [resp(100, reason=b""), resp(103, (b"Link", b"x"), reason=b""), resp(200, CL5), b"hello", END, "done"]),
    (b"GET", head("HTTP/1.1 101 OK", "Upgrade: x", "Connection: upgrade") + b"raw\r\n\r\n",
     [resp(101, (b"Upgrade", b"x"), (b"Connection", b"upgrade")), b"raw\r\n\r\n"]),
    (b"CONNECT", head("HTTP/1.1 200 OK", "Content-Length: 5") + b"\x00raw", [resp(200, CL5), b"\x00raw"]),
    (b"CONNECT", head("HTTP/1.1 200 OK", "Transfer-Encoding: chunked") + b"\x00raw", [resp(200, TE), b"\x00raw"]),
    (b"CONNECT", head("HTTP/1.1 407 OK", "Content-Length: 5") + b"hello", [resp(407, CL5), b"hello", END, "done"]),
    (b"GET", b"", ["closed"]),
    (b"GET", head("HTTP/1.1 100 "), [resp(100, reason=b""), "closed"]),
    (b"GET", b"HTTP/1.1 200", ["refused with 400"]),
    (b"GET", head("HTTP/1.1 200 OK", "Content-Length: 5") + b"hell", [resp(200, CL5), b"hell", "refused with 400"]),
    (b"GET", head("HTTP/1.1 200 OK", "Transfer-Encoding: chunked") + b"5\r\nhello\r\n0\r\n", [resp(200, TE), b"hello", "refused with 400"]),
])  # fmt: skip
def test_a_response_is_read_however_it_comes(
    method: bytes, data: bytes, expected: list[Event]
) -> None:
    assert every_way(data, lambda pieces: events(Role.CLIENT, pieces, method)) == [
        e for e in expected if e != b""
    ]


@pytest.mark.parametrize(("data", "again"), [
    (head("HTTP/1.1 200 OK", "Content-Length: 0"), True),
    (head("HTTP/1.1 204 No Content"), True),
    (head("HTTP/1.1 200 OK", "Transfer-Encoding: chunked") + b"0\r\n\r\n", True),
    (head("HTTP/1.0 200 OK", "Content-Length: 0", "Connection: keep-alive"), True),
    (head("HTTP/1.0 200 OK", "Content-Length: 0"), False),
    (head("HTTP/1.1 200 OK", "Content-Length: 0", "Connection: close"), False),
    (head("HTTP/1.1 200 OK", "Content-Length: 0") + b"x", False),
    (head("HTTP/1.1 200 OK", "Content-Length: 0") * 2, False),
    (head("HTTP/1.1 204 No Content", "Content-Length: 5") + b"hello", False),
    (head("HTTP/1.1 304 Not Modified", "Transfer-Encoding: chunked") + b"0\r\n\r\n", False),
    (head("HTTP/1.1 200 OK", "Transfer-Encoding: chunked") + b"0\r\n\r\n\r\n", False),
])  # fmt: skip
def test_a_server_that_sent_more_than_its_response_is_not_used_again(
    data: bytes, again: bool
) -> None:
    connection = client()
    connection.receive_data(data)
    connection.next_response()
    assert connection.next_body() is END
    assert connection.reusable is again


def test_a_connection_that_ended_or_whose_request_is_not_all_sent_is_not_used_again() -> None:
    ended = client()
    ended.receive_data(head("HTTP/1.1 204 No Content"))
    ended.receive_data(b"")
    ended.next_response()
    ended.next_body()
    assert not ended.reusable
    early = Http1Connection(Role.CLIENT, LIMITS)
    early.send_request(req(b"POST", b"/", CL5), 5)
    early.send_data(b"he")
    early.receive_data(head("HTTP/1.1 413 Content Too Large", "Content-Length: 0"))
    assert isinstance(early.next_response(), ResponseHead)
    assert early.next_body() is END
    assert not early.reusable
    early.send_data(b"llo")
    early.send_end(END)
    assert early.reusable


def test_one_connection_serves_many_exchanges_and_keeps_nothing_of_them() -> None:
    connection = Http1Connection(Role.CLIENT, LIMITS)
    for method, body in ((b"GET", b"hello"), (b"HEAD", b""), (b"GET", b"world")) * 3:
        connection.send_request(req(method), 0)
        connection.send_end(END)
        connection.receive_data(head("HTTP/1.1 200 OK", "Content-Length: 5") + body)
        connection.next_response()
        assert (
            b"".join(
                iter(
                    lambda: data if isinstance(data := connection.next_body(), bytes) else b"", b""
                )
            )
            == body
        )
        assert connection.reusable
        connection.next_cycle()
        assert connection._buffer == b""


# Writing...


def written(
    connection: Http1Connection, first: bytes, pieces: list[bytes], end: EndOfMessage
) -> bytes:
    return (
        first
        + b"".join([connection.send_data(piece) for piece in pieces])
        + connection.send_end(end)
    )


@dataclass
class Message:
    head: RequestHead | ResponseHead
    length: Length
    pieces: list[bytes]
    end: EndOfMessage


NAMES = [b"X-A", b"accept", b"Digest", b"etag", b"X_b"]
TEXT = bytes(range(0x20, 0x7F))


def field(choices: Choices) -> Field:
    value = bytes(choices.of(TEXT) for _ in range(choices.below(9)))
    return choices.of(NAMES), value.strip()


def message(choices: Choices, role: Role) -> Message:
    """A valid request, or a valid response to a GET."""
    pieces = choices.some(3, lambda: choices.raw(1) + choices.binary(29))
    fields = choices.some(3, lambda: field(choices))
    trailers = choices.some(3, lambda: field(choices))
    in_chunks, size = choices.below(2) == 1, len(b"".join(pieces))
    length: Length = Framing.CHUNKED if in_chunks else size
    framing = TE if in_chunks else (b"Content-Length", b"%d" % size)
    end = EndOfMessage(Headers(trailers)) if in_chunks and trailers else END
    headers = Headers([framing, *fields])
    first: RequestHead | ResponseHead
    if role is Role.SERVER:
        headers.items.insert(choices.below(2), (b"Host", b"a"))
        first = RequestHead(choices.of([b"GET", b"POST", b"X"]), b"/x?y", headers)
    else:
        first = ResponseHead(choices.of([200, 404, 599]), headers, b"Some Reason")
    return Message(first, length, pieces, end)


def requests(choices: Choices) -> list[Message]:
    return [message(choices, Role.SERVER) for _ in range(1 + choices.below(4))]


def sent(message: Message) -> bytes:
    if isinstance(message.head, RequestHead):
        connection = Http1Connection(Role.CLIENT, LIMITS)
        return written(
            connection,
            connection.send_request(message.head, message.length),
            message.pieces,
            message.end,
        )
    connection = server()
    return written(
        connection,
        connection.send_response(message.head, message.length),
        message.pieces,
        message.end,
    )


@settings(max_examples=200, deadline=None)
@given(drawn(300, requests), st.lists(st.integers(0, 1000), max_size=8))
def test_any_row_of_requests_is_read_as_it_was_written(
    row: list[Message], places: list[int]
) -> None:
    expected: list[Event] = []
    for m in row:
        expected += [m.head, *([b"".join(m.pieces)] if m.pieces else []), m.end]
    data = b"".join(map(sent, row))
    assert events(Role.SERVER, cut(data, places)) == [*expected, "closed"]
    assert events(Role.SERVER, byte_by_byte(data)) == [*expected, "closed"]


@settings(max_examples=200, deadline=None)
@given(
    drawn(100, lambda choices: message(choices, Role.CLIENT)),
    st.lists(st.integers(0, 1000), max_size=8),
)
def test_any_response_is_read_as_it_was_written(m: Message, places: list[int]) -> None:
    expected = [m.head, *([b"".join(m.pieces)] if m.pieces else []), m.end, "done"]
    assert events(Role.CLIENT, cut(sent(m), places)) == expected
    assert events(Role.CLIENT, byte_by_byte(sent(m))) == expected


@settings(max_examples=200, deadline=None)
@given(drawn(100, lambda choices: message(choices, choices.of(list(Role)))))
def test_h11_reads_what_we_write(m: Message) -> None:
    is_request = isinstance(m.head, RequestHead)
    connection = h11.Connection(h11.SERVER if is_request else h11.CLIENT)
    if not is_request:
        connection.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
        connection.send(h11.EndOfMessage())
    connection.receive_data(sent(m))
    first = connection.next_event()
    assert isinstance(first, (h11.Request, h11.Response))
    assert first.headers.raw_items() == m.head.headers.items
    if isinstance(first, h11.Request):
        assert isinstance(m.head, RequestHead)
        assert (first.method, first.target) == (m.head.method, m.head.target)
    else:
        assert isinstance(m.head, ResponseHead)
        assert (first.status_code, first.reason) == (m.head.status, m.head.reason)
    body = b""
    while isinstance(event := connection.next_event(), h11.Data):
        body += event.data
    assert body == b"".join(m.pieces)
    assert isinstance(event, h11.EndOfMessage)
    assert event.headers.raw_items() == m.end.trailers.items


def test_an_informational_response_changes_nothing() -> None:
    seen = []
    connection = server()
    for status, reason in (
        (100, b"Continue"),
        (103, b"Early Hints"),
        (101, b"Switching Protocols"),
    ):
        assert connection.send_response(ResponseHead(status, reason=reason), 0) == head(
            f"HTTP/1.1 {status} {reason.decode()}"
        )
        seen.append(connection.writing)
    assert seen == [At.HEAD, At.HEAD, At.TUNNEL]


def test_a_body_of_another_length_than_announced_is_not_written() -> None:
    connection = server()
    connection.send_response(OK, 2)
    with pytest.raises(WriteError):
        connection.send_data(b"abc")
    with pytest.raises(WriteError):
        connection.send_end(END)


# Anything at all...


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(Role), st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=6))
def test_any_bytes_give_events_or_a_refusal(role: Role, data: bytes, places: list[int]) -> None:
    assert (
        events(role, cut(data, places))
        == events(role, byte_by_byte(data))
        == events(role, [data] if data else [])
    )


@pytest.mark.parametrize(("role", "corpus"), [(Role.SERVER, REQUESTS), (Role.CLIENT, RESPONSES)])
def test_spoiled_streams_give_events_or_a_refusal_and_the_same_however_they_come(
    role: Role, corpus: tuple[bytes, ...]
) -> None:
    source = random.Random(7)
    bodies = [b"", b"hello world!!", b"5\r\nhello\r\n0\r\n\r\n", b"0\r\nX: y\r\n\r\n"]
    seen = {"refused": 0, "read": 0}
    for _ in range(400):
        data = b"".join(
            spoil(source, source.choice(corpus)) + source.choice(bodies)
            for _ in range(source.randrange(1, 4))
        )
        whole = events(role, [data])
        assert events(role, byte_by_byte(data)) == whole, data
        assert events(role, cut(data, [source.randrange(len(data)) for _ in range(5)])) == whole, (
            data
        )
        seen["refused" if "refused" in str(whole[-1:]) else "read"] += 1
    assert min(seen.values()) > 20, seen


def test_what_is_held_stays_bounded_while_a_body_goes_by() -> None:
    connection = server()
    connection.receive_data(head("POST / HTTP/1.1", "Host: a", "Transfer-Encoding: chunked"))
    connection.next_request()
    piece = b"1000\r\n" + b"x" * 4096 + b"\r\n"
    for _ in range(500):
        connection.receive_data(piece)
        while connection.next_body() is not Signal.NEED_DATA:
            pass
        assert connection.buffered <= 2


def test_an_exchange_goes_on_where_another_driver_has_left_it() -> None:
    connection = server()
    connection.take_over(b"POST", (At.BODY, 3), (At.BODY, 2))
    connection.receive_data_if(b"")  # no end of the connection
    assert connection.next_body() is Signal.NEED_DATA
    connection.receive_data_if(b"llo")
    assert [connection.next_body(), connection.next_body(), connection.next_body()] == [
        b"llo",
        END,
        END,
    ]
    assert connection.send_data(b"OK") + connection.send_end(END) == b"OK"
    assert connection.reusable


def test_a_chunked_body_goes_on_in_the_middle_of_a_chunk() -> None:
    reader = ChunkedReader(100, 4)
    assert reader.read(b"5\r\nhe", 0) == (b"he", 5)
    connection = server()
    connection.take_over(b"POST", (At.BODY, reader), (At.HEAD, 0))
    connection.receive_data(b"llo\r\n0\r\n\r\n")
    assert [connection.next_body(), connection.next_body()] == [b"llo", END]
