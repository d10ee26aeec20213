"""Heads that two parsers could read differently are refused, with the status that names the fault:
whole, byte by byte, and as soon as it is certain.

Every known way to smuggle a request is a line in a table here."""

from __future__ import annotations

import re
from collections.abc import Callable

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.wire.h1.body import ChunkedReader
from proxy.wire.h1.connection import Http1Connection, Role
from proxy.wire.h1.fast_head import recognise_request, recognise_response
from proxy.wire.h1.strict_head import check_framing, decide_request, decide_response
from proxy.wire.h2.fields import NeverIndexedField, request_head, response_head, trailers
from proxy.wire.messages import Headers, Limits, ProtocolError, RequestHead, ResponseHead, Signal
from tests.kit.chunkings import byte_by_byte
from tests.kit.http2 import OK as OK2
from tests.kit.http2 import POST as POST2
from tests.wire.corpus import LINES, REQUESTS, RESPONSES, head, spoil

LIMITS = Limits(head=4096, target=256, fields=24)

GET, POST = "GET / HTTP/1.1", "POST / HTTP/1.1"
# All but NUL, LF and CR, which end lines for some parsers and are in the table below, and the tab,
# which is not a control character here.
CONTROLS = [*range(1, 9), *range(14, 32), 127]


def read(role: Role, pieces: list[bytes]) -> RequestHead | ResponseHead | Signal | int:
    """The head that a connection parses from the pieces, or the status of its refusal; CLOSED, if
    it ended with only empty lines."""
    connection = Http1Connection(role, LIMITS)
    for piece in [*pieces, b""]:
        connection.receive_data(piece)
        try:
            found = connection.next_request() if role is Role.SERVER else connection.next_response()
        except ProtocolError as error:
            return error.status
        if found is not Signal.NEED_DATA:
            return found
    raise AssertionError("neither a head nor a refusal")


