"""The state of one HTTP/1.x connection, as client or server: bytes in, heads and bodies out.

    reading   HEAD --head--> BODY --end--> DONE --next_cycle--> HEAD
                |              |
                +--- 101, 2xx to CONNECT ---> TUNNEL     (from here on the bytes are not HTTP)
    writing   HEAD --head--> BODY --end--> DONE --next_cycle--> HEAD

The two halves are independent, so an early response is not a special case. After a ProtocolError
nothing more can be read from the connection. The caller may write one response and then must close
the connection.

These few attributes are the whole state. Therefore another driver (the fast path) can take over a
connection between two calls, and give it back.
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
from proxy.wire.h1.fast_head import (
    encode_request,
    encode_response,
    recognise_request,
    recognise_response,
)
from proxy.wire.h1.strict_head import (
    check_bytes,
    check_lines,
    check_size,
    decide_request,
    decide_response,
)
from proxy.wire.messages import (
    END,
    EndOfMessage,
    Headers,
    Limits,
    ProtocolError,
    RequestHead,
    ResponseHead,
    Signal,
)

_HEAD_END = b"\r\n\r\n"
# Empty lines before a request line are skipped (RFC 9112 §2.2). A peer that sends more than these
# is not an HTTP client.
_EMPTY_LINES = 4


class Role(Enum):
    """The side of the connection that we are."""

    CLIENT = "client"
    SERVER = "server"


class At(Enum):
    """The state of one half of an exchange; see the diagram at the top of the module."""

    HEAD = "head"
    BODY = "body"
    DONE = "done"
    TUNNEL = "tunnel"


class Http1Connection:
    """One connection, from its first byte. `next_cycle` begins the next exchange on it."""

    __slots__ = (
        "_buffer", "_empty_lines", "_eof", "_limits", "_reader", "_role", "_searched", "_start",
        "_writer", "declined", "head_size", "keep_alive", "method", "peer_version", "reading",
        "writing",
    )  # fmt: skip

    def __init__(self, role: Role, limits: Limits) -> None:
        self._role = role
        self._limits = limits
        self._buffer = b""
        self._start = 0  # of the bytes that are not consumed yet
        self._searched = 0  # the end of a head is not before this offset
        self._empty_lines = 0  # skipped since the last head
        self._eof = False
        self._reader: BodyReader = FixedReader(0)
        self._writer: BodyWriter = writer(0)
        self.reading = At.HEAD
        self.writing = At.HEAD
        self.method = b""  # of the request in progress; a response cannot be parsed without it
        self.peer_version = b"1.1"
        self.keep_alive = True
        self.head_size = 0  # of the last head, in bytes
        self.declined = 0  # number of heads that fast_head.py declined, for the metrics

    # Reading...

    def receive_data(self, data: bytes) -> None:
        """Add what was read from the stream. b"" means EOF."""
        if not data:
            self._eof = True
        elif self._start == len(self._buffer):
            self._buffer, self._start, self._searched = data, 0, 0
        else:
            self._searched = max(0, self._searched - self._start)
            self._buffer, self._start = self._buffer[self._start :] + data, 0

    def receive_data_if(self, data: bytes) -> None:
        """Add what another driver has read from the stream. b"" means nothing, not EOF."""
        if data:
            self.receive_data(data)

    @property
    def buffered(self) -> int:
        """The number of bytes that are received and not consumed yet."""
        return len(self._buffer) - self._start

    @property
    def body_length(self) -> Length:
        """The framing of the message being read: bytes still to come, or a Framing."""
        match self._reader:
            case FixedReader(remaining=remaining):
                return remaining
            case ChunkedReader():
                return Framing.CHUNKED
            case _:
                return Framing.CLOSE

    def next_request(self) -> RequestHead | Signal:
        """Return the head of the next request, NEED_DATA, or CLOSED.

        CLOSED: the peer closed the connection between two requests. Raises ProtocolError.
        """
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
        """Return the head of the next response, NEED_DATA, or CLOSED.

        Informational responses are returned too; the final one follows them. CLOSED: the server
        closed the connection before the first byte of a response. Raises ProtocolError.
        """
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
        tunnel = response.status == 101 or (
            self.method == b"CONNECT" and 200 <= response.status < 300
        )
        self.reading = At.TUNNEL if tunnel else At.BODY
        return response

    def next_body(self) -> bytes | EndOfMessage | Signal:
        """Return the next piece of the body (never empty), its end, or NEED_DATA.

        Raises ProtocolError.
        """
        if self.reading is not At.BODY:
            return END
        event, self._start = self._reader.read(self._buffer, self._start)
        # Free the buffer now: the caller may block for long with the piece.
        if self._start == len(self._buffer):
            self._buffer, self._start, self._searched = b"", 0, 0
        if event is Signal.NEED_DATA and self._eof:
            event = self._reader.end()
        if isinstance(event, EndOfMessage):
            self.reading = At.DONE
        return event

    def take_rest(self) -> bytes:
        """Return the received bytes that are not HTTP: the first bytes of a tunnel."""
        rest, self._buffer, self._start = self._buffer[self._start :], b"", 0
        return rest

    def _whole_head(self) -> bytes | Signal:
        """Return the bytes of one head, including its empty line, or a Signal.

        Raises ProtocolError as soon as a head cannot become valid, without waiting for the rest.
        """
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
        """Check an incomplete head. Raises ProtocolError.

        This must stay cheap if a head arrives byte by byte. So each byte is checked once, lines are
        checked when one is complete, and sizes then and when they exceed a limit.
        """
        request = self._role is Role.SERVER
        new = max(self._start, self._searched - 2)
        last_line = self._buffer.rfind(b"\r\n", new)
        long_first_line = (
            self.buffered > self._limits.target
            and self._buffer.find(b"\r\n", self._start, self._start + self._limits.target) < 0
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
        """Update `keep_alive`: whether the peer continues after this message (RFC 9112 §9.3)."""
        options = headers.tokens(b"connection")
        if b"close" in options or (version == b"1.0" and b"keep-alive" not in options):
            self.keep_alive = False
        if isinstance(self._reader, CloseReader):
            self.keep_alive = False

    # Writing...

    def send_request(self, head: RequestHead, length: Length) -> bytes:
        """Encode the head of a request whose body has `length`.

        `head` must already have the framing fields.
        """
        self.method = head.method
        self.writing, self._writer = At.BODY, writer(length)
        return encode_request(head)

    def send_response(self, head: ResponseHead, length: Length) -> bytes:
        """Encode the head of a response whose body has `length`.

        `head` must already have the framing fields. An informational response changes no state.
        """
        if not head.informational:
            tunnel = head.status == 101 or (self.method == b"CONNECT" and 200 <= head.status < 300)
            self.writing, self._writer = At.TUNNEL if tunnel else At.BODY, writer(length)
            if isinstance(self._writer, CloseWriter):
                self.keep_alive = False
        return encode_response(head)

    def send_data(self, data: bytes) -> bytes:
        """Encode a piece of the body.

        Raises WriteError if the body exceeds its announced length.
        """
        return self._writer.data(data)

    def send_end(self, end: EndOfMessage) -> bytes:
        """Encode the end of the body. Raises WriteError if the body is shorter than announced."""
        last = self._writer.end(end.trailers)
        self.writing = At.DONE
        return last

    # Between two exchanges, and between two drivers...

    def take_over(
        self, method: bytes, reading: tuple[At, int | ChunkedReader], writing: tuple[At, Length]
    ) -> None:
        """Continue an exchange that another driver (proxy/fastpath) has begun.

        `reading`, `writing`: the state of each half, and the rest of its body.
        """
        self.method = method
        self.reading, to_read = reading
        self.writing, to_write = writing
        self._reader, self._writer = (
            FixedReader(to_read) if isinstance(to_read, int) else to_read,
            writer(to_write),
        )

    @property
    def reusable(self) -> bool:
        """Whether the next exchange may begin on this connection.

        Both halves must be DONE, and neither side may have asked to close. At a client, no received
        bytes may be left: they would be read as the response to the next request. At a server, they
        are the next request, possibly followed by EOF.
        """
        if not self.keep_alive or self.reading is not At.DONE or self.writing is not At.DONE:
            return False
        return (
            not self.buffered and not self._eof
            if self._role is Role.CLIENT
            else bool(self.buffered) or not self._eof
        )

    def next_cycle(self) -> None:
        """Prepare for the next exchange. Call it only if `reusable`."""
        if self._start == len(self._buffer):
            # An idle connection keeps no buffer.
            self._buffer, self._start, self._searched = b"", 0, 0
        self.reading = self.writing = At.HEAD
        self.method = b""
