"""The first bytes of a connection: a TLS ClientHello, HTTP/1, HTTP/2, or something we leave alone.

A line that was meant for HTTP/1 and is malformed, by a NUL for instance, is HTTP/1 too: whoever reads it refuses it with 400. As something
opaque it would go on untouched, past all that is done for requests, to a server that may read it after all. What decides is how the line
ends, for `HTTP/1.1` behind a blank is no other protocol's. Of those that begin like a request (capitals, a blank, a slash), only one whose
client then sends control characters, and no line feed, has to wait for the detection timeout, and then goes on as it is.

Pure functions of the bytes seen so far (they were peeked, nobody has consumed them). Each says UNDECIDED only as long as more bytes
could still change its mind, so that a server-speaks-first protocol is the only one that ever waits for the detection timeout.
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

# A request line, as far as it goes. Methods of the registry are at most 17 characters long; what is longer is somebody else's protocol.
_REQUEST_LINE = re.compile(rb"[-!#$%&'*+.^_`|~0-9A-Za-z]{1,24} [!-~\x80-\xff]+ HTTP/[0-9]\.[0-9]\r?\n")
_VERSION_START = rb"(?:H(?:T(?:T(?:P(?:/(?:[0-9](?:\.(?:[0-9]\r?)?)?)?)?)?)?)?)?"
_REQUEST_START = re.compile(rb"[-!#$%&'*+.^_`|~0-9A-Za-z]{1,24}(?: (?:[!-~\x80-\xff]+(?: " + _VERSION_START + rb")?)?)?")
# What may still become one that was meant for HTTP/1 and is none: origin-form behind a word in capitals, then anything.
_MEANT_START = re.compile(rb"[A-Z]{1,24}(?:[ \t]+(?:/[^\n]*)?)?")
_MEANT = re.compile(rb"[A-Z]{1,24}[ \t]+/[^\n]*[ \t]HTTP/[0-9]\.[0-9][ \t]*\r?\n")
_METHOD_START = re.compile(rb"(?:GET|HEAD|POST|PUT|DELETE|CONNECT|OPTIONS|TRACE|PATCH) [/*!-~]")
# Beyond this a request line that goes on and on is HTTP/1 with a target over the limit (414), if it began as one.
_LINE_LIMIT = 4096
# Type and length of an extension of a ClientHello, and the types that are read (RFC 8446 §4.2).
_EXTENSION = struct.Struct("!HH")
_SERVER_NAME, _ALPN = 0, 16
# As many empty lines as http1.py skips before a request line, in bytes.
_EMPTY_LINES = 8


class Protocol(Enum):
    """What is spoken inside a connection."""

    HTTP1 = "http/1"
    HTTP2 = "http/2"
    OPAQUE = "opaque"


class Undecided(Enum):
    """More bytes are needed to tell."""

    UNDECIDED = "undecided"


UNDECIDED = Undecided.UNDECIDED


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
    start = _first_line(data)
    if start in (b"", b"\r") and len(data) <= _EMPTY_LINES:
        return UNDECIDED
    if _REQUEST_LINE.match(start) or _MEANT.match(start):
        return Protocol.HTTP1
    if not _REQUEST_START.fullmatch(start) and not _MEANT_START.fullmatch(start):
        return Protocol.OPAQUE
    return settle(start) if len(start) == _LINE_LIMIT else UNDECIDED


def settle(data: bytes) -> Protocol:
    """The verdict when nothing more comes: HTTP/1 if the beginning of a common request line is there (its own deadlines then see to
    a client that is slow on purpose), otherwise opaque."""
    line = _first_line(data)
    return Protocol.HTTP1 if _METHOD_START.match(line) and _REQUEST_START.fullmatch(line) else Protocol.OPAQUE


def _first_line(data: bytes) -> bytes:
    """What could be the request line, behind empty lines and up to the limit: what lies beyond may not change a verdict any more."""
    at = 0
    while at < _EMPTY_LINES and data.startswith(b"\r\n", at):
        at += 2
    return data[at : at + _LINE_LIMIT]


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