REFUSED_REQUESTS = {
    # The length of the body, given twice, or in a way that parsers read differently (RFC 9112
    # §6.3).
    "two lengths": (head(POST, "Host: a", "Content-Length: 5", "Content-Length: 6"), 400),
    "one length twice": (head(POST, "Host: a", "Content-Length: 5", "Content-Length: 5"), 400),
    "one length twice, in other letters": (head(POST, "Host: a", "Content-Length: 5", "cONTENT-lENGTH: 5"), 400),
    "a list of equal lengths": (head(POST, "Host: a", "Content-Length: 5, 5"), 400),
    "a list of equal lengths without a blank": (head(POST, "Host: a", "Content-Length: 5,5"), 400),
    "a list of lengths": (head(POST, "Host: a", "Content-Length: 5, 6"), 400),
    "a length and nothing": (head(POST, "Host: a", "Content-Length: 5,"), 400),
    "an empty length": (head(POST, "Host: a", "Content-Length:"), 400),
    "a signed length": (head(POST, "Host: a", "Content-Length: +5"), 400),
    "a negative length": (head(POST, "Host: a", "Content-Length: -5"), 400),
    "a hexadecimal length": (head(POST, "Host: a", "Content-Length: 0x5"), 400),
    "a length with a separator": (head(POST, "Host: a", "Content-Length: 1_0"), 400),
    "a length with a point": (head(POST, "Host: a", "Content-Length: 5.0"), 400),
    "a quoted length": (head(POST, "Host: a", 'Content-Length: "5"'), 400),
    "a length with a blank inside": (head(POST, "Host: a", "Content-Length: 1 0"), 400),
    "a length in other digits": (head(POST, "Host: a", "Content-Length: \xb2"), 400),
    "a length beyond 64 bits": (head(POST, "Host: a", "Content-Length: 18446744073709551617"), 400),
    "a length beyond reason": (head(POST, "Host: a", "Content-Length: " + "9" * 200), 400),
    "a length and chunks": (head(POST, "Host: a", "Content-Length: 5", "Transfer-Encoding: chunked"), 400),
    "chunks and a length": (head(POST, "Host: a", "Transfer-Encoding: chunked", "Content-Length: 5"), 400),
    "chunks and a length of 0": (head(POST, "Host: a", "Transfer-Encoding: chunked", "Content-Length: 0"), 400),
    "chunks in HTTP/1.0": (head("POST / HTTP/1.0", "Host: a", "Transfer-Encoding: chunked"), 400),
    # Codings (RFC 9112 §6.1, §6.3): without an end of the body, or with an unknown coding below one
    # with an end.
    "another coding": (head(POST, "Host: a", "Transfer-Encoding: gzip"), 400),
    "another coding below chunks": (head(POST, "Host: a", "Transfer-Encoding: gzip, chunked"), 501),
    "another coding below chunks, in two lines": (head(POST, "Host: a", "Transfer-Encoding: gzip", "Transfer-Encoding: Chunked"), 501),
    "a coding with a parameter below chunks": (head(POST, "Host: a", "Transfer-Encoding: x;y=z, chunked"), 501),
    "no coding below chunks": (head(POST, "Host: a", "Transfer-Encoding: g zip, chunked"), 400),
    "chunks below another coding": (head(POST, "Host: a", "Transfer-Encoding: chunked, identity"), 400),
    "chunks twice": (head(POST, "Host: a", "Transfer-Encoding: chunked", "Transfer-Encoding: chunked"), 400),
    "chunks twice in a list": (head(POST, "Host: a", "Transfer-Encoding: chunked, chunked"), 400),
    "two codings in two lines": (head(POST, "Host: a", "Transfer-Encoding: chunked", "Transfer-Encoding: identity"), 400),
    "no coding": (head(POST, "Host: a", "Transfer-Encoding:"), 400),
    "almost chunks": (head(POST, "Host: a", "Transfer-Encoding: xchunked"), 400),
    "quoted chunks": (head(POST, "Host: a", 'Transfer-Encoding: "chunked"'), 400),
    "chunks behind a comma": (head(POST, "Host: a", "Transfer-Encoding: ,chunked"), 400),
    "chunks with a parameter": (head(POST, "Host: a", "Transfer-Encoding: chunked;q=1"), 400),
    "chunks behind a control character": (head(POST, "Host: a", "Transfer-Encoding: \x01chunked"), 400),
    "chunks behind a vertical tab": (head(POST, "Host: a", "Transfer-Encoding: \x0bchunked"), 400),
    "chunks behind a form feed": (head(POST, "Host: a", "Transfer-Encoding:\x0cchunked"), 400),
    # White space where there may be none (RFC 9112 §5.1, §5.2).
    "a blank before the colon": (head(POST, "Host: a", "Transfer-Encoding : chunked"), 400),
    "a tab before the colon": (head(POST, "Host: a", "Content-Length\t: 5"), 400),
    "a vertical tab before the colon": (head(POST, "Host: a", "Content-Length\x0b: 5"), 400),
    "a blank in a name": (head(POST, "Host: a", "Content Length: 5"), 400),
    "a folded line": (head(POST, "Host: a", "X: y", " z"), 400),
    "a line folded by a tab": (head(POST, "Host: a", "Transfer-Encoding:", "\tchunked"), 400),
    "a folded first line": (head(POST, " Host: a"), 400),
    "a blank line that is not empty": (POST.encode() + b"\r\nHost: a\r\n \r\n\r\n", 400),
    "a blank before the request line": (b" " + head(GET, "Host: a"), 400),
    # Line ends (RFC 9112 §2.2).
    "a bare LF": (head(GET, "Host: a", "X: y\nContent-Length: 5"), 400),
    "a bare LF behind the request line": (b"GET / HTTP/1.1\nHost: a\r\n\r\n", 400),
    "bare LFs only": (b"GET / HTTP/1.1\nHost: a\n\n", 400),
    "a bare LF as the empty line": (b"GET / HTTP/1.1\r\nHost: a\r\n\n", 400),
    "a bare CR": (head(GET, "Host: a", "X: y\rContent-Length: 5"), 400),
    "a doubled CR": (b"GET / HTTP/1.1\r\nHost: a\r\r\n\r\n", 400),
    "a CR in a name": (head(GET, "Host: a", "X\r: y"), 400),
    "a NUL in a value": (head(GET, "Host: a", "X: \x00y"), 400),
    "a NUL in a name": (head(GET, "Host: a", "Content-Length\x00: 5"), 400),
    "a NUL in the target": (head("GET /\x00 HTTP/1.1", "Host: a"), 400),
    # Lines that are not fields.
    "a line without a colon": (head(GET, "Host: a", "Content-Length"), 400),
    "a line without a name": (head(GET, "Host: a", ": 5"), 400),
    "a name that is no token": (head(GET, "Host: a", "X(y): z"), 400),
    "a name outside ASCII": (head(GET, "Host: a", "X-\xe9: z"), 400),
    "a form feed in a value": (head(GET, "Host: a", "X: a\x0cb"), 400),
    **{f"control character {code:#04x} in a value": (head(GET, "Host: a", f"X: a{chr(code)}b"), 400) for code in CONTROLS},
    "a control character at the end of a value": (head(GET, "Host: a", "X: a\x1f"), 400),
    "a control character in a Host": (head(GET, "Host: a\x7f"), 400),
    # Request lines.
    "HTTP/0.9": (b"GET /\r\n\r\n", 400),
    "no version": (head("GET / ", "Host: a"), 400),
    "HTTP/2.0": (head("GET / HTTP/2.0", "Host: a"), 505),
    "HTTP/1.2": (head("GET / HTTP/1.2", "Host: a"), 505),
    "HTTP/0.9 in words": (head("GET / HTTP/0.9", "Host: a"), 505),
    "HTTP/3": (head("GET / HTTP/3", "Host: a"), 400),
    "HTTP/11": (head("GET / HTTP/11", "Host: a"), 400),
    "HTTP/1.10": (head("GET / HTTP/1.10", "Host: a"), 400),
    "http/1.1": (head("GET / http/1.1", "Host: a"), 400),
    "two blanks": (head("GET  / HTTP/1.1", "Host: a"), 400),
    "a tab for a blank": (head("GET\t/ HTTP/1.1", "Host: a"), 400),
    "a blank in the target": (head("GET /a b HTTP/1.1", "Host: a"), 400),
    "a blank behind the version": (head("GET / HTTP/1.1 ", "Host: a"), 400),
    "a target outside ASCII": (head("GET /\xe9 HTTP/1.1", "Host: a"), 400),
    "a target in UTF-8": (head("GET /\xc3\xbc HTTP/1.1", "Host: a"), 400),
    "a target with DEL": (head("GET /\x7f HTTP/1.1", "Host: a"), 400),
    "a fragment": (head("GET /a#b HTTP/1.1", "Host: a"), 400),
    "a fragment behind a query": (head("GET /a?b#c HTTP/1.1", "Host: a"), 400),
    "an empty fragment": (head("GET /# HTTP/1.1", "Host: a"), 400),
    "a fragment of an absolute target": (head("GET http://a/#b HTTP/1.1", "Host: a"), 400),
    "a fragment instead of a path": (head("GET http://a#@b/ HTTP/1.1", "Host: a"), 400),
    "a method that is no token": (head("G@T / HTTP/1.1", "Host: a"), 400),
    "no method": (head(" / HTTP/1.1", "Host: a"), 400),
    "no request at all": (b"\r\n" * 6 + head(GET, "Host: a"), 400),
    # The authority (RFC 9112 §3.2).
    "no Host": (head(GET), 400),
    "two Hosts": (head(GET, "Host: a", "Host: b"), 400),
    "one Host twice": (head(GET, "Host: a", "Host: a"), 400),
    "two Hosts in HTTP/1.0": (head("GET / HTTP/1.0", "Host: a", "host: b"), 400),
    "a list of Hosts": (head(GET, "Host: a, b"), 400),
    "a Host with a blank": (head(GET, "Host: a b"), 400),
    "a Host with user information": (head(GET, "Host: a@b"), 400),
    "a Host with a path": (head(GET, "Host: a/b"), 400),
    "a Host with a backslash": (head(GET, "Host: a\\b"), 400),
    "a Host with a port in words": (head(GET, "Host: a:http"), 400),
    "a Host with two ports": (head(GET, "Host: a:80:81"), 400),
    "a Host outside ASCII": (head(GET, "Host: \xe9"), 400),
    "a relative target": (head("GET a HTTP/1.1", "Host: a"), 400),
    "a target of an authority": (head("GET a:80 HTTP/1.1", "Host: a"), 400),
    "a star for a GET": (head("GET * HTTP/1.1", "Host: a"), 400),
    "a star and more": (head("OPTIONS *x HTTP/1.1", "Host: a"), 400),
    "an absolute target without a host": (head("GET http:///x HTTP/1.1", "Host: a"), 400),
    "an absolute target with a port only": (head("GET http://:80/x HTTP/1.1", "Host: a"), 400),
    "an absolute target without a scheme": (head("GET ://a/x HTTP/1.1", "Host: a"), 400),
    "an absolute target with user information": (head("GET http://a@b/ HTTP/1.1", "Host: b"), 400),
    "an absolute target with a backslash": (head("GET http://a\\@b/ HTTP/1.1", "Host: b"), 400),
    "CONNECT without a port": (head("CONNECT a HTTP/1.1", "Host: a"), 400),
    "CONNECT without a host": (head("CONNECT :80 HTTP/1.1", "Host: a"), 400),
    "CONNECT to a path": (head("CONNECT / HTTP/1.1", "Host: a"), 400),
    "CONNECT to a URI": (head("CONNECT http://a:80/ HTTP/1.1", "Host: a"), 400),
    "CONNECT with user information": (head("CONNECT u@a:80 HTTP/1.1", "Host: a"), 400),
    "CONNECT to an open bracket": (head("CONNECT [::1:80 HTTP/1.1", "Host: a"), 400),
    "CONNECT to a port beyond ports": (head("CONNECT a:123456 HTTP/1.1", "Host: a"), 400),
    "CONNECT with a body": (head("CONNECT a:80 HTTP/1.1", "Host: a", "Content-Length: 5"), 400),
    "CONNECT with chunks": (head("CONNECT a:80 HTTP/1.1", "Host: a", "Transfer-Encoding: chunked"), 400),
    # Too much of it.
    "a long target": (head("GET /" + "x" * 256 + " HTTP/1.1", "Host: a"), 414),
    "a long target that is a URI": (head("GET http://a/" + "x" * 256 + " HTTP/1.1", "Host: a"), 414),
    "a target that does not end": (b"GET /" + b"x" * 5000, 414),
    "a long field": (head(GET, "Host: a", "X: " + "y" * 4096), 431),
    "a field that does not end": (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 5000, 431),
    "a method that does not end": (b"G" * 5000, 431),
    "many fields": (head(GET, "Host: a", *["X: y"] * 24), 431),
    "many long fields": (head(GET, "Host: a", *["X: " + "y" * 300] * 20), 431),
}  # fmt: skip

