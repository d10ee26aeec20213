"""The first bytes of a connection: a TLS ClientHello, HTTP/1, HTTP/2, or something we leave alone.

What a lenient server would serve as HTTP/1 is HTTP/1 here, however malformed it is: whoever reads it refuses it with 400. As something
opaque it would go on untouched, past all that is done for requests, with header fields that only a proxy may set, to a server that may
read it after all. So this is no reader of HTTP. It takes what any of the common servers overlooks: empty lines, blanks and control
characters in front (nginx, Node.js, Python, Netty), a bare LF, any white space between the parts, versions such as HTTP/1.10 or http/1.1,
a second CR, no version at all, any bytes as a method (wsgiref, Werkzeug and WEBrick take all). A method of the registry before a path is
HTTP/1 whatever follows. Otherwise the end of the line decides, for `HTTP/1` behind a blank is no other protocol's.

What cannot be told apart stays opaque: `GET key` is an inline command of Redis, and HTTP/0.9 to Python's http.server; `OPTIONS rtsp://a
RTSP/1.0` is RTSP, and Node.js answers it. A port that must not be reached like that is declared (docs/decisions/47-http-detection.md).

Pure functions of the bytes seen so far (they were peeked, and stay where they are). As long as more bytes could change the verdict there
is none:

    UNDECIDED   it may well be HTTP: wait for more
    UNLIKELY    it is hardly HTTP: the bytes may go on at once, but what follows them is to be looked at until there is a verdict

So a binary protocol does not wait, and a server-speaks-first protocol is the only one that always waits for the detection timeout. A line
may be as long as Python's servers read. What has come of one that is longer than `LINE_LIMIT` need not be kept as it is (`condensed`).
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from enum import Enum

# A ClientHello with a post-quantum key share has about 1.8 KiB; RFC 8446 §4.1.2 would allow 128 KiB, and nobody sends that.
HELLO_LIMIT = 16384

# RFC 9113 §3.4: sent first by every HTTP/2 client with prior knowledge. The first 16 bytes can be nothing else.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_PREFACE_CERTAIN = 16

# What one server or another passes over in front of a request line, and between its parts.
_PASSED_OVER = re.compile(rb"[\x00-\x20\x7f-\xa0]*")
_BLANK = rb"[\t\v\f\r \x1c-\x1f\x85\xa0]"
_TOKEN = rb"[-!#$%&'*+.^_`|~0-9A-Za-z]"
_METHOD = rb"(?:GET|HEAD|POST|PUT|DELETE|CONNECT|OPTIONS|TRACE|PATCH)"
# HTTP whatever follows.
_CERTAIN = re.compile(_METHOD + _BLANK + rb"++(?:/|(?i:https?://))")
# The end of a line that ends in a version of HTTP, more or less.
_VERSIONED = re.compile(_BLANK + rb"(?i:http)/[0-9][!-~]*+" + _BLANK + rb"*+\n")
_BLANKS = b"\t\v\f\r \x1c\x1d\x1e\x1f\x85\xa0"
# A request line, as far as it goes, that is worth waiting for. Methods of the registry are at most 17 characters long.
_VERSION_START = rb"(?:H(?:T(?:T(?:P(?:/(?:[0-9](?:\.(?:[0-9]\r?)?)?)?)?)?)?)?)?"
_REQUEST_START = re.compile(_TOKEN + rb"{1,24}(?: (?:[!-~\x80-\xff]+(?: " + _VERSION_START + rb")?)?)?")
_MEANT_START = re.compile(rb"[A-Z]{1,24}(?:[ \t]+(?:/[^\n]*)?)?")
_METHOD_START = re.compile(_METHOD + rb" [/*!-~]")
# Beyond this (bytes) a line that goes on and on is HTTP/1 with a target over the limit (414), if it began as one.
LINE_LIMIT = 4096
# http.server answers 414 to longer lines, and what stands before them counts here too.
LONGEST_LINE = 65536
# So much (bytes) of a word shows whether it begins like a version.
_VERSION = 64
_LONG = re.compile(_METHOD + _BLANK + rb"|" + _TOKEN + rb"++" + _BLANK + rb"++(?:/|(?i:https?://))[!-~\x80-\xff]*+\Z")
_LINES_ONLY = re.compile(rb"[\t\n\v\f\r ]*+")
# Type and length of an extension of a ClientHello, and the types that are read (RFC 8446 §4.2).
_EXTENSION = struct.Struct("!HH")
_SERVER_NAME, _ALPN = 0, 16
# As many empty lines as h1/connection.py skips before a request line.
_EMPTY_LINES = b"\r\n" * 4


class Protocol(Enum):
    """What is spoken inside a connection."""

    HTTP1 = "http/1"
    HTTP2 = "http/2"
    OPAQUE = "opaque"


class Undecided(Enum):
    """More bytes are needed to tell."""

    UNDECIDED = "undecided"
    UNLIKELY = "unlikely"


UNDECIDED = Undecided.UNDECIDED
UNLIKELY = Undecided.UNLIKELY


@dataclass(frozen=True, slots=True)
class ClientHello:
    """What of a ClientHello matters here: whom it asks for and what it would speak (RFC 6066 §3, RFC 7301)."""

    server_name: str | None
    alpn: tuple[bytes, ...]


class NotTLS(Enum):
    """What came is no ClientHello."""

    NOT_TLS = "not TLS"


NOT_TLS = NotTLS.NOT_TLS


def protocol(data: bytes) -> Protocol | Undecided:
    """What `data`, the first bytes of a connection, begins."""
    if data[:_PREFACE_CERTAIN] == _PREFACE[: len(data[:_PREFACE_CERTAIN])]:
        return Protocol.HTTP2 if len(data) >= _PREFACE_CERTAIN else UNDECIDED
    start = data[:LINE_LIMIT]
    found = _PASSED_OVER.match(start)
    at = found.end() if found is not None else 0
    line = start[at:]
    if _CERTAIN.match(line):
        return Protocol.HTTP1
    if len(start) == LINE_LIMIT and b"\n" not in line and (_LONG.match(line) if line else _LINES_ONLY.fullmatch(start)):
        return Protocol.HTTP1  # what lies beyond may not change a verdict any more
    end = data.find(b"\n", at, LONGEST_LINE) + 1
    if end:
        return Protocol.HTTP1 if _VERSIONED.search(data, at, end) else Protocol.OPAQUE
    if len(data) >= LONGEST_LINE:
        return Protocol.OPAQUE
    if len(start) == LINE_LIMIT or not _EMPTY_LINES.startswith(start[:at]):
        return UNLIKELY
    return UNDECIDED if not line or _REQUEST_START.fullmatch(line) or _MEANT_START.fullmatch(line) else UNLIKELY


def condensed(data: bytes) -> bytes:
    """Less of `data`, of which more than LINE_LIMIT has come and which is UNLIKELY. With the same bytes behind it, the verdict is the same,
    but for LONGEST_LINE; or HTTP, where the last word begins like a version and goes on as something else."""
    rest = data[LINE_LIMIT:]
    kept = rest.rstrip(_BLANKS)
    word = max(kept.rfind(_BLANKS[at : at + 1]) for at in range(len(_BLANKS)))
    return data[:LINE_LIMIT] + kept[max(word, 0) :][:_VERSION] + rest[len(kept) : len(kept) + 1]


def settle(data: bytes) -> Protocol:
    """The verdict when nothing more comes: HTTP/1 if the beginning of a common request line is there (its own deadlines then see to
    a client that is slow on purpose), otherwise opaque."""
    line = data[:LINE_LIMIT].lstrip(b"\r\n")
    return Protocol.HTTP1 if _METHOD_START.match(line) and _REQUEST_START.fullmatch(line) else Protocol.OPAQUE


def client_hello(data: bytes) -> ClientHello | NotTLS | Undecided:
    """The ClientHello that `data` begins with. A malformed one is not for us to complain about: it is passed on as it is."""
    if data[:3] not in (b"\x16\x03\x01", b"\x16\x03\x03", b"\x16\x03\x02") and data != b"\x16\x03"[: len(data)]:
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
    """The payloads of the handshake records that `data` begins with, for a hello may be cut over several; and whether nothing but such
    records was met (RFC 8446 §5.1: none of them is empty)."""
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
    """Reads length-prefixed vectors; raises ValueError past the end."""

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
    for size in (1, 2, 1):  # the lengths of legacy_session_id, cipher_suites, legacy_compression_methods
        at += size + int.from_bytes(body[at : at + size], "big")
    end = at
    if at < len(body):
        end = at + 2 + int.from_bytes(body[at : at + 2], "big")
        at += 2
    if end > len(body):  # whatever was cut short: nothing above can have come back
        raise ValueError("truncated")
    server_name: str | None = None
    alpn: tuple[bytes, ...] = ()
    while at + 4 <= end:  # a dozen or more, and two of them matter
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
