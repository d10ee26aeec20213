"""The first bytes of a connection. More bytes never change a verdict. What a lenient server would
serve as HTTP is HTTP, and the first bytes of other protocols are forwarded at once. The
ClientHellos are those of real TLS implementations."""

from __future__ import annotations

import io
import random
from http.server import BaseHTTPRequestHandler

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from OpenSSL import SSL

from proxy.wire.h1.connection import Http1Connection, Role
from proxy.wire.messages import Limits, ProtocolError
from proxy.wire.sniff import (
    HELLO_LIMIT,
    LINE_LIMIT,
    LONGEST_LINE,
    NOT_TLS,
    UNDECIDED,
    UNLIKELY,
    ClientHello,
    NotTLS,
    Protocol,
    Undecided,
    client_hello,
    condensed,
    protocol,
    settle,
)
from tests.wire.corpus import REQUESTS, head
from tests.wire.hellos import python_hello

Verdict = Protocol | ClientHello | NotTLS | Undecided


def first(data: bytes, sniff: object = protocol) -> tuple[Verdict, int]:
    """The verdict on `data`, and after how many bytes it was certain. Asserts that no later byte
    changes it, and that what is unlikely once is never waited for again."""
    assert callable(sniff)
    verdict: Verdict = UNDECIDED
    certain = len(data)
    for length in range(len(data) + 1):
        now = sniff(data[:length])
        if verdict in (UNDECIDED, UNLIKELY) and now is not verdict:
            assert verdict is not UNLIKELY or now is not UNDECIDED, f"waited for again at {length}"
            verdict, certain = now, length
        assert now == verdict, f"{verdict} at {certain} bytes, {now} at {length}"
    return verdict, certain


# Inside a connection...


@pytest.mark.parametrize("data", [*REQUESTS, head("PROPPATCH /x HTTP/1.1", "Host: a"), b"GET / HTTP/1.0\n\n", head("M-SEARCH * HTTP/1.1"),
                                  b"\r\n\r\n\r\n\r\n" + head("GET / HTTP/1.1"), head("GET /\xe9 HTTP/1.1"),
                                  head("GET / HTTP/2.0")])  # fmt: skip
def test_http1_is_known_in_its_first_line_and_never_taken_for_anything_else(data: bytes) -> None:
    start = len(data) - len(data.lstrip(b"\r\n"))
    verdict, certain = first(data)
    assert verdict is Protocol.HTTP1
    assert certain <= data.index(b"\n", start) + 1
    assert all(protocol(data[:length]) is UNDECIDED for length in range(certain)), (
        "it is waited for"
    )


def test_http2_is_known_by_its_preface() -> None:
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    assert first(preface + b"\0\0\x12\x04\0\0\0\0\0") == (Protocol.HTTP2, 16)


