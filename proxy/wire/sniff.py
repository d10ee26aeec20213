"""Protocol detection by the first bytes of a connection: TLS, HTTP/1, HTTP/2, or opaque.

Everything that a lenient server would serve as HTTP/1 is HTTP/1 here, even if it is malformed: then
the HTTP/1 parser refuses it with 400. As opaque bytes it would pass without any of the checks for
requests, possibly with header fields that only a proxy may set, to a server that may accept it. So
this module does not parse HTTP. It accepts what any of the common servers tolerates: empty lines,
spaces and control characters at the start (nginx, Node.js, Python, Netty), a bare LF, any white
space between the parts, versions such as HTTP/1.10 or http/1.1, a second CR, no version at all, and
any bytes as a method (wsgiref, Werkzeug and WEBrick accept all). A registered method before a path
is HTTP/1, whatever follows. Otherwise the end of the line decides, because no other protocol has
`HTTP/1` after a space there.

Ambiguous input stays opaque: `GET key` is an inline command of Redis, but HTTP/0.9 for Python's
http.server; `OPTIONS rtsp://a RTSP/1.0` is RTSP, but Node.js answers it. If a port must not be
reached in this way, its protocol must be configured (docs/decisions/47-http-detection.md).

These are pure functions of the bytes so far. The bytes are peeked and stay in the socket. While
more bytes could change the result, there is no verdict:

    UNDECIDED   it is probably HTTP: wait for more
    UNLIKELY    it is probably not HTTP: the bytes may be forwarded at once, but the bytes that
                follow must be checked until there is a verdict

So a binary protocol does not wait. Only a server-speaks-first protocol always waits for the
detection timeout. A line may be as long as Python's servers accept. If a line is longer than
`LINE_LIMIT`, a shorter form of it is enough to continue the detection (`condensed`).
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from enum import Enum

# A ClientHello with a post-quantum key share has about 1.8 KiB. RFC 8446 §4.1.2 would allow 128
# KiB, which is not used in practice.
HELLO_LIMIT = 16384

# RFC 9113 §3.4: every HTTP/2 client with prior knowledge sends this first. No other protocol begins
# with the first 16 bytes of it.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_PREFACE_CERTAIN = 16

# What at least one server ignores before a request line, and what it accepts between its parts.
_PASSED_OVER = re.compile(rb"[\x00-\x20\x7f-\xa0]*")
_BLANK = rb"[\t\v\f\r \x1c-\x1f\x85\xa0]"
_TOKEN = rb"[-!#$%&'*+.^_`|~0-9A-Za-z]"
_METHOD = rb"(?:GET|HEAD|POST|PUT|DELETE|CONNECT|OPTIONS|TRACE|PATCH)"
# HTTP, whatever follows.
_CERTAIN = re.compile(_METHOD + _BLANK + rb"++(?:/|(?i:https?://))")
# The end of a line that ends with something like a version of HTTP.
_VERSIONED = re.compile(_BLANK + rb"(?i:http)/[0-9][!-~]*+" + _BLANK + rb"*+\n")
_BLANKS = b"\t\v\f\r \x1c\x1d\x1e\x1f\x85\xa0"
# An incomplete request line for which it is worth waiting. Registered methods have at most 17
# characters.
_VERSION_START = rb"(?:H(?:T(?:T(?:P(?:/(?:[0-9](?:\.(?:[0-9]\r?)?)?)?)?)?)?)?)?"
_REQUEST_START = re.compile(
    _TOKEN + rb"{1,24}(?: (?:[!-~\x80-\xff]+(?: " + _VERSION_START + rb")?)?)?"
)
_MEANT_START = re.compile(rb"[A-Z]{1,24}(?:[ \t]+(?:/[^\n]*)?)?")
_METHOD_START = re.compile(_METHOD + rb" [/*!-~]")
# If a longer line (bytes) began as HTTP/1, it is HTTP/1 with a target over the limit (414).
LINE_LIMIT = 4096
# http.server answers 414 to longer lines. Bytes before the line count here too.
LONGEST_LINE = 65536
# The number of bytes that show whether a word begins like a version.
_VERSION = 64
_LONG = re.compile(
    _METHOD
    + _BLANK
    + rb"|"
    + _TOKEN
    + rb"++"
    + _BLANK
    + rb"++(?:/|(?i:https?://))[!-~\x80-\xff]*+\Z"
)
_LINES_ONLY = re.compile(rb"[\t\n\v\f\r ]*+")
# Type and length of a ClientHello extension, and the types that are parsed (RFC 8446 §4.2).
_EXTENSION = struct.Struct("!HH")
_SERVER_NAME, _ALPN = 0, 16
# The number of empty lines that h1/connection.py skips before a request line.
_EMPTY_LINES = b"\r\n" * 4


class Protocol(Enum):
    """The protocol inside a connection."""

    HTTP1 = "http/1"
    HTTP2 = "http/2"
    OPAQUE = "opaque"


class Undecided(Enum):
    """More bytes are necessary to decide."""

    UNDECIDED = "undecided"
    UNLIKELY = "unlikely"


UNDECIDED = Undecided.UNDECIDED
UNLIKELY = Undecided.UNLIKELY


@dataclass(frozen=True, slots=True)
class ClientHello:
    """The server name and the ALPN protocols of a ClientHello (RFC 6066 §3, RFC 7301)."""

    server_name: str | None
    alpn: tuple[bytes, ...]


class NotTLS(Enum):
    """The bytes are not a ClientHello."""

    NOT_TLS = "not TLS"


NOT_TLS = NotTLS.NOT_TLS


def protocol(data: bytes) -> Protocol | Undecided:
    """Detect the protocol by `data`, the first bytes of a connection."""
    if data[:_PREFACE_CERTAIN] == _PREFACE[: len(data[:_PREFACE_CERTAIN])]:
        return Protocol.HTTP2 if len(data) >= _PREFACE_CERTAIN else UNDECIDED
    start = data[:LINE_LIMIT]
    found = _PASSED_OVER.match(start)
    at = found.end() if found is not None else 0
    line = start[at:]
    if _CERTAIN.match(line):
        return Protocol.HTTP1
    if (
        len(start) == LINE_LIMIT
        and b"\n" not in line
        and (_LONG.match(line) if line else _LINES_ONLY.fullmatch(start))
    ):
        return Protocol.HTTP1  # bytes beyond the limit must not change this verdict
    end = data.find(b"\n", at, LONGEST_LINE) + 1
    if end:
        return Protocol.HTTP1 if _VERSIONED.search(data, at, end) else Protocol.OPAQUE
    if len(data) >= LONGEST_LINE:
        return Protocol.OPAQUE
    if len(start) == LINE_LIMIT or not _EMPTY_LINES.startswith(start[:at]):
        return UNLIKELY
    return (
        UNDECIDED
        if not line or _REQUEST_START.fullmatch(line) or _MEANT_START.fullmatch(line)
        else UNLIKELY
    )


def condensed(data: bytes) -> bytes:
    """Return a shorter form of `data`, which is longer than LINE_LIMIT and UNLIKELY.

    With the same bytes appended, the verdict stays the same, with two exceptions: LONGEST_LINE
    counts fewer bytes; and the verdict is HTTP if the last word begins like a version and continues
    as something else.
    """
    rest = data[LINE_LIMIT:]
    kept = rest.rstrip(_BLANKS)
    word = max(kept.rfind(_BLANKS[at : at + 1]) for at in range(len(_BLANKS)))
    return data[:LINE_LIMIT] + kept[max(word, 0) :][:_VERSION] + rest[len(kept) : len(kept) + 1]


def settle(data: bytes) -> Protocol:
    """Return the verdict if no more bytes arrive.

    It is HTTP/1 if the data begins like a common request line: then the deadlines of HTTP/1 handle
    a client that is slow on purpose. Otherwise it is opaque.
    """
    line = data[:LINE_LIMIT].lstrip(b"\r\n")
    return (
        Protocol.HTTP1
        if _METHOD_START.match(line) and _REQUEST_START.fullmatch(line)
        else Protocol.OPAQUE
    )


def client_hello(data: bytes) -> ClientHello | NotTLS | Undecided:
    """Parse the ClientHello at the start of `data`.

    A malformed one is NOT_TLS: the proxy does not reject it, but forwards it unchanged.
    """
    if (
        data[:3] not in (b"\x16\x03\x01", b"\x16\x03\x03", b"\x16\x03\x02")
        and data != b"\x16\x03"[: len(data)]
    ):
        return NOT_TLS
    data = data[:HELLO_LIMIT]
    message, intact = _handshake_bytes(data)
    size = int.from_bytes(message[1:4], "big")
    if message[:1] not in (b"", b"\x01") or size > HELLO_LIMIT:
        return NOT_TLS
    if len(message) < 4 + size or len(message) < 4:
        return UNDECIDED if intact and len(data) < HELLO_LIMIT else NOT_TLS
    try:
        return _parse_hello(message[4 : 4 + size])
    except ValueError:
        return NOT_TLS


def _handshake_bytes(data: bytes) -> tuple[bytes, bool]:
    """Return the payloads of the handshake records at the start of `data`.

    A hello may be split over several records. The bool is false if another record or an empty one
    was found (RFC 8446 §5.1 forbids empty ones).
    """
    payload = bytearray()
    at = 0
    while len(data) >= at + 5:
        size = int.from_bytes(data[at + 3 : at + 5], "big")
        if data[at : at + 2] != b"\x16\x03" or not size:
            return bytes(payload), False
        payload += data[at + 5 : at + 5 + size]
        at += 5 + size
    return bytes(payload), data[at : at + 2] == b"\x16\x03"[: len(data[at : at + 2])]


class _Cursor:
    """Reads length-prefixed vectors. Raises ValueError at the end of the data."""

    __slots__ = ("at", "data")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        piece = self.data[self.at : self.at + count]
        if len(piece) != count:
            raise ValueError("truncated")
        self.at += count
        return piece

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, size: int) -> bytes:
        return self.take(self.number(size))

    @property
    def more(self) -> bool:
        return self.at < len(self.data)


def _parse_hello(body: bytes) -> ClientHello:
    at = 2 + 32  # legacy_version, random
    for size in (1, 2, 1):  # of the lengths of session_id, cipher_suites and compression_methods
        at += size + int.from_bytes(body[at : at + size], "big")
    end = at
    if at < len(body):
        end = at + 2 + int.from_bytes(body[at : at + 2], "big")
        at += 2
    if end > len(body):  # also covers a cut in one of the fields above
        raise ValueError("truncated")
    server_name: str | None = None
    alpn: tuple[bytes, ...] = ()
    while at + 4 <= end:  # usually a dozen or more extensions, of which two matter
        kind, size = _EXTENSION.unpack_from(body, at)
        start, at = at + 4, at + 4 + size
        if kind == _SERVER_NAME:
            server_name = _server_name(_Cursor(body[start:at]))
        elif kind == _ALPN:
            alpn = _offers(_Cursor(body[start:at]))
    if at != end:
        raise ValueError("truncated")
    return ClientHello(server_name, alpn)


def _offers(content: _Cursor) -> tuple[bytes, ...]:
    offers, names = _Cursor(content.vector(2)), []
    while offers.more:
        names.append(offers.vector(1))
    return tuple(names)


def _server_name(content: _Cursor) -> str | None:
    names = _Cursor(content.vector(2))
    while names.more:
        kind, name = names.number(1), names.vector(2)
        if kind == 0:
            return name.decode("ascii", "strict").lower() if name.isascii() else None
    return None
