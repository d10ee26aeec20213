"""A WebSocket to a server that speaks HTTP/2. The server may accept it over HTTP/2 (RFC 8441), over
HTTP/1.1, or not at all.

Only the connection tells which, because the server's SETTINGS arrive after the handshake. Many
servers accept both versions on one port, but WebSockets only over HTTP/1.1, so that is tried
second. If neither works, the server cannot serve this client. The error is UpgradeFailed and does
not count against the endpoint: the client asked for something that the service does not support.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, Protocol

from proxy.errors import UpgradeFailed, UpstreamClosed, UpstreamProtocolError
from proxy.exchange.client import Client, K, K_contra, Leases
from proxy.exchange.exchange import Exchange
from proxy.exchange.upstream import NoExtendedConnect
from proxy.wire import websocket
from proxy.wire.sniff import Protocol as Spoken


class LeasesByProtocol(Protocol[K_contra]):
    """The pooled connections of a flow, by protocol."""

    def leases(self, protocol: Spoken) -> Leases[K_contra]: ...


def carry(
    client: Client[K],
    exchange: Exchange,
    endpoint: K,
    leases_by_protocol: LeasesByProtocol[K],
    protocol: Spoken,
) -> Coroutine[Any, Any, None]:
    """Call `client.send` with `protocol`. If an HTTP/2 server does not accept a WebSocket, try
    HTTP/1.1. Raises the errors of `client.send`, and UpgradeFailed."""
    if protocol is Spoken.HTTP1 or not websocket.extends(exchange.request):
        return client.send(exchange, endpoint, leases_by_protocol.leases(protocol))
    return _carry_tunnel(client, exchange, endpoint, leases_by_protocol)


async def _carry_tunnel(
    client: Client[K], exchange: Exchange, endpoint: K, leases_by_protocol: LeasesByProtocol[K]
) -> None:
    try:
        await client.send(exchange, endpoint, leases_by_protocol.leases(Spoken.HTTP2))
        return
    except NoExtendedConnect as error:
        if exchange.request.protocol is not None and not websocket.asks(exchange.request):
            raise UpgradeFailed(
                "the server does not accept CONNECT with :protocol (RFC 8441)"
            ) from error
    try:
        await client.send(exchange, endpoint, leases_by_protocol.leases(Spoken.HTTP1))
    except (UpstreamClosed, UpstreamProtocolError) as failure:
        if exchange.response is not None:
            raise
        words = (
            "the server does not accept a WebSocket over HTTP/2 (RFC 8441), and over HTTP/1.1 it"
            f" failed: {failure}"
        )
        raise UpgradeFailed(words) from failure