REFUSED_RESPONSES = {
    "two lengths": head("HTTP/1.1 200 OK", "Content-Length: 5", "Content-Length: 6"),
    "one length twice": head("HTTP/1.1 200 OK", "Content-Length: 5", "Content-Length: 5"),
    "a list of equal lengths": head("HTTP/1.1 200 OK", "Content-Length: 5,5"),
    "a length and chunks": head(
        "HTTP/1.1 200 OK", "Content-Length: 5", "Transfer-Encoding: chunked"
    ),
    "another coding": head("HTTP/1.1 200 OK", "Transfer-Encoding: gzip, chunked"),
    "chunks in HTTP/1.0": head("HTTP/1.0 200 OK", "Transfer-Encoding: chunked"),
    "a folded line": head("HTTP/1.1 200 OK", "X: y", " z", "Content-Length: 0"),
    "a bare LF": head("HTTP/1.1 200 OK", "X: y\nSet-Cookie: a=b", "Content-Length: 0"),
    "a bare CR": head("HTTP/1.1 200 OK", "X: y\rSet-Cookie: a=b", "Content-Length: 0"),
    "a NUL": head("HTTP/1.1 200 OK", "X: \x00", "Content-Length: 0"),
    "a NUL in the reason": head("HTTP/1.1 200 \x00", "Content-Length: 0"),
    "a blank within a name": head("HTTP/1.1 200 OK", "Content Length : 0"),
    "a control character in a value": head("HTTP/1.1 200 OK", "X: a\x01b", "Content-Length: 0"),
    "DEL in a value": head("HTTP/1.1 200 OK", "X: a\x7fb", "Content-Length: 0"),
    "a control character in the reason": head("HTTP/1.1 200 O\x1bK", "Content-Length: 0"),
    "a length twice, once with a blank before the colon": head(
        "HTTP/1.1 200 OK", "Content-Length : 5", "Content-Length: 5"
    ),
    "a length, and chunks with a blank before the colon": head(
        "HTTP/1.1 200 OK", "Content-Length: 5", "Transfer-Encoding : chunked"
    ),
    "a line without a colon": head("HTTP/1.1 200 OK", "Content-Length"),
    "HTTP/2.0": head("HTTP/2.0 200 OK", "Content-Length: 0"),
    "no version": head("200 OK", "Content-Length: 0"),
    "a status of two digits": head("HTTP/1.1 20 OK", "Content-Length: 0"),
    "a status of four digits": head("HTTP/1.1 2000 OK", "Content-Length: 0"),
    "a status below 100": head("HTTP/1.1 099 OK", "Content-Length: 0"),
    "a signed status": head("HTTP/1.1 +20 OK", "Content-Length: 0"),
    "a request": head("GET / HTTP/1.1", "Host: a"),
    "an empty line before it": b"\r\n" + head("HTTP/1.1 200 OK", "Content-Length: 0"),
    "many fields": head("HTTP/1.1 200 OK", "Content-Length: 0", *["X: y"] * 24),
    "a field that does not end": b"HTTP/1.1 200 OK\r\nX: " + b"y" * 5000,
}


