"""What can go wrong with a start, an exchange or a connection, and the one table of what is said about it.

Errors are raised where they are noticed, typed: wire.ProtocolError and net's errors by those rooms, the ones below by the rooms that
drive them. `describe` finds the row for any of them: the HTTP status, the gRPC status, the error type of Proxy-Status (RFC 9209 §2.3) and
the reason that the metrics count. So whose fault it was is told in the same words everywhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from proxy.net.connection_slots import NoRoom
from proxy.net.exceptions import ConnectFailed, ConnectionLost, NetError, TLSFailed
from proxy.wire.messages import Headers, ProtocolError


class StartError(Exception):
    """The proxy cannot start. `code` is the exit code (sysexits.h)."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class IsthmusError(Exception):
    """Of the errors of a running proxy that are not net's or wire's. `said`: the Proxy-Status of a proxy behind this one that has
    reported it (exchange/reports.py)."""

    said = b""


class RequestError(IsthmusError):
    """The client's fault: it broke the protocol, with the status that answers it."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class RequestTimeout(IsthmusError):
    """The client did not send the rest of its request in time."""


class ClientGone(IsthmusError):
    """The client's connection broke before its exchange was over; there is nobody left to answer."""


class NotAuthorised(IsthmusError):
    """Policy wants an identity that the peer has not shown."""


