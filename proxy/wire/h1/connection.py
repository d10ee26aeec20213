"""One HTTP/1.x connection, in either role: bytes in, heads and bodies out, and back.

    reading   HEAD --head--> BODY --end--> DONE --next_cycle--> HEAD
                |              |
                +--- 101, 2xx to CONNECT ---> TUNNEL     (what is read from here on is not HTTP)
    writing   HEAD --head--> BODY --end--> DONE --next_cycle--> HEAD

Both halves move by themselves, so an early response needs no special case. After a ProtocolError the connection is of no further use
for reading; the caller may still write one response, and closes.

The state is these few attributes and nothing else, so that another driver can take a connection over between two calls, and give it
back.
"""

from __future__ import annotations

from enum import Enum

from proxy.wire.h1.body import (
    BodyReader,
    BodyWriter,
    ChunkedReader,
    CloseReader,
    CloseWriter,
    FixedReader,
    Framing,
    Length,
    request_length,
    response_length,
    writer,
)
from proxy.wire.h1.fast_head import encode_request, encode_response, recognise_request, recognise_response
from proxy.wire.h1.strict_head import check_bytes, check_lines, check_size, decide_request, decide_response
from proxy.wire.messages import END, EndOfMessage, Headers, Limits, ProtocolError, RequestHead, ResponseHead, Signal

_HEAD_END = b"\r\n\r\n"
# Empty lines before a request line are skipped (RFC 9112 §2.2); a peer that sends more than a few of them is not an HTTP client.
_EMPTY_LINES = 4


class Role(Enum):
    """Which side of the connection we are."""

    CLIENT = "client"
    SERVER = "server"


class At(Enum):
    """How far one half of an exchange has come; the diagram stands above."""

    HEAD = "head"
    BODY = "body"
    DONE = "done"
    TUNNEL = "tunnel"