# The first bytes of other protocols, as their clients send them, or the server, where it sends
# first.
OTHERS = {
    "nothing like it": b"\xff\xfe\xfd",
    "TLS": b"\x16\x03\x01\x02\x00\x01",
    "SSH": b"SSH-2.0-OpenSSH_10.0\r\n",
    "SSH with a comment": b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u7\r\n",
    "SMTP, the server": b"220 mail.example.org ESMTP Postfix\r\n",
    "SMTP, the client": b"EHLO mail.example.org\r\n",
    "IMAP": b"a001 LOGIN joe secret\r\n",
    "POP3": b"USER joe\r\n",
    "NNTP": b"POST\r\n",
    "NNTP, a head": b"HEAD <1@example.org>\r\n",
    "FTP": b"USER anonymous\r\n",
    "IRC": b"NICK joe\r\nUSER joe 0 * :Joe\r\n",
    "XMPP": b"<?xml version='1.0'?><stream:stream to='a' xmlns='jabber:client' version='1.0'>",
    "PostgreSQL, asking for TLS": b"\x00\x00\x00\x08\x04\xd2\x16\x2f",
    "PostgreSQL, starting": b"\x00\x00\x00\x52\x00\x03\x00\x00user\x00postgres\x00",
    "PostgreSQL, cancelling": b"\x00\x00\x00\x10\x04\xd2\x16\x2e\x00\x00\x01\x02\x01\x02\x03\x04",
    "MySQL, the server": b"J\x00\x00\x00\n8.0.40\x00",
    "MySQL, the client": b"\x20\x00\x00\x01\x85\xa6\xff\x01",
    "SQL Server": b"\x12\x01\x00\x2f\x00\x00\x01\x00\x00\x00\x1a\x00\x06",
    "Oracle": b"\x00\x3a\x00\x00\x01\x00\x00\x00\x01\x36\x01\x2c\x00\x00\x08\x00",
    "Redis": b"*2\r\n$4\r\nLLEN\r\n$6\r\nmylist\r\n",
    "Redis, inline": b"PING\r\n",
    "Redis, inline with a key": b"GET key\r\n",
    "Redis, HELLO": b"HELLO 3\r\n",
    "memcached": b"get some_key\r\n",
    "memcached, storing": b"set key 0 900 5\r\nhello\r\n",
    "memcached, a key like a path": b"get /index.html\r\n",
    "memcached, a key like a version": b"set HTTP/1.1 0 900 5\r\nhello\r\n",
    "memcached, binary": b"\x80\x0b" + bytes(22),
    "beanstalkd": b"put 0 0 10 5\r\nhello\r\n",
    "MQTT": b"\x10\x10\x00\x04MQTT\x04\x02\x00\x3c\x00\x04test",
    "AMQP": b"AMQP\x00\x00\x09\x01",
    "AMQP 1.0": b"AMQP\x03\x01\x00\x00",
    "STOMP": b"CONNECT\naccept-version:1.2\nhost:a\n\n\x00",
    "STOMP, the newer word": b"STOMP\naccept-version:1.2\nhost:a\n\n\x00",
    "Kafka": b"\x00\x00\x00\x2f\x00\x12\x00\x03\x00\x00\x00\x01\x00\x0aproducer-1",
    "Kafka, of the length of a letter": (
        b"\x00\x00\x00G\x00\x12\x00\x03\x00\x00\x00\x01\x00\x0aproducer-1"
    ),
    "MongoDB": b"\x3b\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\xd4\x07\x00\x00",
    "Cassandra": b"\x04\x00\x00\x00\x01\x00\x00\x00\x16\x00\x01\x00\x0bCQL_VERSION\x00\x053.0.0",
    "Thrift": b"\x00\x00\x00\x1b\x80\x01\x00\x01\x00\x00\x00\x04ping\x00\x00\x00\x00\x00",
    "ZooKeeper": b"\x00\x00\x00\x2c\x00\x00\x00\x00" + bytes(40),
    "ZooKeeper, a word": b"ruok\n",
    "protobuf in front": b"\x0a\x05hello\x10\x01",
    "LDAP": b"\x30\x0c\x02\x01\x01\x60\x07\x02\x01\x03\x04\x00\x80\x00",
    "SMB": b"\x00\x00\x00\x55\xffSMB\x72",
    "RDP": b"\x03\x00\x00\x13\x0e\xe0\x00\x00\x00\x00\x00\x01\x00\x08\x00\x03\x00\x00\x00",
    "SOCKS 5": b"\x05\x01\x00",
    "SOCKS 4": b"\x04\x01\x00\x50\x0a\x00\x00\x01joe\x00",
    "DNS": b"\x00\x1d\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x07example",
    "BitTorrent": b"\x13BitTorrent protocol" + bytes(8) + b"h" * 40,
    "rsync": b"@RSYNCD: 31.0\n",
    "git": b"0033git-upload-pack /project.git\0host=example.org\0",
    "NATS": b'CONNECT {"verbose":false}\r\n',
    "NATS, publishing": b"PUB subject 5\r\nhello\r\n",
    "RTSP": b"DESCRIBE rtsp://a/b RTSP/1.0\r\nCSeq: 1\r\n\r\n",
    "RTSP, the first request": b"OPTIONS rtsp://a/b RTSP/1.0\r\nCSeq: 1\r\n\r\n",
    "RTSP, of the server": b"OPTIONS * RTSP/1.0\r\nCSeq: 1\r\n\r\n",
    "SIP": b"OPTIONS sip:joe@example.org SIP/2.0\r\nVia: a\r\n\r\n",
    "SIP, registering": b"REGISTER sip:example.org SIP/2.0\r\nVia: a\r\n\r\n",
    "ICAP": b"OPTIONS icap://a/b ICAP/1.0\r\nHost: a\r\n\r\n",
    "MSRP": b"MSRP a786hjs2 SEND\r\nTo-Path: msrp://a\r\n",
    "Gopher": b"/selector\r\n",
    "Finger": b"joe\r\n",
    "PROXY": b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n",
    "PROXY, binary": b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c",
    "a response": b"HTTP/1.1 200 OK\r\n",
    "HTTP in the second line": b"FOO a\x00\nb HTTP/1.1\r\n",
    "binary behind a word": b"FOO key\x00\x01",
    "binary behind a word in small letters": b"put /key\x00\x01",
    "a long word": b"x" * 30,
    "a greeting in Base64": b"QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo=",
    "zeros": bytes(100),
}


