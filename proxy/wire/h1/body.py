"""HTTP/1 bodies: their framing (RFC 9112 §6.3), readers and writers.

Both head parsers use the same body readers, so a body cannot mean different things on the two
paths. The chunked reader is our own and stricter than h11's: it accepts no bare LF, it limits and
drops chunk extensions, and it limits trailers. docs/decisions has the reasons.
tests/wire/h1/test_body.py compares it with h11 on every input that both accept.

The connection calls `read(buffer, start)`. The reader looks at the bytes from `start` on, and
returns an event and the offset up to which it has consumed the buffer. It never collects a body:
each piece that has arrived is passed on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum

from proxy.wire.grammar import FIELD_VALUE, TOKEN
from proxy.wire.messages import (
    END,
    EndOfMessage,
    Headers,
    ProtocolError,
    RequestHead,
    ResponseHead,
    Signal,
    may_trail,
)

Read = tuple[bytes | EndOfMessage | Signal, int]

_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[ \t!-~\x80-\xff]*)?")
# An incomplete line of that form. It may already have the CR of its CRLF.
_CHUNK_LINE_SO_FAR = re.compile(rb"[0-9A-Fa-f]{1,16}[ \t]*(?:;[ \t!-~\x80-\xff]*)?\r?")
# A size and a few extensions. nginx and HAProxy have similar limits for a chunk line.
_CHUNK_LINE_LIMIT = 1024
_TRAILER = re.compile(rb"(" + TOKEN + rb"):[ \t]*(" + FIELD_VALUE + rb")[ \t]*")


class Framing(Enum):
    """The framing of a body of unknown length: chunks, or everything until the connection ends."""

    CHUNKED = "chunked"
    CLOSE = "close"


Length = int | Framing


def request_length(head: RequestHead) -> Length:
    """The framing of the body of a checked request.

    A request without framing fields has no body.
    """
    if b"transfer-encoding" in head.headers:
        return Framing.CHUNKED
    value = head.headers.get(b"content-length")
    return int(value) if value is not None else 0


def response_length(method: bytes, head: ResponseHead) -> Length:
    """The framing of the body of a response to `method`."""
    if (
        method == b"HEAD"
        or head.status in (204, 304)
        or head.status < 200
        or (method == b"CONNECT" and head.status < 300)
    ):
        return 0
    if b"transfer-encoding" in head.headers:
        return Framing.CHUNKED
    value = head.headers.get(b"content-length")
    return int(value) if value is not None else Framing.CLOSE


@dataclass(slots=True)
class FixedReader:
    """Reads a body of known length. `remaining`: bytes still to come."""

    remaining: int

    def read(self, buffer: bytes, start: int) -> Read:
        if not self.remaining:
            return END, start
        # Python copies nothing if the slice covers the whole buffer, which is the common case.
        data = buffer[start : start + self.remaining]
        if not data:
            return Signal.NEED_DATA, start
        self.remaining -= len(data)
        return data, start + len(data)

    def end(self) -> EndOfMessage:
        if self.remaining:
            raise ProtocolError(
                f"the connection ended {self.remaining} bytes before the end of the body"
            )
        return END


class CloseReader:
    """Reads until the connection ends. Only a response may be delimited so."""

    __slots__ = ()

    def read(self, buffer: bytes, start: int) -> Read:
        return (buffer[start:] or Signal.NEED_DATA), len(buffer)

    def end(self) -> EndOfMessage:
        return END


class _At(Enum):
    """The position in the chunked grammar (RFC 9112 §7.1)."""

    SIZE = "chunk-size line"
    DATA = "chunk-data"
    DATA_END = "CRLF after chunk-data"
    TRAILERS = "trailer section"
    DONE = "done"


@dataclass(slots=True)
class ChunkedReader:
    """Reads chunks, then trailers.

    `limit`: maximum size of the trailer section in bytes. `fields`: maximum number of trailers.
    """

    limit: int
    fields: int
    at: _At = _At.SIZE
    remaining: int = 0
    trailers: Headers = field(default_factory=Headers)
    trailer_bytes: int = 0

    def read(self, buffer: bytes, start: int) -> Read:
        while True:
            if self.at is _At.DATA:
                data = buffer[start : start + self.remaining]
                if not data:
                    return Signal.NEED_DATA, start
                self.remaining -= len(data)
                if not self.remaining:
                    self.at = _At.DATA_END
                return data, start + len(data)
            if self.at is _At.DONE:
                return (EndOfMessage(self.trailers) if len(self.trailers) else END), start
            end = buffer.find(b"\r\n", start, start + self._line_limit() + 2)
            if end < 0:
                self._check_incomplete(buffer[start : start + self._line_limit() + 2])
                return Signal.NEED_DATA, start
            self._line(buffer[start:end])
            start = end + 2

    def end(self) -> EndOfMessage:
        raise ProtocolError(
            f"the connection ended in the middle of a chunked body ({self.at.value})"
        )

    def _line_limit(self) -> int:
        return self.limit if self.at is _At.TRAILERS else _CHUNK_LINE_LIMIT

    def _check_incomplete(self, line: bytes) -> None:
        """Refuse a line that no continuation can make valid, so a bad peer cannot make us wait."""
        if b"\n" in line or b"\r" in line[:-1]:
            raise ProtocolError("a bare CR or LF in the chunked framing")
        if self.at is _At.DATA_END and line not in (b"", b"\r"):
            raise ProtocolError("a chunk is longer than its size")
        if self.at is _At.SIZE and line and not _CHUNK_LINE_SO_FAR.fullmatch(line):
            raise ProtocolError("a chunk size that is not a hexadecimal number")
        # The CR may belong to the CRLF. It must not count, so the limit does not depend on how the
        # line is split into reads.
        if len(line.removesuffix(b"\r")) > self._line_limit():
            raise ProtocolError(
                "a line of the chunked framing is too long", 431 if self.at is _At.TRAILERS else 400
            )

    def _line(self, line: bytes) -> None:
        if b"\n" in line or b"\r" in line:
            raise ProtocolError("a bare CR or LF in the chunked framing")
        if self.at is _At.DATA_END:
            if line:
                raise ProtocolError("a chunk is longer than its size")
            self.at = _At.SIZE
        elif self.at is _At.SIZE:
            match = _CHUNK_LINE.fullmatch(line)
            if match is None:
                raise ProtocolError("a chunk size that is not a hexadecimal number")
            self.remaining = int(match[1], 16)
            self.at = _At.DATA if self.remaining else _At.TRAILERS
        elif line:
            self._trailer(line)
        else:
            self.at = _At.DONE

    def _trailer(self, line: bytes) -> None:
        self.trailer_bytes += len(line) + 2
        if self.trailer_bytes > self.limit or len(self.trailers) >= self.fields:
            raise ProtocolError("the trailer section is over its limit", 431)
        match = _TRAILER.fullmatch(line)
        if match is None:
            raise ProtocolError("a malformed trailer field")
        if may_trail(match[1].lower()):
            self.trailers.add(match[1], match[2])


BodyReader = FixedReader | CloseReader | ChunkedReader


class WriteError(Exception):
    """The body that we are sending is not as long as its head announced.

    The cause is on our side, or the source of the body. The connection cannot be used any more.
    """


@dataclass(slots=True)
class FixedWriter:
    """Writes a body whose length the head has announced. Raises WriteError for another length."""

    remaining: int

    def data(self, data: bytes) -> bytes:
        if len(data) > self.remaining:
            raise WriteError(f"{len(data) - self.remaining} bytes more than the Content-Length")
        self.remaining -= len(data)
        return data

    def end(self, trailers: Headers) -> bytes:  # noqa: ARG002  # trailers need chunks
        if self.remaining:
            raise WriteError(f"{self.remaining} bytes fewer than the Content-Length")
        return b""


class CloseWriter:
    """Writes a body that ends with the connection.

    The caller must close the connection after it.
    """

    __slots__ = ()

    def data(self, data: bytes) -> bytes:
        return data

    def end(self, trailers: Headers) -> bytes:  # noqa: ARG002  # trailers need chunks
        return b""


class ChunkedWriter:
    """Writes a chunked body (RFC 9112 §7.1): one chunk for each piece."""

    __slots__ = ()

    def data(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if data else b""

    def end(self, trailers: Headers) -> bytes:
        if not trailers.items:
            return b"0\r\n\r\n"
        return b"0\r\n" + b"".join([b"%b: %b\r\n" % item for item in trailers.items]) + b"\r\n"


BodyWriter = FixedWriter | CloseWriter | ChunkedWriter


def writer(length: Length) -> BodyWriter:
    """Return the writer for a body with this framing."""
    if length is Framing.CHUNKED:
        return ChunkedWriter()
    if length is Framing.CLOSE:
        return CloseWriter()
    return FixedWriter(length)