@pytest.mark.parametrize(("data", "status"), REFUSED_REQUESTS.values(), ids=REFUSED_REQUESTS)
def test_a_bad_request_is_refused_however_it_comes(data: bytes, status: int) -> None:
    assert recognise_request(data, LIMITS) is None
    assert read(Role.SERVER, [data]) == status
    assert read(Role.SERVER, byte_by_byte(data)) == status


@pytest.mark.parametrize("data", REFUSED_RESPONSES.values(), ids=REFUSED_RESPONSES)
def test_a_bad_response_is_refused_however_it_comes(data: bytes) -> None:
    assert recognise_response(data, LIMITS) is None
    assert isinstance(read(Role.CLIENT, [data]), int)
    assert isinstance(read(Role.CLIENT, byte_by_byte(data)), int)


WORDS = {
    head("GET /"): "the request line must be `method target version`; it has 1 spaces",
    head("G@T / HTTP/1.1"): "the method in the request line is missing or has invalid characters",
    head("GET /\xe9 HTTP/1.1"): "the target in the request line is missing, or must be percent-encoded",
    head("GET / HTTP/11"): "the request line does not end with a version such as HTTP/1.1",
    head(GET, "Host: a", "Length"): "line 3 of the head is not a field: it has no colon",
    head(GET, "Host: a", ": x"): "line 3 of the head is a field without a name",
    head(GET, "Host: a", "X: y", "(x): y"): "the name of the field in line 4 of the head has invalid characters",
    head(GET, "Host: a", "X-Y: a\x0cb"): "the value of the field X-Y, in line 3 of the head, has control characters",
    head(GET, "Host: a", "X-Y: a\x1bb"): "the value of the field X-Y, in line 3 of the head, has control characters",
    head("GET /a#b HTTP/1.1", "Host: a"): "the target in the request line has a fragment (#), which a client must not send",
    head("HTTP/1.1 200 O\x7fK"): "the reason phrase in the status line has control characters",
    head(GET, "X" * 99 + ": \x0c"): "the value of the field " + "X" * 40 + ", in line 2 of the head, has control characters",
    head(GET): "the head has no Host field: it must have one",
    head("GET / HTTP/1.0", "Host: a", "Host: b"): "the head has 2 Host fields: it must have one",
    head(POST, "Host: a", "Content-Length: x"): "a Content-Length that is not a number, or is too large",
    head(POST, "Host: a", "Content-Length: 5, 6"): "more than one Content-Length",
    head(POST, "Host: a", "Transfer-Encoding: gzip, chunked"): "a transfer coding other than chunked",
    head(POST, "Host: a", "Transfer-Encoding: gzip"):
        "Transfer-Encoding does not end with chunked, so the body has no known end",
    head("HTTP/1.1 20 OK"): "the status is not a number from 100 to 999",
    head("HTTP/1.1 200 \x0c"): "the reason phrase in the status line has control characters",
    head("ICY 200 OK"): "the status line does not begin with a version such as HTTP/1.1",
}  # fmt: skip