@pytest.mark.parametrize("data", OTHERS.values(), ids=OTHERS)
def test_other_protocols_go_on_at_once(data: bytes) -> None:
    assert first(data)[0] in (Protocol.OPAQUE, UNLIKELY)
    assert protocol(data + bytes(LONGEST_LINE)) is Protocol.OPAQUE


HEAD = b"Host: a\r\nisthmus-client-id: spiffe://cluster.local/ns/a/sa/forged\r\n\r\n"
# Request lines that some server accepts, and what is in front of them.
LENIENT = {
    "a NUL in the target": b"GET /a\x00b HTTP/1.1\r\n",
    "a NUL in the target of a rarer method": b"PROPFIND /a\x00b HTTP/1.1\r\n",
    "a bare CR": b"GET /a\rX: y HTTP/1.1\r\n",
    "another control character": b"GET /\x0b HTTP/1.1\r\n",
    "a blank in the target": b"GET /a b HTTP/1.1\r\n",
    "two blanks": b"GET  / HTTP/1.1\r\n",
    "a tab": b"GET\t/ HTTP/1.1\r\n",
    "a form feed, for Python": b"GET\x0c/\x0cHTTP/1.1\r\n",
    "a no-break space, for Python": b"GET\xa0/\xa0HTTP/1.1\r\n",
    "a blank at the end": b"GET / HTTP/1.1 \r\n",
    "a bare LF at the end": b"GET /\x00 HTTP/1.1\n",
    "two CRs": b"GET / HTTP/1.1\r\r\n",
    "two CRs behind a rarer method": b"FOO / HTTP/1.1\r\r\n",
    "a line feed in front": b"\nGET / HTTP/1.1\r\n",
    "a line feed in front of a rarer method": b"\nFOO / HTTP/1.1\r\n",
    "a CR in front": b"\rGET / HTTP/1.1\r\n",
    "a blank in front": b" GET / HTTP/1.1\r\n",
    "a tab in front": b"\tGET / HTTP/1.1\r\n",
    "control characters in front, for Netty": b"\x00\x01\x9fGET / HTTP/1.1\r\n",
    "many empty lines": b"\r\n" * 100 + b"GET / HTTP/1.1\r\n",
    "HTTP/1.10": b"GET / HTTP/1.10\r\n",
    "HTTP/1.10 behind a rarer method": b"FOO / HTTP/1.10\r\n",
    "HTTP/01.1": b"GET / HTTP/01.1\r\n",
    "HTTP/11": b"GET / HTTP/11\r\n",
    "small letters": b"GET / http/1.1\r\n",
    "small letters behind a rarer method": b"FOO / http/1.1\r\n",
    "HTTP/0.9": b"GET /\r\n",
    "another protocol's version, for Node.js": b"GET / RTSP/1.0\r\n",
    "any version, for Netty": b"POST / FOO/9.9\r\n",
    "no target": b"GET HTTP/1.1\r\n",
    "an absolute URI": b"GET HTTP://a/ HTTP/1.10\r\n",
    "a method in small letters": b"get / HTTP/1.1\r\n",
    "a long method, for Go": b"X" * 100 + b" / HTTP/1.1\r\n",
    "a preface with a bare LF, for Go": b"PRI * HTTP/2.0\n\r\n",
    "a method that is no token, for wsgiref": b"(GET / HTTP/1.1\r\n",
    "a control character in a method, for wsgiref": b"G\x01T / HTTP/1.1\r\n",
    "a NUL in a method, for wsgiref": b"G\x00T / HTTP/1.1\r\n",
    "a target without a slash that is long, for wsgiref": b"x " + b"y" * 5000 + b" HTTP/1.1\r\n",
    "a version behind many blanks": (
        b"G(T /" + b"y" * 5000 + b" " * 500 + b"HTTP/1.1" + b" " * 500 + b"\r\n"
    ),
}


