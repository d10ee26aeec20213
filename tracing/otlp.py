"""OTLP over HTTP: the client that posts one protobuf message to a collector, over a persistent
connection.

The SDK's encoder is used, but not its exporter (docs/decisions/18-otlp-client.md). The exporter has
no deadline for a whole request, does not limit the size of a response, does not report why an
export failed, and costs 10 MiB of memory. This client sets the packet mark: without the mark, a
proxy that shares its user id with the application would be redirected to itself.

The rules are those of the OTLP specification. 2xx is accepted; the response may say that some spans
were rejected. 429, 502, 503, 504 and a broken connection may be retried, after Retry-After. Every
other response is final.
"""

from __future__ import annotations

import gzip
import http.client
import io
import math
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from tracing.queue import Outcome

# The answer to an export has a few bytes; an error has a sentence.
_MOST_ANSWER = 64 * 1024
_AGAIN = frozenset({429, 502, 503, 504})
_LONGEST_AFTER = 300.0


@dataclass(frozen=True, slots=True)
class Collector:
    """`endpoint`: http or https URL with its path. `mark`: packet mark of the connections."""

    endpoint: str
    headers: Mapping[str, str] = field(default_factory=dict)
    certificate: str | None = None  # trust roots (PEM file) instead of the system's
    client_certificate: str | None = None
    client_key: str | None = None
    gzip: bool = False
    mark: int | None = None


@dataclass(frozen=True, slots=True)
class CollectorResponse:
    """A complete answer with a 2xx status."""

    body: bytes


class Post:
    """Posts to one collector. For use by one thread. Call `close` at the end."""

    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        url = urlsplit(collector.endpoint)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"{collector.endpoint} is not an http or https URL")
        self._host, self._tls = url.hostname, url.scheme == "https"
        self._port = url.port or (443 if self._tls else 80)
        self._path = (url.path or "/") + (f"?{url.query}" if url.query else "")
        self._context = self._trust() if self._tls else None
        self._connection: http.client.HTTPConnection | None = None
        self._timed: _Timed | None = None

    def _trust(self) -> ssl.SSLContext:
        collector = self._collector
        context = ssl.create_default_context(cafile=collector.certificate)
        if collector.client_certificate:
            context.load_cert_chain(collector.client_certificate, collector.client_key)
        return context

    def send(self, body: bytes, seconds: float) -> Outcome | CollectorResponse:
        """Send one request, with `seconds` until the complete answer.

        If a reused connection turns out to be dead, the request is repeated once on a new one.
        """
        deadline = time.monotonic() + seconds
        kept = self._connection is not None
        try:
            return self._request(body, deadline)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            if not kept or isinstance(error, TimeoutError):
                return _broken(error, self._collector.endpoint)
        try:
            return self._request(body, deadline)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            return _broken(error, self._collector.endpoint)

    def _request(self, body: bytes, deadline: float) -> Outcome | CollectorResponse:
        connection, timed = self._connected(deadline)
        timed.deadline = deadline
        headers = {
            "Content-Type": "application/x-protobuf",
            "User-Agent": "isthmus",
            **self._collector.headers,
        }
        if self._collector.gzip:
            body, headers["Content-Encoding"] = gzip.compress(body, 1), "gzip"
        connection.request("POST", self._path, body, headers)
        response = connection.getresponse()
        answer = response.read(_MOST_ANSWER)
        if not response.isclosed():
            response.close()  # the rest of the answer is not needed
            self.close()
        if 200 <= response.status < 300:
            return CollectorResponse(answer)
        words = f"{self._collector.endpoint} answered {response.status} {response.reason}"
        again = response.status in _AGAIN
        after = retry_after(response.getheader("Retry-After")) if again else 0.0
        return Outcome(f"status_{response.status // 100}xx", again, after, words=words)

    def _connected(self, deadline: float) -> tuple[http.client.HTTPConnection, _Timed]:
        if self._connection is None or self._timed is None or self._connection.sock is None:
            sock = self._connect(deadline)
            if self._context is not None:
                sock.settimeout(max(0.001, deadline - time.monotonic()))
                sock = self._context.wrap_socket(sock, server_hostname=self._host)
            self._connection = http.client.HTTPConnection(self._host, self._port)
            self._connection.auto_open = 0  # a connection that it opened would lack the mark
            self._timed = self._connection.sock = _Timed(sock)
        return self._connection, self._timed

    def _connect(self, deadline: float) -> socket.socket:
        failure: OSError = OSError("the name has no address")
        for family, kind, protocol, _, address in socket.getaddrinfo(
            self._host, self._port, type=socket.SOCK_STREAM
        ):
            sock = socket.socket(family, kind, protocol)
            try:
                if self._collector.mark is not None:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, self._collector.mark)
                sock.settimeout(max(0.001, deadline - time.monotonic()))
                sock.connect(address)
            except OSError as error:
                sock.close()
                failure = error
            else:
                return sock
        raise failure

    def close(self) -> None:
        connection, timed, self._connection, self._timed = self._connection, self._timed, None, None
        if connection is not None and timed is not None:
            connection.close()
            timed.read_to_end()


class _Timed:
    """A socket for http.client with one deadline for all operations.

    A socket's own timeout starts again with each operation.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._reading = False
        self._ended = False
        self.deadline = math.inf

    def remaining(self) -> socket.socket:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("it took too long")
        self._sock.settimeout(left)
        return self._sock

    def sendall(self, data: bytes) -> None:
        self.remaining().sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:  # noqa: ARG002  (http.client asks for "rb")
        self._reading = True
        return io.BufferedReader(_Reader(self))

    def close(self) -> None:
        """Close. The descriptor stays open until the reader has finished, as for any socket."""
        self._ended = True
        if not self._reading:
            self._sock.close()

    def read_to_end(self) -> None:
        self._reading = False
        if self._ended:
            self._sock.close()


class _Reader(io.RawIOBase):
    def __init__(self, timed: _Timed) -> None:
        super().__init__()
        self._timed = timed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._timed.remaining().recv_into(buffer)

    def close(self) -> None:
        if not self.closed:
            self._timed.read_to_end()
        super().close()


def _broken(error: Exception, endpoint: str) -> Outcome:
    if isinstance(error, TimeoutError):
        return Outcome("timeout", True, words=f"{endpoint}: {error}")
    if isinstance(error, ssl.SSLCertVerificationError):
        return Outcome("tls", True, words=f"{endpoint}: {error.verify_message}")
    if isinstance(error, http.client.HTTPException):
        return Outcome(
            "invalid_response",
            True,
            words=f"{endpoint} did not answer in HTTP: {type(error).__name__}",
        )
    return Outcome("unreachable", True, words=f"{endpoint}: {error}")


def retry_after(value: str | None) -> float:
    """The seconds to wait by a Retry-After header (RFC 9110 §10.2.3), at most five minutes.

    0 for a missing or invalid header.
    """
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(max(seconds, 0.0), _LONGEST_AFTER) if math.isfinite(seconds) else 0.0
