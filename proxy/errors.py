"""The errors of a start, an exchange or a connection, and the one table that describes each of
them.

Code raises a typed error where it notices the failure: proxy/wire raises ProtocolError, proxy/net
raises its own errors, and the packages above them raise the errors below. `describe` finds the row
for any of them: the HTTP status, the gRPC status, the error type of Proxy-Status (RFC 9209 §2.3)
and the reason that the metrics count. So responses, logs and metrics name one cause in one way."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from proxy.net.connection_slots import ListenerFull
from proxy.net.exceptions import ConnectFailed, ConnectionLost, NetError, TLSFailed
from proxy.wire.messages import Headers, ProtocolError


class StartError(Exception):
    """The proxy cannot start. `code` is the exit code (sysexits.h)."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class IsthmusError(Exception):
    """Base of the errors of a running proxy, except those of proxy/net and proxy/wire.
    `received_status`: the Proxy-Status field of the proxy behind this one that reported the failure
    (exchange/reports.py)."""

    received_status = b""


class RequestError(IsthmusError):
    """The client caused the failure: it violated the protocol. `status` is the status of the
    response."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class RequestTimeout(IsthmusError):
    """The client did not send the rest of its request in time."""


class ClientGone(IsthmusError):
    """The client's connection broke before its exchange ended. No response can be sent."""


class NotAuthorised(IsthmusError):
    """The policy requires an identity that the peer has not presented."""