@pytest.mark.parametrize("line", LENIENT.values(), ids=LENIENT)
def test_a_request_line_that_is_malformed_is_http1_s_to_refuse(line: bytes) -> None:
    assert first(line + HEAD)[0] is Protocol.HTTP1
    if line[:3] == b"get" or line[:1] == b"X":  # an unknown method may be opaque
        return
    http = Http1Connection(Role.SERVER, Limits())
    http.receive_data(line + HEAD)
    with pytest.raises(ProtocolError) as refusal:
        http.next_request()
    assert refusal.value.status in (400, 505)


class _PythonServer(BaseHTTPRequestHandler):
    """http.server, as it reads a request."""

    def __init__(self, data: bytes) -> None:
        self.rfile, self.wfile = io.BytesIO(data), io.BytesIO()
        self.requestline, self.request_version, self.command, self.path = "", "", "", ""
        self.client_address = ("", 0)
        self.raw_requestline = self.rfile.readline(65537)

    def serves(self) -> bool:
        """With an application that accepts any method, as those of wsgiref and Werkzeug do."""
        return self.parse_request() and self.headers.get("isthmus-client-id") is not None

    def log_message(self, *_: object) -> None:
        pass


WORDS = [
    b"GET",
    b"POST",
    b"get",
    b"FOO",
    b"(GET",
    b"G\x01",
    b"/",
    b"/a b",
    b"*",
    b"http://a/",
    b"x",
]
VERSIONS = [b"HTTP/1.1", b"HTTP/1.0", b"HTTP/1.10", b"http/1.1", b"HTTP/0.9"]
BETWEEN = [
    b" ",
    b"  ",
    b"\t",
    b"\x0b",
    b"\x0c",
    b"\x85",
    b"\xa0",
    b"\x00",
    b"\r",
    b"\n",
    b"\r\n",
    b"\r\r\n",
    b"\x1c",
    b"\xff",
]
PIECES = st.sampled_from([*WORDS, *VERSIONS, *BETWEEN])


@settings(max_examples=1500, deadline=None)
@given(st.lists(PIECES, max_size=9).map(b"".join), st.booleans())
def test_what_python_would_serve_is_http(line: bytes, plain: bool) -> None:
    """Python's http.server is the most lenient of the common ones. What it reads as a request with
    our field in it is never forwarded as opaque, except for HTTP/0.9 without a path, which is Redis
    to others."""
    data = (b"GET" + line if plain else line) + b" HTTP/1.1\r\n" * plain + HEAD
    server = _PythonServer(data)
    if server.serves() and not (
        server.request_version == "HTTP/0.9" and not server.path.startswith("/")
    ):
        event("served")
        assert first(data)[0] is Protocol.HTTP1


