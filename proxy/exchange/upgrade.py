"""A WebSocket to a server that speaks HTTP/2, which may take it there (RFC 8441), or by HTTP/1.1, or not at all.

Only the connection tells which: the server's SETTINGS are known behind the handshake. Many servers take both versions at one port, and
WebSockets only in HTTP/1.1; so it is tried there where HTTP/2 does not do. A server that cannot do it either way cannot serve this client.
That is UpgradeFailed, and no fault of the endpoint's: the client has asked for something that this service does not have.
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
    """The kept connections of a flow."""

    def leases(self, protocol: Spoken) -> Leases[K_contra]: ...


def carry(
    client: Client[K], exchange: Exchange, endpoint: K, leases_by_protocol: LeasesByProtocol[K], protocol: Spoken
) -> Coroutine[Any, Any, None]:
    """`client.send` by `protocol`, and a WebSocket by HTTP/1.1 where a server of HTTP/2 does not take it. Raises what that raises, and
    UpgradeFailed."""
    if protocol is Spoken.HTTP1 or not websocket.extends(exchange.request):
        return client.send(exchange, endpoint, leases_by_protocol.leases(protocol))
    return _carry_tunnel(client, exchange, endpoint, leases_by_protocol)


async def _carry_tunnel(client: Client[K], exchange: Exchange, endpoint: K, leases_by_protocol: LeasesByProtocol[K]) -> None:
    try:
        await client.send(exchange, endpoint, leases_by_protocol.leases(Spoken.HTTP2))
        return
    except NoExtendedConnect as error:
        if exchange.request.protocol is not None and not websocket.asks(exchange.request):
            raise UpgradeFailed("the server does not take CONNECT with :protocol (RFC 8441)") from error
    try:
        await client.send(exchange, endpoint, leases_by_protocol.leases(Spoken.HTTP1))
    except (UpstreamClosed, UpstreamProtocolError) as failure:
        if exchange.response is not None:
            raise
        words = f"the server does not take a WebSocket by HTTP/2 (RFC 8441), and by HTTP/1.1 this came of it: {failure}"
        raise UpgradeFailed(words) from failure