class LoopDetected(IsthmusError):
    """The traffic would return, or has returned, to a proxy that it came from. `kind` and `cycle`
    (the names on the path, as far as they are known) come from loopguard."""

    def __init__(self, message: str, kind: str, cycle: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.cycle = cycle


class NoEndpoint(IsthmusError):
    """The directory has the service, but no endpoint of it is ready."""


class DirectoryUnavailable(IsthmusError):
    """The control plane did not answer where an address of the cluster leads."""


class IdentityUnknown(IsthmusError):
    """An identity may be expected at the destination, but the control plane does not know which."""


class NotExported(IsthmusError):
    """The request asked a gateway for a service that its cluster does not export."""


class TunnelRefused(IsthmusError):
    """A gateway refused to open the requested tunnel."""


class AllCircuitsOpen(IsthmusError):
    """The service has endpoints, but the circuit breakers of all of them are open, and no trial is
    due yet."""


class QueueFull(IsthmusError):
    """The circuit breakers of all endpoints of the service are open, and the wait queue is full."""


class DeadlineExceeded(IsthmusError):
    """The request did not finish within the limit that the policy, or the client, set for it."""


class PoolExhausted(IsthmusError):
    """All connections that an endpoint may have are in use, and the queue for them is full or too
    slow."""


class MemoryShort(IsthmusError):
    """The memory budget of this process is used up, or its part for clients without an identity."""


class UpstreamProtocolError(IsthmusError):
    """The server's response is not HTTP, or is ambiguous."""


class ResponseTooLarge(UpstreamProtocolError):
    """The head or the trailers of the server's response are larger than the client accepts
    (SETTINGS_MAX_HEADER_LIST_SIZE of HTTP/2)."""


class UpstreamClosed(IsthmusError):
    """The server closed the connection before its response was complete."""


class UpstreamGoaway(UpstreamClosed):
    """The server announced that it would close the connection (GOAWAY), and closed it before its
    response was complete."""


class UpstreamReset(UpstreamClosed):
    """The server reset the stream of the exchange. `code` is the error code of its RST_STREAM (RFC
    9113 §7)."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class UpgradeFailed(IsthmusError):
    """The server does not support the protocol that the client wants to upgrade to. This does not
    count against the endpoint."""


class UpstreamTimeout(IsthmusError):
    """The server did not answer in time, or its response paused for too long."""


class Undelivered(IsthmusError):
    """A verified proxy of the mesh reports that no byte of the request reached its application, or
    the endpoint behind a gateway, because it could not connect. `reason` is the reason that this
    proxy reported, one of `UNDELIVERED`."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class UpstreamTLSError(IsthmusError):
    """Mutual TLS with the endpoint failed. The proxy never falls back to clear text for a meshed
    endpoint. `kind`: as in `TLSFailed`, or `clear_text`, or `lost` (the connection was lost during
    the handshake)."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """One row of the table: how the proxy reports one cause."""

    status: int
    # 1 cancelled, 4 deadline exceeded, 5 not found, 7 permission denied, 8 resource exhausted, 10
    # aborted, 12 unimplemented, 13 internal, 14 unavailable
    grpc_status: int
    proxy_status: str  # RFC 9209 §2.3
    reason: str  # the label of the metric, and the reason in the log


INTERNAL = ErrorAnswer(500, 13, "proxy_internal_error", "internal")

TABLE: dict[type[BaseException], ErrorAnswer] = {
    RequestError: ErrorAnswer(400, 13, "http_request_error", "bad_request"),
    RequestTimeout: ErrorAnswer(408, 4, "http_request_error", "request_timeout"),
    ClientGone: ErrorAnswer(
        499, 1, "connection_terminated", "client_gone"
    ),  # never sent: nginx logs 499 for this case
    NotAuthorised: ErrorAnswer(403, 7, "http_request_denied", "identity_required"),
    LoopDetected: ErrorAnswer(508, 10, "proxy_loop_detected", "loop"),
    NoEndpoint: ErrorAnswer(503, 14, "destination_unavailable", "no_endpoint"),
    DirectoryUnavailable: ErrorAnswer(503, 14, "destination_unavailable", "directory_unavailable"),
    IdentityUnknown: ErrorAnswer(503, 14, "destination_unavailable", "identity_unknown"),
    AllCircuitsOpen: ErrorAnswer(503, 14, "destination_unavailable", "circuit_open"),
    QueueFull: ErrorAnswer(503, 8, "connection_limit_reached", "queue_full"),
    DeadlineExceeded: ErrorAnswer(504, 4, "http_response_timeout", "deadline_exceeded"),
    NotExported: ErrorAnswer(404, 5, "destination_not_found", "not_exported"),
    TunnelRefused: ErrorAnswer(502, 14, "destination_unavailable", "tunnel_refused"),
    PoolExhausted: ErrorAnswer(503, 8, "connection_limit_reached", "pool_exhausted"),
    MemoryShort: ErrorAnswer(503, 8, "connection_limit_reached", "memory_short"),
    UpstreamProtocolError: ErrorAnswer(502, 13, "http_protocol_error", "upstream_protocol"),
    UpstreamClosed: ErrorAnswer(502, 14, "connection_terminated", "upstream_closed"),
    UpstreamGoaway: ErrorAnswer(502, 14, "connection_terminated", "upstream_goaway"),
    UpstreamReset: ErrorAnswer(502, 14, "http_response_incomplete", "upstream_reset"),
    UpgradeFailed: ErrorAnswer(501, 12, "http_upgrade_failed", "upgrade_failed"),
    UpstreamTimeout: ErrorAnswer(504, 4, "http_response_timeout", "upstream_timeout"),
    ProtocolError: ErrorAnswer(400, 13, "http_request_error", "bad_request"),
    ListenerFull: ErrorAnswer(503, 8, "connection_limit_reached", "listener_full"),
    ConnectionLost: ErrorAnswer(502, 14, "connection_terminated", "connection_lost"),
    NetError: ErrorAnswer(502, 14, "connection_terminated", "connection_lost"),
}

_CONNECT: dict[str, ErrorAnswer] = {
    "refused": ErrorAnswer(502, 14, "connection_refused", "connect_refused"),
    "timeout": ErrorAnswer(504, 14, "connection_timeout", "connect_timeout"),
    "unreachable": ErrorAnswer(502, 14, "destination_ip_unroutable", "connect_unreachable"),
    "reset": ErrorAnswer(502, 14, "connection_terminated", "connect_reset"),
    "local": ErrorAnswer(503, 14, "proxy_internal_error", "connect_local"),
}
_CONNECT_OTHER = ErrorAnswer(502, 14, "connection_refused", "connect_failed")

_TLS: dict[str, ErrorAnswer] = {
    "certificate": ErrorAnswer(502, 14, "tls_certificate_error", "tls_certificate"),
    "clear_text": ErrorAnswer(502, 14, "destination_ip_prohibited", "clear_text_refused"),
    "alert": ErrorAnswer(502, 14, "tls_alert_received", "tls_alert"),
    "timeout": ErrorAnswer(504, 14, "connection_timeout", "tls_timeout"),
    "lost": ErrorAnswer(502, 14, "tls_protocol_error", "tls_lost"),
}
_TLS_OTHER = ErrorAnswer(502, 14, "tls_protocol_error", "tls_protocol")


# The reasons that a proxy reports to a verified peer in the field `FAILURE` (wire/messages.py) when
# it answers a request itself. With a reason in `UNDELIVERED`, no byte of the request has reached an
# application, so the peer may send any request to another endpoint. With a reason in `BROKEN`, the
# application closed the connection. The peer treats that like a server that closes its connection.
UNDELIVERED = {
    answer.reason: answer
    for answer in (
        *_CONNECT.values(),
        _CONNECT_OTHER,
        *_TLS.values(),
        _TLS_OTHER,
        TABLE[NoEndpoint],
        TABLE[AllCircuitsOpen],
    )
}
BROKEN = frozenset(TABLE[kind].reason for kind in (UpstreamClosed, UpstreamReset, ConnectionLost))
REPORTED = BROKEN.union(UNDELIVERED)


def describe(error: BaseException) -> ErrorAnswer:
    """The row for `error`. An error that the table does not have is an internal error."""
    if isinstance(error, Undelivered):
        return UNDELIVERED.get(error.reason, _CONNECT_OTHER)
    if isinstance(error, ConnectFailed):
        return _CONNECT.get(error.reason, _CONNECT_OTHER)
    if isinstance(error, (TLSFailed, UpstreamTLSError)):
        return _TLS.get(error.kind, _TLS_OTHER)
    for kind in type(error).__mro__:
        if kind in TABLE:
            answer = TABLE[kind]
            status = getattr(error, "status", answer.status)
            return (
                answer
                if status == answer.status
                else ErrorAnswer(status, answer.grpc_status, answer.proxy_status, answer.reason)
            )
    return INTERNAL


def broken_off(answer: ErrorAnswer) -> ErrorAnswer:
    """The row for a failure after the response has started. A server that stops sending in the
    middle is treated like one whose connection broke. The limit that expired is the proxy's, so a
    gRPC client must not take it for its own deadline."""
    return replace(answer, grpc_status=14) if answer is TABLE[UpstreamTimeout] else answer


# The error types that another proxy sends in Proxy-Status if the destination did not answer at all.
_UNANSWERED = frozenset(
    {
        b"connection_refused",
        b"connection_timeout",
        b"destination_ip_unroutable",
        b"destination_unavailable",
        b"http_response_timeout",
    }
)
_QUOTED = re.compile(rb'"(?:[^"\\]|\\.)*"')
_ERROR = re.compile(rb";[ ]*error=([a-z_]+)")
_MOST_READ = 4096


def unanswered(headers: Headers) -> bool:
    """Whether a proxy generated this response because the destination was not reachable or did not
    answer. Reads at most `_MOST_READ` bytes of Proxy-Status."""
    received_status = headers.get(b"proxy-status")
    return received_status is not None and not _UNANSWERED.isdisjoint(
        _ERROR.findall(_QUOTED.sub(b"", received_status[:_MOST_READ]))
    )


def known(error: BaseException) -> bool:
    """Whether the table has a row for `error`. If not, it is an internal error."""
    return describe(error) is not INTERNAL
