"""A tunnel through a gateway: HTTP/1.1 CONNECT on a connection of its own. After the 200, the bytes
are not framed (RFC 9110 §9.3.6).

Connections that are not HTTP reach a service in another cluster this way. The gateway gets a name,
as it does for a request, and any HTTP proxy can be the gateway.
"""

from __future__ import annotations

import trio

from proxy.errors import TunnelRefused, Undelivered, UpstreamProtocolError
from proxy.exchange.prefixed_stream import READ_SIZE, PrefixedStream
from proxy.exchange.reports import reported
from proxy.net.exceptions import ConnectionLost
from proxy.net.socket_stream import Stream
from proxy.wire.h1.connection import Http1Connection, Role
from proxy.wire.messages import (
    Field,
    Headers,
    Limits,
    ProtocolError,
    RequestHead,
    ResponseHead,
    Signal,
)

# Bytes of the gateway's reason for a refusal that are quoted in an error.
_QUOTED = 300


async def open_tunnel(
    stream: Stream, authority: bytes, fields: list[Field], limits: Limits, timeout: float
) -> Stream:
    """Ask the gateway behind `stream` for a tunnel to `authority` (host and port), with additional
    `fields`. `timeout`: in seconds.

    Returns the stream of the tunnel. The caller keeps ownership of `stream` in every case. Raises
    TunnelRefused, UpstreamProtocolError, and Undelivered if the gateway reports that it could not
    connect to an endpoint.
    """
    http = Http1Connection(Role.CLIENT, limits)
    head = RequestHead(b"CONNECT", authority, Headers([(b"Host", authority), *fields]))
    answer: ResponseHead | None = None
    with trio.move_on_after(timeout):
        try:
            await stream.send_all(http.send_request(head, 0))
            answer = await _final(stream, http)
        except ConnectionLost as error:
            raise TunnelRefused(
                f"the gateway {stream.peer} closed the connection on CONNECT {_quoted(authority)}:"
                f" {error}"
            ) from error
    if answer is None:
        raise TunnelRefused(
            f"the gateway {stream.peer} did not answer within {timeout:g} s to CONNECT"
            f" {_quoted(authority)}"
        )
    failure = reported(answer, stream)
    if isinstance(failure, Undelivered):
        raise failure
    if not 200 <= answer.status < 300:
        why = answer.headers.get(b"proxy-status") or answer.reason
        raise TunnelRefused(
            f"the gateway {stream.peer} answered {answer.status} to CONNECT {_quoted(authority)}:"
            f" {_quoted(why)}"
        )
    rest = http.take_rest()
    return PrefixedStream(stream, rest) if rest else stream


async def _final(stream: Stream, http: Http1Connection) -> ResponseHead:
    """The final response to the CONNECT."""
    while True:
        try:
            head = http.next_response()
        except ProtocolError as error:
            raise UpstreamProtocolError(f"the gateway's answer to CONNECT: {error}") from error
        if isinstance(head, ResponseHead):
            if not head.informational:
                return head
        elif head is Signal.CLOSED:
            raise ConnectionLost("closed without an answer", "closed")
        else:
            http.receive_data(await stream.receive_some(READ_SIZE))


def _quoted(text: bytes) -> str:
    return text[:_QUOTED].decode("latin-1")