VARIATION = st.tuples(
    st.text("\r\n \t\x0b\x0c\x00\x1c", max_size=20),
    st.sampled_from(
        ["GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "HEAD", "PROPFIND", "X-ANY", "get"]
    ),
    st.text(" \t", min_size=1, max_size=3),
    st.sampled_from(["/", "/a?b=c", "*", "http://a/b", "/\x7f", "a", "//"]),
    st.text(" \t", min_size=1, max_size=3),
    st.sampled_from(
        ["HTTP/1.1", "HTTP/1.0", "HTTP/1.10", "http/1.1", "Http/1.1", "HTTP/1", "HTTP/9.9"]
    ),
    st.sampled_from(["\r\n", "\n", "\r\r\n", " \r\n", "\t\n"]),
)


@settings(max_examples=500, deadline=None)
@given(VARIATION)
def test_no_variation_of_a_request_line_is_opaque(parts: tuple[str, ...]) -> None:
    data = "".join(parts).encode("latin-1")
    assert first(data + HEAD)[0] is Protocol.HTTP1


@pytest.mark.parametrize(
    "data", [b"PUT key\x00\x01\x02", b"FOO  ", b"FOO x", b"GET  ", b"\x05", b" GET", b"x" * 30]
)
def test_an_incomplete_start_of_http_is_forwarded_after_a_silence_and_still_inspected(
    data: bytes,
) -> None:
    assert isinstance(protocol(data), Undecided)
    assert settle(data) is Protocol.OPAQUE


@pytest.mark.parametrize(("start", "verdict"), [
    (b"GET x", Protocol.HTTP1), (b"REPORT /", Protocol.HTTP1), (b"foo /", Protocol.HTTP1), (b"FOO http://a", Protocol.HTTP1),
])  # fmt: skip
def test_a_first_line_that_does_not_end_is_judged_by_its_beginning(
    start: bytes, verdict: Protocol
) -> None:
    data = start + b"x" * 5000 + b" HTTP/1.1\r\n"
    assert first(data) == (verdict, 4096)


@pytest.mark.parametrize("start", [b"FOO x", b"", b"(GET /", b"FOO /\0"])
def test_or_by_its_end_for_as_long_as_a_server_reads(start: bytes) -> None:
    for size in (5000, LONGEST_LINE - 100):
        data = start + b"x" * size + b" HTTP/1.1\r\n"
        assert protocol(data[:-1]) is UNLIKELY
        assert protocol(data) is Protocol.HTTP1
        assert protocol(data.replace(b"HTTP", b"SMTP")) is Protocol.OPAQUE
    assert protocol(start + b"x" * LONGEST_LINE + b" HTTP/1.1\r\n") is Protocol.OPAQUE


def test_endless_white_space_does_not_avoid_the_verdict() -> None:
    assert first(b"\r\n" * 3000) == (Protocol.HTTP1, 4096)
    assert first(b" " * 5000) == (Protocol.HTTP1, 4096)
    for data in (bytes(5000) + b"x y HTTP/1.1\n", b"x y HTTP/1.1" + b" " * 5000 + b"\n"):
        assert protocol(data[:-1]) is UNLIKELY
        assert protocol(data) is Protocol.HTTP1
    assert protocol(bytes(LONGEST_LINE)) is Protocol.OPAQUE


LINE_PIECES = st.sampled_from(
    [
        b"x",
        b"x" * 70,
        b" ",
        b" " * 70,
        b"\xa0",
        b"HTTP/1.1",
        b"/1.1",
        b"HTTP",
        b"HTTP/1." + b"0" * 70,
        b"\0",
        b"\n",
    ]
)
LINE_PARTS = st.lists(
    st.lists(LINE_PIECES, min_size=1, max_size=4).map(b"".join), min_size=1, max_size=4
)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from([b"(GET /", b"x ", b"\0"]), LINE_PARTS)
def test_what_is_kept_of_a_long_line_leads_to_the_same_verdict(
    start: bytes, parts: list[bytes]
) -> None:
    whole = kept = start + b"x" * (LINE_LIMIT - 50)
    for part in parts:
        whole, kept = whole + part, kept + part
        verdict = protocol(whole)
        assert protocol(kept) in (verdict, Protocol.HTTP1)
        if isinstance(verdict, Protocol):
            event(str(verdict))
            return
        if len(kept) > LINE_LIMIT:
            kept = condensed(kept)
            assert len(kept) <= LINE_LIMIT + 70


