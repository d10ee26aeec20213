"""gRPC calls whose answers are streams: one empty request each, many messages, over one HTTP/2
connection.

This is the client's half, without sockets: it gets bytes, and returns messages and the bytes to
send (`data_to_send`). The HTTP/2 engine is the proxy's own (proxy/wire/h2). Each message has a
prefix of five bytes: whether it is compressed, and its length. A call ends with a status in the
trailers, or in the head if there is no message.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes

from proxy.identity.credentials import visible
from proxy.wire.h1.connection import Role
from proxy.wire.h2.connection import Http2Connection
from proxy.wire.h2.events import (
    DataReceived,
    Event,
    Exhausted,
    GoingAway,
    HeadReceived,
    Http2Limits,
    StreamBroken,
    TrailersReceived,
)
from proxy.wire.h2.frames import Code
from proxy.wire.messages import Headers, ProtocolError, ResponseHead

INVALID_ARGUMENT, PERMISSION_DENIED, UNIMPLEMENTED = 3, 7, 12
# https://github.com/grpc/grpc/blob/master/doc/statuscodes.md
_NAMES = (
    "OK", "Canceled", "Unknown", "InvalidArgument", "DeadlineExceeded", "NotFound",
    "AlreadyExists", "PermissionDenied", "ResourceExhausted", "FailedPrecondition", "Aborted",
    "OutOfRange", "Unimplemented", "Internal", "Unavailable", "DataLoss", "Unauthenticated",
)  # fmt: skip
_PREFIX = 5
_MAX_WORDS = 500
MAX_HEAD = 16 * 1024
_DIGITS = re.compile(rb"[0-9]{1,3}", re.ASCII)


class CallEnded(Exception):
    """The call has ended, or the peer does not speak gRPC as it must. `status`: the gRPC status of
    the server; None if it sent none. `words`: the server's explanation, or ours.
    """

    def __init__(self, words: str, status: int | None = None) -> None:
        self.status = status
        self.words = words
        super().__init__(words if status is None else f"{status_name(status)}: {words}")


def status_name(status: int) -> str:
    """The name of a gRPC status."""
    return _NAMES[status] if status < len(_NAMES) else f"status {status}"


@dataclass(slots=True)
class _Call:
    path: bytes
    buffer: bytearray = field(default_factory=bytearray)


Item = tuple[bytes, bytes | CallEnded]


class GrpcStreams:
    """Calls of the methods `paths` (`/package.Service/Method`), each with an empty message.

    `metadata`: fields for each call, names in lower case. `max_message`: bytes; a longer message
    ends its call.
    """

    def __init__(
        self, paths: Sequence[bytes], metadata: list[tuple[bytes, bytes]], max_message: int
    ) -> None:
        self._http2 = Http2Connection(Role.CLIENT, Http2Limits(head=MAX_HEAD))
        self._max_message = max_message
        self._calls = {self._open(path, metadata): _Call(path) for path in paths}
        self._done: list[Item] = []

    def _open(self, path: bytes, metadata: list[tuple[bytes, bytes]]) -> int:
        pairs = [
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", path),
            (b":authority", b"localhost"),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
            (b"user-agent", b"isthmus"),
            *metadata,
        ]
        number = self._http2.send_request_fields(b"POST", pairs, end=False)
        self._http2.send_data(number, bytes(_PREFIX), end=True)
        return number

    def data_to_send(self) -> bytes:
        """Bytes for the server: the requests at first, then acknowledgements."""
        return self._http2.data_to_send()

    @property
    def partial(self) -> bool:
        """Whether a message has arrived in part."""
        return any(call.buffer for call in self._calls.values())

    def receive(self, data: bytes, now: float) -> list[Item]:
        """Process bytes that were read at `now`. b"": the connection has ended.

        Returns (path, message), and (path, CallEnded) once for each call that ends. Raises
        CallEnded if the connection cannot continue.
        """
        self._done = []
        if not data:
            raise CallEnded("the connection ended without a status")
        try:
            for event in self._http2.receive_data(data, now):
                self._take(event)
        except ProtocolError as error:
            raise CallEnded(visible(str(error))) from None
        return self._done

    def _take(self, event: Event) -> None:
        if isinstance(event, Exhausted):
            raise CallEnded(event.words)
        if isinstance(event, GoingAway):
            for number in [number for number in self._calls if number > event.last]:
                self._end(number, CallEnded("the server does not accept the call (GOAWAY)"))
            return
        call = self._calls.get(getattr(event, "stream", 0))
        if call is None:
            if isinstance(event, DataReceived):
                self._http2.consumed(event.stream, event.credit)
            return
        match event:
            case HeadReceived(stream=number, head=ResponseHead() as head, ended=ended):
                self._on_head(number, head, ended)
            case DataReceived(stream=number, data=data, credit=credit, ended=ended):
                self._http2.consumed(number, credit)
                self._on_data(number, call, data, ended)
            case TrailersReceived(stream=number, trailers=trailers):
                self._end(number, _status(trailers))
            case StreamBroken(stream=number, code=code, words=words):
                self._end(number, CallEnded(f"the stream was reset ({visible(words) or code})"))
            case _:
                pass  # a window of the request, which is sent already

    def _on_head(self, number: int, head: ResponseHead, ended: bool) -> None:
        if head.informational:
            return
        kind = head.headers.get(b"content-type") or b""
        if head.status != 200 or not kind.startswith(b"application/grpc"):
            shown = visible(kind[:100].decode("latin-1"))
            words = f"the answer is not gRPC: HTTP status {head.status}, content-type {shown!r}"
            self._end(number, CallEnded(words))
        elif ended:
            self._end(number, _status(head.headers))

    def _on_data(self, number: int, call: _Call, data: bytes, ended: bool) -> None:
        call.buffer += data
        while len(call.buffer) >= _PREFIX:
            compressed, size = call.buffer[0], int.from_bytes(call.buffer[1:_PREFIX], "big")
            if compressed:
                words = "a message is compressed, although the request does not allow that"
                if compressed != 1:
                    words = f"a message begins with the byte {compressed}, not 0 or 1"
                self._end(number, CallEnded(words))
                return
            if size > self._max_message:
                words = f"a message has {size} bytes, and the limit is {self._max_message}"
                self._end(number, CallEnded(words))
                return
            if len(call.buffer) < _PREFIX + size:
                break
            self._done.append((call.path, bytes(call.buffer[_PREFIX : _PREFIX + size])))
            del call.buffer[: _PREFIX + size]
        if ended:
            self._end(number, CallEnded("the stream ended without a status"))

    def _end(self, number: int, how: CallEnded) -> None:
        call = self._calls.pop(number)
        self._http2.reset(number, Code.CANCEL)
        self._done.append((call.path, how))


def _status(fields: Headers) -> CallEnded:
    """The end that a server states. RFC 3986 percent-encodes the words."""
    text = fields.get(b"grpc-status") or b""
    if not _DIGITS.fullmatch(text):
        return CallEnded("the call ended without a valid status")
    words = unquote_to_bytes(fields.get(b"grpc-message") or b"")[:_MAX_WORDS]
    return CallEnded(visible(words.decode("utf-8", "replace")) or "no explanation", int(text))