class LoopDetected(IsthmusError):
    """The traffic would come back to where it came from, or has. `kind` and `cycle` (in names, as far as it is known) are loopguard's."""

    def __init__(self, message: str, kind: str, cycle: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.cycle = cycle


class NoEndpoint(IsthmusError):
    """The directory knows the service, and no endpoint of it is ready."""


class NotExported(IsthmusError):
    """A gateway was asked for something that its cluster does not export."""


class TunnelRefused(IsthmusError):
    """A gateway would not open the tunnel that it was asked for."""


class AllBroken(IsthmusError):
    """The service has endpoints, but all of them have failed, and it is not the time yet to try one again."""


class QueueFull(IsthmusError):
    """All endpoints of the service are broken, and as many requests as may wait for them do."""


class DeadlineExceeded(IsthmusError):
    """The time is over that the policy, or the client, gave the whole request."""


class PoolExhausted(IsthmusError):
    """All connections that an endpoint may have are in use, and the queue for them is full or too slow."""


class MemoryShort(IsthmusError):
    """The memory budget of this process is used up, or the part of it that is for clients without an identity."""


class UpstreamProtocolError(IsthmusError):
    """The server's response is not HTTP, or is ambiguous."""


class ResponseTooLarge(UpstreamProtocolError):
    """The head of the server's response, or its trailers, are larger than the client takes (HTTP/2's SETTINGS_MAX_HEADER_LIST_SIZE)."""


class UpstreamClosed(IsthmusError):
    """The server closed the connection before its response was complete."""


class UpstreamLeft(UpstreamClosed):
    """The server had announced that it would close the connection (GOAWAY), and did so before its response was complete."""


class UpstreamReset(UpstreamClosed):
    """The server ended the one stream of the exchange, and said why: `code` is RST_STREAM's (RFC 9113 §7)."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class UpgradeFailed(IsthmusError):
    """The server does not do what the client wants to upgrade to. That says nothing against the server."""


class UpstreamTimeout(IsthmusError):
    """The server did not answer, or did not go on, in time."""


class Undelivered(IsthmusError):
    """A verified proxy of the mesh says that nothing of the request has reached its application, or the endpoint behind a gateway: it could
    not connect. `reason` is that proxy's own, one of `UNDELIVERED`."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class UpstreamTLSError(IsthmusError):
    """Mutual TLS with the endpoint failed. A meshed endpoint is never spoken to in clear text instead. `kind`: as in `TLSFailed`, or
    `clear_text`, or `lost` (the connection was lost in the handshake)."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Answer:
    """One row: what is said about a cause."""

    status: int
    # 1 cancelled, 4 deadline exceeded, 5 not found, 7 permission denied, 8 resource exhausted, 10 aborted, 12 unimplemented, 13 internal,
    # 14 unavailable
    grpc_status: int
    proxy_status: str  # RFC 9209 §2.3
    reason: str  # the metric's label, and the log's


INTERNAL = Answer(500, 13, "proxy_internal_error", "internal")

TABLE: dict[type[BaseException], Answer] = {
    RequestError: Answer(400, 13, "http_request_error", "bad_request"),
    RequestTimeout: Answer(408, 4, "http_request_error", "request_timeout"),
    ClientGone: Answer(499, 1, "connection_terminated", "client_gone"),  # never sent: 499 is nginx's word for it in logs
    NotAuthorised: Answer(403, 7, "http_request_denied", "identity_required"),
    LoopDetected: Answer(508, 10, "proxy_loop_detected", "loop"),
    NoEndpoint: Answer(503, 14, "destination_unavailable", "no_endpoint"),
    AllBroken: Answer(503, 14, "destination_unavailable", "all_broken"),
    QueueFull: Answer(503, 8, "connection_limit_reached", "queue_full"),
    DeadlineExceeded: Answer(504, 4, "http_response_timeout", "deadline_exceeded"),
    NotExported: Answer(404, 5, "destination_not_found", "not_exported"),
    TunnelRefused: Answer(502, 14, "destination_unavailable", "tunnel_refused"),
    PoolExhausted: Answer(503, 8, "connection_limit_reached", "pool_exhausted"),
    MemoryShort: Answer(503, 8, "connection_limit_reached", "memory_short"),
    UpstreamProtocolError: Answer(502, 13, "http_protocol_error", "upstream_protocol"),
    UpstreamClosed: Answer(502, 14, "connection_terminated", "upstream_closed"),
    UpstreamLeft: Answer(502, 14, "connection_terminated", "upstream_left"),
    UpstreamReset: Answer(502, 14, "http_response_incomplete", "upstream_reset"),
    UpgradeFailed: Answer(501, 12, "http_upgrade_failed", "upgrade_failed"),
    UpstreamTimeout: Answer(504, 4, "http_response_timeout", "upstream_timeout"),
    ProtocolError: Answer(400, 13, "http_request_error", "bad_request"),
    NoRoom: Answer(503, 8, "connection_limit_reached", "no_room"),
    ConnectionLost: Answer(502, 14, "connection_terminated", "connection_lost"),
    NetError: Answer(502, 14, "connection_terminated", "connection_lost"),
}

_CONNECT: dict[str, Answer] = {
    "refused": Answer(502, 14, "connection_refused", "connect_refused"),
    "timeout": Answer(504, 14, "connection_timeout", "connect_timeout"),
    "unreachable": Answer(502, 14, "destination_ip_unroutable", "connect_unreachable"),
    "reset": Answer(502, 14, "connection_terminated", "connect_reset"),
    "local": Answer(503, 14, "proxy_internal_error", "connect_local"),
}
_CONNECT_OTHER = Answer(502, 14, "connection_refused", "connect_failed")

_TLS: dict[str, Answer] = {
    "certificate": Answer(502, 14, "tls_certificate_error", "tls_certificate"),
    "clear_text": Answer(502, 14, "destination_ip_prohibited", "clear_text_refused"),
    "alert": Answer(502, 14, "tls_alert_received", "tls_alert"),
    "timeout": Answer(504, 14, "connection_timeout", "tls_timeout"),
    "lost": Answer(502, 14, "tls_protocol_error", "tls_lost"),
}
_TLS_OTHER = Answer(502, 14, "tls_protocol_error", "tls_protocol")


# What a proxy reports to a verified peer by the field `FAILURE` (wire/messages.py): the reason why it answers a request itself. Behind
# the first reasons nothing of the request has reached an application, so another endpoint may have it, whatever it is. Behind the second
# the application has closed the connection: the peer treats that as it treats a server that does the same.
UNDELIVERED = {
    answer.reason: answer
    for answer in (*_CONNECT.values(), _CONNECT_OTHER, *_TLS.values(), _TLS_OTHER, TABLE[NoEndpoint], TABLE[AllBroken])
}
BROKEN = frozenset(TABLE[kind].reason for kind in (UpstreamClosed, UpstreamReset, ConnectionLost))
REPORTED = BROKEN.union(UNDELIVERED)


def describe(error: BaseException) -> Answer:
    """The row for `error`; what the table does not know is our own fault."""
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
            return answer if status == answer.status else Answer(status, answer.grpc_status, answer.proxy_status, answer.reason)
    return INTERNAL


def broken_off(answer: Answer) -> Answer:
    """The row for a response that has begun. A server that falls silent in the middle of it has gone like one whose connection is cut: the
    deadline that has passed is ours, and no client of gRPC should take it for its own."""
    return replace(answer, grpc_status=14) if answer is TABLE[UpstreamTimeout] else answer


# What another proxy says in Proxy-Status of a request that its destination has not answered at all.
_UNANSWERED = frozenset(
    {
        b"connection_refused", b"connection_timeout", b"destination_ip_unroutable", b"destination_unavailable", b"http_response_timeout"
    }
)  # fmt: skip
_QUOTED = re.compile(rb'"(?:[^"\\]|\\.)*"')
_ERROR = re.compile(rb";[ ]*error=([a-z_]+)")
_MOST_READ = 4096


def unanswered(headers: Headers) -> bool:
    """Whether a response is a proxy's that could not get one from behind it: nobody is there, or says anything."""
    said = headers.get(b"proxy-status")
    return said is not None and not _UNANSWERED.isdisjoint(_ERROR.findall(_QUOTED.sub(b"", said[:_MOST_READ])))


def known(error: BaseException) -> bool:
    """The table has a row for it: it is no bug of ours."""
    return describe(error) is not INTERNAL