@pytest.mark.parametrize(
    ("tail", "more"),
    [
        (b"", b" HTTP/1.1\r\n"),
        (b" ", b"HTTP/1.1\r\n"),
        (b" HTTP/1", b".1\r\n"),
        (b" y HTTP/1.1", b" z\r\n"),
        (b" y", b"\r\n"),
    ],
)
def test_what_is_kept_of_a_long_line_is_short_and_means_the_same(tail: bytes, more: bytes) -> None:
    data = b"(GET /" + b"x" * 5000 + tail
    assert protocol(data) is UNLIKELY
    kept = condensed(data)
    assert len(kept) <= LINE_LIMIT + 70
    assert protocol(kept) is UNLIKELY
    assert protocol(kept + more) is protocol(data + more)


@pytest.mark.parametrize(("data", "verdict"), [
    (b"", Protocol.OPAQUE), (b"GET", Protocol.OPAQUE), (b"OPTIONS *", Protocol.HTTP1), (b"GET k", Protocol.HTTP1),
    (b"get key", Protocol.OPAQUE), (b"PRI", Protocol.OPAQUE), (b"\r\n", Protocol.OPAQUE), (b"GETTING /", Protocol.OPAQUE),
])  # fmt: skip
def test_a_client_that_falls_silent_is_judged_by_what_it_said(
    data: bytes, verdict: Protocol
) -> None:
    assert protocol(data) is UNDECIDED
    assert settle(data) is verdict


SNIPPETS = [
    b"GET",
    b" ",
    b"/",
    b"\r\n",
    b"\r",
    b"\n",
    b"HTTP/1.1",
    b"HTTP/",
    b"1",
    b".",
    b"PRI * HTTP/2.0\r\n",
    b"SM",
    b"x" * 23,
    b"\x00",
    b"\xff",
    b"*",
    b" /",
    b" HTTP/1.1",
    b"\t",
]


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.one_of(st.sampled_from(SNIPPETS), st.binary(max_size=3)), max_size=10).map(b"".join)
)
def test_no_verdict_on_a_protocol_is_ever_taken_back(data: bytes) -> None:
    event(str(first(data)[0]))


# Around it...


def openssl_hello(name: str | None, alpn: list[bytes]) -> bytes:
    context = SSL.Context(SSL.TLS_METHOD)
    if alpn:
        context.set_alpn_protos(alpn)
    connection = SSL.Connection(context, None)
    if name:
        connection.set_tlsext_host_name(name.encode())
    connection.set_connect_state()
    with pytest.raises(SSL.WantReadError):
        connection.do_handshake()
    return connection.bio_read(65536)