@pytest.mark.parametrize(("data", "words"), WORDS.items(), ids=WORDS.values())
def test_a_refusal_describes_what_is_wrong_and_where(data: bytes, words: str) -> None:
    decide = decide_response if "status" in words else decide_request
    with pytest.raises(ProtocolError) as refusal:
        decide(data, LIMITS)
    assert str(refusal.value) == words


@pytest.mark.parametrize(
    "data", [*(data for data, _ in REFUSED_REQUESTS.values()), *REFUSED_RESPONSES.values()]
)
def test_no_refusal_repeats_what_was_sent_or_has_a_message_of_a_library(data: bytes) -> None:
    for decide in (decide_request, decide_response):
        words = ""
        try:
            decide(data, LIMITS)
        except ProtocolError as refusal:
            words = str(refusal)
        assert not re.search(r"bytearray|b'|llegal|cannot be parsed|\\x", words), words


@pytest.mark.parametrize(("data", "refused_at"), [
    (b"GET / HTTP/1.1\nHost: a", b"GET / HTTP/1.1\n"),
    (b"GET / HTTP/1.1\r\nHost: a\n\r\nrest", b"GET / HTTP/1.1\r\nHost: a\n"),
    (b"GET / HTTP/1.1\r\nHost: a\rX: y", b"GET / HTTP/1.1\r\nHost: a\rX"),
    (b"GET / HTTP/1.1\r\nHost: a\r\n folded", b"GET / HTTP/1.1\r\nHost: a\r\n "),
    (b"GET / HTTP/1.1\r\nHost: \x00", b"GET / HTTP/1.1\r\nHost: \x00"),
    (b"GET / HTTP/1.1\r\nHost : a\r\nX: y", b"GET / HTTP/1.1\r\nHost : a\r\n"),
    (b"GET / HTTP/1.1\r\nHost\r\nX: y", b"GET / HTTP/1.1\r\nHost\r\n"),
    (b"GET / HTTP/1.1\r\n(x): y\r\nX: y", b"GET / HTTP/1.1\r\n(x): y\r\n"),
    (b"GET /\r\nHost: a\r\n", b"GET /\r\n"),
    (b"EHLO mail.example.org\r\nMAIL FROM:<a>\r\n", b"EHLO mail.example.org\r\n"),
    (b"\r\n\r\n\r\n\r\n\r\nGET /", b"\r\n\r\n\r\n\r\n\r\n"),
])  # fmt: skip
def test_a_bad_request_is_refused_as_soon_as_it_is_certain(data: bytes, refused_at: bytes) -> None:
    connection = Http1Connection(Role.SERVER, LIMITS)
    for piece in byte_by_byte(refused_at[:-1]):
        connection.receive_data(piece)
        assert connection.next_request() is Signal.NEED_DATA
    assert data.startswith(refused_at)
    connection.receive_data(refused_at[-1:])
    with pytest.raises(ProtocolError):
        connection.next_request()


