"""One HTTP/1.1 connection to the API server: h11 on a stream.

It carries one request at a time. A watch has a connection to itself. h11 decides what is valid
HTTP: what it refuses raises InvalidAnswer. Failures of the stream raise Unreachable.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import h11
import trio

from control.kube.api_errors import InvalidAnswer, Unreachable

# The largest read in bytes.
_RECEIVE = 65536
# Probes after 15 s without data, and every 5 s; without an answer to three, the connection is lost.
_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)


def keep_alive(tcp: trio.SocketStream) -> None:
    """Let the kernel probe a silent connection. A watch is silent for a minute. Without probes, a
    server that is cut off looks the same."""
    for level, option, value in _KEEPALIVE:
        tcp.setsockopt(level, option, value)


@dataclass(frozen=True, slots=True)
class Request:
    """A request. `target` is path and query."""

    method: str
    target: str
    headers: Sequence[tuple[str, str]] = ()
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Head:
    """The head of a response. Field names are in lower case."""

    status: int
    headers: dict[str, str]


class ApiConnection:
    """A connection. Owns `stream`. A response head may have at most `max_head_bytes`."""

    def __init__(self, stream: trio.abc.Stream, authority: str, max_head_bytes: int) -> None:
        self._stream = stream
        self._authority = authority
        self._max_head_bytes = max_head_bytes
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=max_head_bytes)
        self.response_started = False  # whether a part of the current response has come

    async def request(self, request: Request, *fields: tuple[str, str]) -> Head:
        """Send a request. Returns the response head. Raises Unreachable, InvalidAnswer."""
        self.response_started = False
        headers = [("Host", self._authority), *request.headers, *fields]
        if request.body or request.method in ("POST", "PUT", "PATCH"):
            headers.append(("Content-Length", str(len(request.body))))
        sent = [
            self._http.send(
                h11.Request(method=request.method, target=request.target, headers=headers)
            ),
            self._http.send(h11.Data(data=request.body)) if request.body else b"",
            self._http.send(h11.EndOfMessage()),
        ]
        try:
            await self._stream.send_all(b"".join(part for part in sent if part))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise Unreachable("the connection was lost while the request was sent") from error
        while True:
            event = await self._next()
            if isinstance(event, h11.Response):
                return Head(
                    event.status_code,
                    {
                        name.decode("latin-1"): value.decode("latin-1")
                        for name, value in event.headers
                    },
                )
            if not isinstance(event, h11.InformationalResponse) or event.status_code == 101:
                raise InvalidAnswer(f"expected a response head, found {type(event).__name__}")

    async def read(self) -> bytes:
        """The next part of the response body; b"" is its end. Raises Unreachable, InvalidAnswer."""
        while True:
            event = await self._next()
            if isinstance(event, h11.Data):
                if event.data:
                    return bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return b""
            else:
                raise InvalidAnswer(f"expected a response body, found {type(event).__name__}")

    async def _next(self) -> h11.Event | type[h11.PAUSED]:
        try:
            while True:
                event = self._http.next_event()
                if not isinstance(event, type) or event is h11.PAUSED:
                    return event
                data = await self._stream.receive_some(_RECEIVE)
                self.response_started = self.response_started or bool(data)
                if not data and self._http.their_state is h11.SEND_RESPONSE:
                    raise Unreachable("the connection was closed before the response")
                self._http.receive_data(bytes(data))
        except h11.RemoteProtocolError as error:
            if error.error_status_hint == 431:
                raise InvalidAnswer(
                    f"the response head is larger than {self._max_head_bytes} bytes"
                    " (api.max_head_bytes)"
                ) from error
            if self._http.trailing_data[1]:
                raise Unreachable("the connection was closed within the response") from error
            raise InvalidAnswer(f"not HTTP: {error}") from error
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise Unreachable("the connection was lost") from error

    def is_quiet(self) -> bool:
        """Whether an idle connection can take the next request: the server has neither closed it
        nor sent anything.
        """
        below = (
            self._stream.transport_stream
            if isinstance(self._stream, trio.SSLStream)
            else self._stream
        )
        if not isinstance(below, trio.SocketStream):
            return True  # an in-memory stream: only its use shows whether it still works
        descriptor = socket.socket(fileno=os.dup(below.socket.fileno()))
        try:
            descriptor.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        finally:
            descriptor.close()
        return False

    def reuse(self) -> bool:
        """Prepare for the next request. False: the connection cannot be reused."""
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
            return True
        return False

    async def aclose(self) -> None:
        """Close at once, without a TLS close_notify."""
        await trio.aclose_forcefully(self._stream)