SPIFFE_NAME = "web.shop.sa.cluster.local"
HELLOS = {
    "Python": (
        python_hello("Example.ORG", ["h2", "http/1.1"]),
        ClientHello("example.org", (b"h2", b"http/1.1")),
    ),
    "Python without a name": (python_hello(None, ["http/1.1"]), ClientHello(None, (b"http/1.1",))),
    "Python without ALPN": (python_hello("a.b", []), ClientHello("a.b", ())),
    "Python to an address": (python_hello("10.0.0.1", []), ClientHello(None, ())),
    "Python with few ciphers": (
        python_hello("a", [], "ECDHE-RSA-AES128-GCM-SHA256"),
        ClientHello("a", ()),
    ),
    "OpenSSL": (
        openssl_hello(SPIFFE_NAME, [b"isthmus-tcp"]),
        ClientHello(SPIFFE_NAME, (b"isthmus-tcp",)),
    ),
    "OpenSSL bare": (openssl_hello(None, []), ClientHello(None, ())),
    "OpenSSL with a long name": (
        openssl_hello("x" * 63 + ".shop", [b"h2"]),
        ClientHello("x" * 63 + ".shop", (b"h2",)),
    ),
}


def record(payload: bytes, version: bytes = b"\x03\x01") -> bytes:
    return b"\x16" + version + len(payload).to_bytes(2, "big") + payload


@pytest.mark.parametrize(("data", "hello"), HELLOS.values(), ids=HELLOS)
def test_a_hello_is_known_at_its_last_byte_and_not_before(data: bytes, hello: ClientHello) -> None:
    assert first(data, client_hello) == (hello, len(data))
    assert client_hello(data + b"\x14\x03\x03\x00\x01\x01" + data) == hello


def test_a_hello_with_a_post_quantum_key_share_is_larger_than_a_segment() -> None:
    assert len(HELLOS["OpenSSL"][0]) > 1400, (
        "the bundled OpenSSL no longer offers X25519MLKEM768 by default"
    )


@pytest.mark.parametrize("size", [1, 3, 100, 1000])
@pytest.mark.parametrize(("data", "hello"), HELLOS.values(), ids=HELLOS)
def test_a_hello_may_be_cut_over_several_records(
    data: bytes, hello: ClientHello, size: int
) -> None:
    message = data[5:]
    data = b"".join(
        record(message[i : i + size], b"\x03\x03") for i in range(0, len(message), size)
    )
    if len(data) <= HELLO_LIMIT:
        assert client_hello(data) == hello
        assert client_hello(data[:-1]) is UNDECIDED


def extension(kind: int, content: bytes) -> bytes:
    return kind.to_bytes(2, "big") + len(content).to_bytes(2, "big") + content


def hello_with(
    extensions: bytes | None, *, version: bytes = b"\x03\x03", record_version: bytes = b"\x03\x01"
) -> bytes:
    body = version + bytes(32) + b"\x00" + b"\x00\x02\x13\x01" + b"\x01\x00"
    body += b"" if extensions is None else len(extensions).to_bytes(2, "big") + extensions
    return record(b"\x01" + len(body).to_bytes(3, "big") + body, record_version)


def sni(name: bytes, kind: bytes = b"\x00") -> bytes:
    entry = kind + len(name).to_bytes(2, "big") + name
    return extension(0, len(entry).to_bytes(2, "big") + entry)


@pytest.mark.parametrize(("data", "hello"), [
    (hello_with(None, version=b"\x03\x01"), ClientHello(None, ())),  # TLS 1.0: without extensions
    (hello_with(b"", record_version=b"\x03\x03"), ClientHello(None, ())),
    (hello_with(sni(b"A.b") + extension(0x0A0A, b"")), ClientHello("a.b", ())),
    (hello_with(sni(b"\xc3\xa9")), ClientHello(None, ())),
    (hello_with(sni(b"a", b"\x07")), ClientHello(None, ())),
    (hello_with(extension(16, b"\x00\x06\x02h2\x02h3")), ClientHello(None, (b"h2", b"h3"))),
    (hello_with(extension(21, bytes(8000))), ClientHello(None, ())),
])  # fmt: skip
def test_unusual_hellos_are_hellos(data: bytes, hello: ClientHello) -> None:
    assert first(data, client_hello) == (hello, len(data))


