"""The first bytes of a connection. A verdict, once given, is never changed by more bytes, and it is given as soon as it is certain; the
ClientHellos are those of real TLS implementations."""

from __future__ import annotations

import random
import ssl

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from OpenSSL import SSL

from proxy.wire.http1 import Http1Connection, Role
from proxy.wire.messages import Limits, ProtocolError
from proxy.wire.sniff import HELLO_LIMIT, NOT_TLS, UNDECIDED, ClientHello, NotTLS, Protocol, Undecided, client_hello, protocol, settle
from tests.wire.corpus import REQUESTS, head

Verdict = Protocol | ClientHello | NotTLS | Undecided


def first(data: bytes, sniff: object = protocol) -> tuple[Verdict, int]:
    """The verdict on `data`, and after how many bytes it was certain; asserts that no later byte changes it."""
    assert callable(sniff)
    verdict: Verdict = UNDECIDED
    certain = len(data)
    for length in range(len(data) + 1):
        now = sniff(data[:length])
        if verdict is UNDECIDED and now is not UNDECIDED:
            verdict, certain = now, length
        assert now == verdict, f"{verdict} at {certain} bytes, {now} at {length}"
    return verdict, certain


# Inside a connection...


@pytest.mark.parametrize("data", [*REQUESTS, head("PROPPATCH /x HTTP/1.1", "Host: a"), b"GET / HTTP/1.0\n\n", head("M-SEARCH * HTTP/1.1"),
                                  b"\r\n\r\n\r\n\r\n" + head("GET / HTTP/1.1"), head("GET /\xe9 HTTP/1.1"),
                                  head("GET / HTTP/2.0")])  # fmt: skip
def test_http1_is_known_at_the_end_of_its_first_line_and_never_taken_for_anything_else(data: bytes) -> None:
    start = len(data) - len(data.lstrip(b"\r\n"))
    assert first(data) == (Protocol.HTTP1, data.index(b"\n", start) + 1)


def test_http2_is_known_by_its_preface() -> None:
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    assert first(preface + b"\0\0\x12\x04\0\0\0\0\0") == (Protocol.HTTP2, 16)