class Http1Connection:
    """One connection, from its first byte; `next_cycle` begins the next exchange on it."""

    __slots__ = (
        "_buffer", "_empty_lines", "_eof", "_limits", "_reader", "_role", "_searched", "_start", "_writer",
        "declined", "head_size", "keep_alive", "method", "peer_version", "reading", "writing",
    )  # fmt: skip

    def __init__(self, role: Role, limits: Limits) -> None:
        self._role = role
        self._limits = limits
        self._buffer = b""
        self._start = 0  # of what is not used up yet
        self._searched = 0  # no head's end lies before this
        self._empty_lines = 0  # skipped since the last head
        self._eof = False
        self._reader: BodyReader = FixedReader(0)
        self._writer: BodyWriter = writer(0)
        self.reading = At.HEAD
        self.writing = At.HEAD
        self.method = b""  # of the request in progress: a response means nothing without it
        self.peer_version = b"1.1"
        self.keep_alive = True
        self.head_size = 0  # bytes of the last head
        self.declined = 0  # heads that took the longer way, for the metrics

    # Reading...

    def receive_data(self, data: bytes) -> None:
        """Take what was read from the stream; b"" is its end."""
        if not data:
            self._eof = True
        elif self._start == len(self._buffer):
            self._buffer, self._start, self._searched = data, 0, 0
        else:
            self._searched = max(0, self._searched - self._start)
            self._buffer, self._start = self._buffer[self._start :] + data, 0

    def receive_data_if(self, data: bytes) -> None:
        """The same for what another driver has read, which is not the end if it is nothing."""
        if data:
            self.receive_data(data)

    @property
    def buffered(self) -> int:
        """Bytes received and not used up yet."""
        return len(self._buffer) - self._start

    @property
    def body_length(self) -> Length:
        """Of the message being read: bytes still to come, or how they are delimited."""
        match self._reader:
            case FixedReader(remaining=remaining):
                return remaining
            case ChunkedReader():
                return Framing.CHUNKED
            case CloseReader():
                return Framing.CLOSE

    def next_request(self) -> RequestHead | Signal:
        """The next request's head, or NEED_DATA, or CLOSED (between two requests only). Raises ProtocolError."""
        head = self._whole_head()
        if isinstance(head, Signal):
            return head
        recognised = recognise_request(head, self._limits)
        if recognised is not None:
            request, length = recognised
            self._reader = FixedReader(length)
        else:
            request = decide_request(head, self._limits)
            self.declined += 1
            self._reader = self._body_reader(request_length(request))
            self._note_connection(request.headers, request.version)
        self.method, self.peer_version = request.method, request.version
        self.reading = At.BODY
        return request

    def next_response(self) -> ResponseHead | Signal:
        """The next response's head, informational ones too (the final one follows them). CLOSED: the server went away before it sent
        one byte of it. Raises ProtocolError."""
        head = self._whole_head()
        if isinstance(head, Signal):
            return head
        recognised = recognise_response(head, self._limits)
        if recognised is not None:
            response, length = recognised
            if self.method in (b"HEAD", b"CONNECT"):
                length = response_length(self.method, response)
            self._reader = self._body_reader(length if response.status not in (204, 304) else 0)
        else:
            response = decide_response(head, self._limits)
            self.declined += 1
            if response.informational:
                return response
            self._reader = self._body_reader(response_length(self.method, response))
            self._note_connection(response.headers, response.version)
        self.peer_version = response.version
        tunnel = response.status == 101 or (self.method == b"CONNECT" and 200 <= response.status < 300)
        self.reading = At.TUNNEL if tunnel else At.BODY
        return response

    def next_body(self) -> bytes | EndOfMessage | Signal:
        """The next piece of the body being read (never empty), its end, or NEED_DATA. Raises ProtocolError."""
        if self.reading is not At.BODY:
            return END
        event, self._start = self._reader.read(self._buffer, self._start)
        if self._start == len(self._buffer):  # kept no longer than it is of use: whoever has the piece may wait for long
            self._buffer, self._start, self._searched = b"", 0, 0
        if event is Signal.NEED_DATA and self._eof:
            event = self._reader.end()
        if isinstance(event, EndOfMessage):
            self.reading = At.DONE
        return event

    def take_rest(self) -> bytes:
        """What was received and is not HTTP: the first bytes of a tunnel."""
        rest, self._buffer, self._start = self._buffer[self._start :], b"", 0
        return rest

    def _whole_head(self) -> bytes | Signal:
        """The bytes of one head through its empty line; what is certainly wrong is refused without waiting for the rest of it."""
        if self._role is Role.SERVER:
            self._skip_empty_lines()
        end = self._buffer.find(_HEAD_END, max(self._start, self._searched - 3))
        if end >= 0:
            head = self._buffer[self._start : end + 4]
            self._start, self._empty_lines = end + 4, 0
            self.head_size = len(head)
            return head
        if self._start == len(self._buffer):
            return Signal.CLOSED if self._eof else Signal.NEED_DATA
        self._check_part()
        if self._eof:
            raise ProtocolError("the connection ended in the middle of a head")
        self._searched = len(self._buffer)
        return Signal.NEED_DATA

    def _check_part(self) -> None:
        """Raise for what has come of a head. A head that comes byte by byte must stay cheap: bytes are looked at once, lines when one is
        complete, sizes then and where they are over a limit."""
        request = self._role is Role.SERVER
        new = max(self._start, self._searched - 2)
        last_line = self._buffer.rfind(b"\r\n", new)
        long_first_line = (
            self.buffered > self._limits.target and self._buffer.find(b"\r\n", self._start, self._start + self._limits.target) < 0
        )
        if last_line >= 0 or long_first_line or self.buffered > self._limits.head:
            check_size(self._buffer[self._start :], self._limits, request=request)
        check_bytes(self._buffer, new, complete=False)
        if last_line >= 0:
            check_lines(self._buffer[self._start : last_line + 2], request=request)

    def _skip_empty_lines(self) -> None:
        while self._empty_lines < _EMPTY_LINES and self._buffer.startswith(b"\r\n", self._start):
            self._start += 2
            self._empty_lines += 1

    def _body_reader(self, length: Length) -> BodyReader:
        if length is Framing.CHUNKED:
            return ChunkedReader(self._limits.head, self._limits.fields)
        return CloseReader() if length is Framing.CLOSE else FixedReader(length)

    def _note_connection(self, headers: Headers, version: bytes) -> None:
        """RFC 9112 §9.3: whether the peer will go on after this message."""
        options = headers.tokens(b"connection")
        if b"close" in options or (version == b"1.0" and b"keep-alive" not in options):
            self.keep_alive = False
        if isinstance(self._reader, CloseReader):
            self.keep_alive = False

    # Writing...

    def send_request(self, head: RequestHead, length: Length) -> bytes:
        """The bytes of a request's head; the body that follows has `length`. The framing fields must be in `head` already."""
        self.method = head.method
        self.writing, self._writer = At.BODY, writer(length)
        return encode_request(head)

    def send_response(self, head: ResponseHead, length: Length) -> bytes:
        """The same for a response; an informational one changes nothing."""
        if not head.informational:
            tunnel = head.status == 101 or (self.method == b"CONNECT" and 200 <= head.status < 300)
            self.writing, self._writer = At.TUNNEL if tunnel else At.BODY, writer(length)
            if isinstance(self._writer, CloseWriter):
                self.keep_alive = False
        return encode_response(head)

    def send_data(self, data: bytes) -> bytes:
        """Raises WriteError when the body gets longer than was announced."""
        return self._writer.data(data)

    def send_end(self, end: EndOfMessage) -> bytes:
        """Raises WriteError when the body is shorter than was announced."""
        last = self._writer.end(end.trailers)
        self.writing = At.DONE
        return last

    # Between two exchanges, and between two drivers...

    def take_over(self, method: bytes, reading: tuple[At, int | ChunkedReader], writing: tuple[At, Length]) -> None:
        """Go on within an exchange that another driver (proxy/fastpath) has brought so far: how far each half is, and what of its body is
        still to come."""
        self.method = method
        self.reading, to_read = reading
        self.writing, to_write = writing
        self._reader, self._writer = FixedReader(to_read) if isinstance(to_read, int) else to_read, writer(to_write)

    @property
    def reusable(self) -> bool:
        """Both halves came to their end, and nothing was said against going on. A server with bytes to spare may not be asked again: they
        would pass for the answer to the next request. A client with bytes to spare has sent the next one, if need be with its EOF."""
        if not self.keep_alive or self.reading is not At.DONE or self.writing is not At.DONE:
            return False
        return not self.buffered and not self._eof if self._role is Role.CLIENT else bool(self.buffered) or not self._eof

    def next_cycle(self) -> None:
        """Get ready for the next exchange; only after `reusable`."""
        if self._start == len(self._buffer):
            self._buffer, self._start, self._searched = b"", 0, 0  # an idle connection does not keep its last read
        self.reading = self.writing = At.HEAD
        self.method = b""