def test_two_lengths_are_refused_also_by_the_fields_alone() -> None:
    """The lines are checked before; this is the second check of what must not be missed."""
    with pytest.raises(ProtocolError, match="more than one Content-Length"):
        check_framing(Headers([(b"Content-Length", b"5")] * 2), b"1.1")


def test_a_head_over_its_limit_is_refused_before_it_is_complete() -> None:
    for start, status in ((b"GET /", 414), (b"GET / HTTP/1.1\r\nX: ", 431), (b"G", 431)):
        connection = Http1Connection(Role.SERVER, LIMITS)
        connection.receive_data(start)
        while connection.buffered <= (LIMITS.target + 4 if status == 414 else LIMITS.head):
            assert connection.next_request() is Signal.NEED_DATA
            connection.receive_data(b"x")
        with pytest.raises(ProtocolError) as refusal:
            connection.next_request()
        assert refusal.value.status == status


@pytest.mark.parametrize(("data", "authority"), [
    (head("GET / HTTP/1.0"), None),
    (head("GET / HTTP/1.0", "Host: a"), b"a"),
    (head(GET, "Host:"), b""),
    (head(GET, "Host: a:"), b"a:"),
    (head(GET, "Host: web_1.shop:8080"), b"web_1.shop:8080"),
    (head(GET, "Host: [fe80::1%25eth0]:80"), b"[fe80::1%25eth0]:80"),
    (head(GET, "host:a"), b"a"),
    (head("GET http://b:81/x HTTP/1.1", "Host: a"), b"b:81"),
    (head("GET HTTPS://b HTTP/1.1", "Host: b"), b"b"),
    (head("GET http://b?http://c/@d HTTP/1.1", "Host: b"), b"b"),
    (head("GET http://[::1]:80/ HTTP/1.1", "Host: [::1]:80"), b"[::1]:80"),
    (head("OPTIONS * HTTP/1.1", "Host: a"), b"a"),
    (head("CONNECT a:80 HTTP/1.1", "Host: b"), b"a:80"),
    (head("CONNECT [::1]:80 HTTP/1.1", "Host: b", "Content-Length: 0"), b"[::1]:80"),
    (head("CONNECT 10.0.0.1:443 HTTP/1.0"), b"10.0.0.1:443"),
    (head("GET //x/y HTTP/1.1", "Host: a"), b"a"),
    (b"\r\n\r\n" + head(GET, "Host: a"), b"a"),
])  # fmt: skip
def test_a_good_request_has_an_authority(data: bytes, authority: bytes | None) -> None:
    whole = read(Role.SERVER, [data])
    assert isinstance(whole, RequestHead)
    assert whole.authority == authority
    assert read(Role.SERVER, byte_by_byte(data)) == whole