OPAQUE = {
    "nothing like it": (b"\xff\xfe\xfd", 1),
    "TLS": (b"\x16\x03\x01\x02\x00\x01", 1),
    "SSH": (b"SSH-2.0-OpenSSH_10.0\r\n", 21),
    "SSH with a comment": (b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u7\r\n", 39),
    "SMTP, the server": (b"220 mail.example.org ESMTP Postfix\r\n", 22),
    "SMTP, the client": (b"EHLO mail.example.org\r\n", 22),
    "PostgreSQL, asking for TLS": (b"\x00\x00\x00\x08\x04\xd2\x16\x2f", 1),
    "PostgreSQL, starting": (b"\x00\x00\x00\x52\x00\x03\x00\x00user\x00postgres\x00", 1),
    "MySQL, the server": (b"J\x00\x00\x00\n8.0.40\x00", 2),
    "MySQL, the client": (b"\x20\x00\x00\x01\x85\xa6\xff\x01", 1),
    "Redis": (b"*2\r\n$4\r\nLLEN\r\n$6\r\nmylist\r\n", 3),
    "Redis, inline": (b"PING\r\n", 5),
    "Redis, inline with a key": (b"GET key\r\n", 8),
    "memcached": (b"get some_key\r\n", 13),
    "memcached, storing": (b"set key 0 900 5\r\nhello\r\n", 9),
    "MQTT": (b"\x10\x10\x00\x04MQTT\x04\x02\x00\x3c\x00\x04test", 1),
    "AMQP": (b"AMQP\x00\x00\x09\x01", 5),
    "MongoDB": (b"\x3b\x00\x00\x00\x01\x00\x00\x00", 1),
    "NATS": (b'CONNECT {"verbose":false}\r\n', 26),
    "FTP": (b"USER anonymous\r\n", 15),
    "HTTP/0.9": (b"GET /\r\n", 7),
    "almost HTTP": (b"GET / HTTPS/1.1\r\n", 17),
    "HTTP in small letters": (b"GET / http/1.1\r\n", 16),
    "HTTP as a part of something": (b"PUT /a\x00 XHTTP/1.1\r\n", 19),
    "HTTP in the second line": (b"PUT /a\x00\nb HTTP/1.1\r\n", 8),
    "binary behind a word": (b"PUT key\x00\x01", 8),
    "binary behind a word in small letters": (b"put /key\x00\x01", 9),
    "binary behind two blanks": (b"PUT  \x00", 6),
    "a response": (b"HTTP/1.1 200 OK\r\n", 5),
    "a long word": (b"x" * 30, 25),
    "a blank at the start": (b" GET / HTTP/1.1\r\n", 1),
    "a line feed": (b"\nGET / HTTP/1.1\r\n", 1),
    "empty lines without end": (b"\r\n" * 20, 9),
    "PROXY": (b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n", 12),
    "almost HTTP/2": (b"PRI * HTTP/x", 12),
}


@pytest.mark.parametrize(("data", "certain"), OPAQUE.values(), ids=OPAQUE)
def test_what_is_not_http_is_opaque_as_soon_as_it_is_certain(data: bytes, certain: int) -> None:
    assert first(data) == (Protocol.OPAQUE, certain)


MEANT = {
    "a NUL in the target": b"GET /a\x00b HTTP/1.1\r\n",
    "a NUL in the target of a rarer method": b"PROPFIND /a\x00b HTTP/1.1\r\n",
    "a bare CR": b"GET /a\rX: y HTTP/1.1\r\n",
    "another control character": b"GET /\x0b HTTP/1.1\r\n",
    "a blank in the target": b"GET /a b HTTP/1.1\r\n",
    "two blanks": b"GET  / HTTP/1.1\r\n",
    "a tab": b"GET\t/ HTTP/1.1\r\n",
    "a blank at the end": b"GET / HTTP/1.1 \r\n",
    "a bare LF at the end": b"GET /\x00 HTTP/1.1\n",
}


@pytest.mark.parametrize("line", MEANT.values(), ids=MEANT)
def test_a_request_line_that_is_malformed_is_http1_s_to_refuse(line: bytes) -> None:
    assert first(line + b"Host: a\r\n\r\n") == (Protocol.HTTP1, len(line))
    http = Http1Connection(Role.SERVER, Limits())
    http.receive_data(line + b"Host: a\r\n\r\n")
    with pytest.raises(ProtocolError) as refusal:
        http.next_request()
    assert refusal.value.status == 400


@pytest.mark.parametrize("data", [b"PUT /key\x00\x01\x02", b"GET  ", b"GET  /", b"GET /a b"])
def test_what_may_still_be_one_and_falls_silent_goes_on_as_it_is(data: bytes) -> None:
    assert protocol(data) is UNDECIDED
    assert settle(data) is Protocol.OPAQUE
    assert protocol(data + b"x" * 5000) is Protocol.OPAQUE


@pytest.mark.parametrize(
    ("start", "verdict"), [(b"GET /", Protocol.HTTP1), (b"POST http://a/", Protocol.HTTP1), (b"REPORT /", Protocol.OPAQUE)]
)
def test_a_first_line_that_does_not_end_is_judged_by_its_beginning(start: bytes, verdict: Protocol) -> None:
    data = start + b"x" * 5000 + b" HTTP/1.1\r\n"
    assert first(data) == (verdict, 4096)
    assert protocol(b"\r\n" + data) is verdict


@pytest.mark.parametrize(("data", "verdict"), [
    (b"", Protocol.OPAQUE), (b"GET", Protocol.OPAQUE), (b"GET /", Protocol.HTTP1), (b"\r\nGET /", Protocol.HTTP1),
    (b"OPTIONS *", Protocol.HTTP1),
    (b"get key", Protocol.OPAQUE), (b"PRI", Protocol.OPAQUE), (b"\r\n", Protocol.OPAQUE), (b"GETTING /", Protocol.OPAQUE),
])  # fmt: skip
def test_a_client_that_falls_silent_is_judged_by_what_it_said(data: bytes, verdict: Protocol) -> None:
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
@given(st.lists(st.one_of(st.sampled_from(SNIPPETS), st.binary(max_size=3)), max_size=10).map(b"".join))
def test_no_verdict_on_a_protocol_is_ever_taken_back(data: bytes) -> None:
    event(str(first(data)[0]))


# Around it...


def python_hello(name: str | None, alpn: list[str], ciphers: str | None = None) -> bytes:
    context = ssl.create_default_context()
    context.check_hostname = False
    if alpn:
        context.set_alpn_protocols(alpn)
    if ciphers:
        context.set_ciphers(ciphers)
    out = ssl.MemoryBIO()
    connection = context.wrap_bio(ssl.MemoryBIO(), out, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        connection.do_handshake()
    return out.read()


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
    "Python": (python_hello("Example.ORG", ["h2", "http/1.1"]), ClientHello("example.org", (b"h2", b"http/1.1"))),
    "Python without a name": (python_hello(None, ["http/1.1"]), ClientHello(None, (b"http/1.1",))),
    "Python without ALPN": (python_hello("a.b", []), ClientHello("a.b", ())),
    "Python to an address": (python_hello("10.0.0.1", []), ClientHello(None, ())),
    "Python with few ciphers": (python_hello("a", [], "ECDHE-RSA-AES128-GCM-SHA256"), ClientHello("a", ())),
    "OpenSSL": (openssl_hello(SPIFFE_NAME, [b"isthmus-tcp"]), ClientHello(SPIFFE_NAME, (b"isthmus-tcp",))),
    "OpenSSL bare": (openssl_hello(None, []), ClientHello(None, ())),
    "OpenSSL with a long name": (openssl_hello("x" * 63 + ".shop", [b"h2"]), ClientHello("x" * 63 + ".shop", (b"h2",))),
}


def record(payload: bytes, version: bytes = b"\x03\x01") -> bytes:
    return b"\x16" + version + len(payload).to_bytes(2, "big") + payload


@pytest.mark.parametrize(("data", "hello"), HELLOS.values(), ids=HELLOS)
def test_a_hello_is_known_at_its_last_byte_and_not_before(data: bytes, hello: ClientHello) -> None:
    assert first(data, client_hello) == (hello, len(data))
    assert client_hello(data + b"\x14\x03\x03\x00\x01\x01" + data) == hello


def test_a_hello_with_a_post_quantum_key_share_is_larger_than_a_segment() -> None:
    assert len(HELLOS["OpenSSL"][0]) > 1400, "the bundled OpenSSL no longer offers X25519MLKEM768 by itself"


@pytest.mark.parametrize("size", [1, 3, 100, 1000])
@pytest.mark.parametrize(("data", "hello"), HELLOS.values(), ids=HELLOS)
def test_a_hello_may_be_cut_over_several_records(data: bytes, hello: ClientHello, size: int) -> None:
    message = data[5:]
    data = b"".join(record(message[i : i + size], b"\x03\x03") for i in range(0, len(message), size))
    if len(data) <= HELLO_LIMIT:
        assert client_hello(data) == hello
        assert client_hello(data[:-1]) is UNDECIDED


def extension(kind: int, content: bytes) -> bytes:
    return kind.to_bytes(2, "big") + len(content).to_bytes(2, "big") + content


def hello_with(extensions: bytes | None, *, version: bytes = b"\x03\x03", record_version: bytes = b"\x03\x01") -> bytes:
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
    "a hello beyond our bounds": (b"\x16\x03\x01\x40\x00\x01\x00\x3f\xff" + bytes(HELLO_LIMIT), HELLO_LIMIT),
    "a good hello beyond our bounds": (hello_with(extension(21, bytes(HELLO_LIMIT - 50))), HELLO_LIMIT),
    "a hello in too many records": (
        record(b"\x01") + record(b"\x00") + record(b"\x2f") + record(b"\x00") + record(b"x") * 4000,
        HELLO_LIMIT,
    ),
}


@pytest.mark.parametrize(("data", "certain"), NOT_HELLOS.values(), ids=NOT_HELLOS)
def test_what_is_no_hello_is_known_as_soon_as_it_is_certain(data: bytes, certain: int) -> None:
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


def test_a_spoiled_hello_is_a_hello_or_none_and_its_verdict_stands() -> None:
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
        st.sampled_from([b"\x16\x03\x01", b"\x16\x03\x03", b"\x00\x05", b"\x01\x00\x00", b"\x00", b"\x05hello", b"\x16", b"\x17"]),
        max_size=12,
    )
)
def test_no_verdict_on_a_hello_is_ever_taken_back(pieces: list[bytes]) -> None:
    event(str(first(b"".join(pieces), client_hello)[0]))


def test_every_first_byte_is_decided_at_once_or_could_still_be_http_or_tls() -> None:
    token = set(b"!#$%&'*+-.^_`|~0123456789") | set(range(0x41, 0x5B)) | set(range(0x61, 0x7B))
    for byte in range(256):
        waiting = protocol(bytes([byte])) is UNDECIDED
        assert waiting is (byte in token or byte == 0x0D)
        assert (client_hello(bytes([byte])) is UNDECIDED) is (byte == 0x16)