NOT_HELLOS = {
    "HTTP": (b"GET / HTTP/1.1\r\n", 1),
    "SSLv2": (b"\x80\x2e\x01\x00\x02", 1),
    "SSLv3": (b"\x16\x03\x00\x00\x2f\x01", 3),
    "TLS of the future": (b"\x16\x04\x01\x00\x2f\x01", 2),
    "an alert": (b"\x15\x03\x01\x00\x02\x01\x00", 1),
    "a ServerHello": (record(b"\x02\x00\x00\x05hello"), 6),
    "an empty record": (b"\x16\x03\x01\x00\x00\x16\x03\x01", 5),
    "another record in the middle": (record(b"\x01\x00\x00\x20abc") + b"\x17\x03\x03\x00\x01x", 13),
    "no record in the middle": (record(b"\x01\x00\x00\x20abc") + b"\x16\x04", 14),
    "a hello beyond all bounds": (record(b"\x01\x01\x00\x00" + bytes(100)), 9),
    "a hello beyond our bounds": (
        b"\x16\x03\x01\x40\x00\x01\x00\x3f\xff" + bytes(HELLO_LIMIT),
        HELLO_LIMIT,
    ),
    "a good hello beyond our bounds": (
        hello_with(extension(21, bytes(HELLO_LIMIT - 50))),
        HELLO_LIMIT,
    ),
    "a hello in too many records": (
        record(b"\x01") + record(b"\x00") + record(b"\x2f") + record(b"\x00") + record(b"x") * 4000,
        HELLO_LIMIT,
    ),
}


@pytest.mark.parametrize(("data", "certain"), NOT_HELLOS.values(), ids=NOT_HELLOS)
def test_what_is_not_a_hello_is_recognised_as_early_as_possible(data: bytes, certain: int) -> None:
    if certain < 100:
        assert first(data, client_hello) == (NOT_TLS, certain)
    assert client_hello(data) is NOT_TLS
    assert client_hello(data[:certain]) is NOT_TLS
    assert client_hello(data[: certain - 1]) is UNDECIDED


@pytest.mark.parametrize("data", [
    hello_with(b"\x00"), hello_with(b"\x00\x00\x00\x05abc"), hello_with(extension(0, b"")), hello_with(extension(0, b"\x00\x09\x00")),
    hello_with(extension(16, b"\x00\x05\x09h2")), hello_with(extension(16, b"\x00")), record(b"\x01\x00\x00\x05hello"),
    record(b"\x01\x00\x00\x00"),
])  # fmt: skip
def test_a_malformed_hello_is_not_for_us(data: bytes) -> None:
    assert first(data, client_hello) == (NOT_TLS, len(data))


def test_a_damaged_hello_is_a_hello_or_not_and_its_verdict_is_final() -> None:
    source = random.Random(3)
    verdicts = set()
    for _ in range(60):
        data = bytearray(HELLOS["Python with few ciphers"][0])
        for _ in range(source.randrange(1, 4)):
            data[source.randrange(len(data))] = source.randrange(256)
        verdicts.add(type(first(bytes(data), client_hello)[0]))
    assert verdicts >= {ClientHello, NotTLS}


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                b"\x16\x03\x01",
                b"\x16\x03\x03",
                b"\x00\x05",
                b"\x01\x00\x00",
                b"\x00",
                b"\x05hello",
                b"\x16",
                b"\x17",
            ]
        ),
        max_size=12,
    )
)
def test_no_verdict_on_a_hello_is_ever_taken_back(pieces: list[bytes]) -> None:
    event(str(first(b"".join(pieces), client_hello)[0]))


def test_no_first_byte_waits_that_begins_no_common_request() -> None:
    token = set(b"!#$%&'*+-.^_`|~0123456789") | set(range(0x41, 0x5B)) | set(range(0x61, 0x7B))
    for byte in range(256):
        waiting = protocol(bytes([byte])) is UNDECIDED
        assert waiting is (byte in token or byte == 0x0D)
        assert (protocol(bytes([byte])) is UNLIKELY) is not waiting
        assert (client_hello(bytes([byte])) is UNDECIDED) is (byte == 0x16)