@pytest.mark.parametrize(
    "data",
    [
        *REQUESTS,
        head(POST, "Host: a", "X: \xe9 \t\xff"),
        head(POST, "Host: a", "X:", "Content-Length:\t7 "),
    ],
)
def test_a_good_request_is_read_as_h11_reads_it(data: bytes) -> None:
    found = read(Role.SERVER, byte_by_byte(data))
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(data)
    theirs = connection.next_event()
    assert isinstance(theirs, h11.Request)
    assert isinstance(found, RequestHead)
    assert (found.method, found.target, found.version) == (
        theirs.method,
        theirs.target,
        theirs.http_version,
    )
    assert found.headers.items == theirs.headers.raw_items()


@pytest.mark.parametrize("data", RESPONSES)
def test_a_good_response_is_read_byte_by_byte(data: bytes) -> None:
    found = read(Role.CLIENT, byte_by_byte(data))
    assert isinstance(found, ResponseHead)
    assert found == read(Role.CLIENT, [data]) == decide_response(data, LIMITS)


@pytest.mark.parametrize(
    ("sent", "written"), [("05", b"5"), ("00", b"0"), ("007", b"7"), ("0", b"0"), ("10", b"10")]
)
def test_a_content_length_is_forwarded_without_leading_zeros_in_both_versions(
    sent: str, written: bytes
) -> None:
    """The grammar (RFC 9110 §8.6) makes it a decimal number, but other parsers may take it for an
    octal one."""
    request = decide_request(head(POST, "Host: a", f"content-LENGTH: {sent}"), LIMITS)
    assert request.headers.items[1] == (b"content-LENGTH", written)
    assert decide_response(
        head("HTTP/1.1 200 OK", f"Content-Length: {sent}"), LIMITS
    ).headers.items == [(b"Content-Length", written)]
    field = NeverIndexedField((b"content-length", sent.encode()))
    assert request_head([*POST2, field]).headers.items[1] == (b"content-length", written)
    assert response_head([*OK2, field]).headers.items == [(b"content-length", written)]
    assert isinstance(response_head([*OK2, field]).headers.items[0], NeverIndexedField)


@pytest.mark.parametrize("name", ["Content-Length ", "Content-Length\t", "Content-Length \t "])
def test_white_space_before_the_colon_of_a_response_is_removed(name: str) -> None:
    """RFC 9112 §5.1."""
    data = head("HTTP/1.1 200 OK", "A: b : c", f"{name}: 5", "X\t:y")
    whole = read(Role.CLIENT, [data])
    assert isinstance(whole, ResponseHead)
    assert whole.headers.items == [(b"A", b"b : c"), (b"Content-Length", b"5"), (b"X", b"y")]
    assert read(Role.CLIENT, byte_by_byte(data)) == whole


@given(st.binary(max_size=6).filter(lambda value: b"\r\n" not in value))
def test_a_field_value_is_one_in_both_versions_or_in_neither(value: bytes) -> None:
    """In heads by either parser, in trailers, and in HTTP/2. White space at the ends of a value
    belongs to the line in HTTP/1."""
    lines = b"X: " + value + b"\r\n\r\n"
    inner = value.strip(b" \t")
    takes = re.fullmatch(rb"[\t\x20-\x7e\x80-\xff]*", value) is not None
    for request in (True, False):
        data = (
            b"GET / HTTP/1.1\r\nHost: a\r\n"
            if request
            else b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n"
        ) + lines
        recognised = (
            recognise_request(data, LIMITS) if request else recognise_response(data, LIMITS)
        )
        found = read(Role.SERVER if request else Role.CLIENT, [data])
        assert isinstance(found, RequestHead | ResponseHead) is takes
        assert takes or recognised is None
        assert not isinstance(found, RequestHead | ResponseHead) or found.headers.get(b"x") == inner
    assert _taken(lambda: ChunkedReader(4096, 24).read(b"0\r\n" + lines, 0)) is takes
    assert _taken(lambda: trailers([(b"x", inner)])) is takes
    assert _taken(lambda: request_head([*POST2, (b"x", inner)])) is takes
    assert _taken(lambda: response_head([*OK2, (b"x", inner)])) is takes


def _taken(read_it: Callable[[], object]) -> bool:
    try:
        read_it()
    except ProtocolError:
        return False
    return True


def outcome(data: bytes) -> RequestHead | int:
    try:
        return decide_request(data, LIMITS)
    except ProtocolError as error:
        return error.status


@settings(max_examples=300, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from(REQUESTS))
def test_both_paths_and_all_chunkings_say_the_same_of_a_spoiled_request(
    source: object, data: bytes
) -> None:
    data = spoil(source, data)  # type: ignore[arg-type]  # hypothesis' own Random
    whole = read(Role.SERVER, [data])
    assert read(Role.SERVER, byte_by_byte(data)) == whole
    first, end, _ = data.partition(b"\r\n\r\n")
    if end and not data.startswith(b"\r\n"):
        assert outcome(first + end) == whole


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(LINES), max_size=4))
def test_no_mixture_of_framing_lines_gets_two_lengths_through(lines: list[bytes]) -> None:
    found = outcome(b"POST / HTTP/1.1\r\nHost: a\r\n" + b"".join(lines) + b"\r\n")
    if isinstance(found, RequestHead):
        said = [
            n.lower()
            for n, _ in found.headers
            if n.lower() in (b"content-length", b"transfer-encoding", b"host")
        ]
        assert len(said) == len(set(said))
        assert not {b"content-length", b"transfer-encoding"} <= set(said)
