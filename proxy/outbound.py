"""Traffic from the local application to the mesh.

    accept -> original destination -> loop guard -> what does the directory say of it? -> HTTP or opaque?
        opaque  relay <-> connect(endpoint, mutual TLS if it is meshed)
        HTTP    server -> measure -> rescue -> guard -> deadline -> endpoint -> client -> pool -> connect

The destination is resolved when the connection is accepted, and again for each request: the directory may have changed since, and
the requests of one connection may go to different endpoints.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from proxy.account import ConnectionAccount
from proxy.exchange.client import Client
from proxy.exchange.exchange import Direction, Exchange, Facts, Handler, stack
from proxy.exchange.guard import hide_names
from proxy.exchange.layers import deadline, measure, rescue
from proxy.mesh.contexts import ALPN_TCP
from proxy.mesh.directory import Endpoint, Hint, Target
from proxy.net.accept import Connection
from proxy.net.relay import relay
from proxy.net.streams import Stream
from proxy.pools import Pools, serve, spoken
from proxy.runtime import Runtime, closing
from proxy.wire.messages import upgrade_offer
from proxy.wire.sniff import Protocol

DIRECTION: Direction = "outbound"


def outbound(rt: Runtime, pools: Pools[Endpoint]) -> Callable[[Connection], Awaitable[None]]:
    """The handler of the outbound listeners' connections."""
    config = rt.config.outbound
    handler = stack(
        measure(rt.ledger.exchange),
        rescue(rt.name, rt.tells),
        rt.guard(DIRECTION),
        deadline,
        endpoint=to_service(rt, pools),
    )

    async def accept(connection: Connection) -> None:
        about = Facts(DIRECTION, connection.peer, rt.destination(connection, config.fixed_destination))
        with rt.ledger.connection(connection.stream, about) as account:
            rt.refuse_loop(connection, about)
            target = rt.directory.current.resolve(about.destination)
            opaque = target.protocol is Hint.OPAQUE or about.destination.port in config.opaque_ports
            opening = await account.detect(connection.stream, None if opaque else config.detect_timeout, config.detect_timeout)
            account.plain(opening)
            if opening.how == "closed":
                return
            about.protocol = opening.protocol
            if about.protocol is not Protocol.OPAQUE:
                await serve(rt, connection.stream, about, handler)
            else:
                await rt.reach.connection(lambda: target, to_endpoint(rt, connection.stream, account))

    return accept


def to_service(rt: Runtime, pools: Pools[Endpoint]) -> Handler:
    """The endpoint of the stack: each request to one of the endpoints of its destination."""
    client: Client[Endpoint] = Client(rt.settings.client, rt.ledger.bridge(rt.config.tcp.idle_timeout))

    def choose(exchange: Exchange) -> Target:
        return rt.directory.current.resolve(exchange.facts.destination)

    async def send(exchange: Exchange, _: Target, endpoint: Endpoint) -> None:
        exchange.upstream = endpoint.address
        if endpoint.identity is None:
            hide_names(exchange)
        await client.send(exchange, endpoint, pools.lender(upstream_protocol(exchange, endpoint)))

    async def handle(exchange: Exchange) -> None:
        await rt.reach.exchange(exchange, choose, send)

    return handle


def upstream_protocol(exchange: Exchange, endpoint: Endpoint) -> Protocol:
    """What the endpoint speaks, as far as the directory knows; otherwise what the client spoke. A tunnel cannot be translated: an offer to
    upgrade needs HTTP/1, an extended CONNECT HTTP/2."""
    if upgrade_offer(exchange.request.headers) is not None:
        return Protocol.HTTP1
    if exchange.request.protocol is not None:
        return Protocol.HTTP2
    return {Hint.HTTP1: Protocol.HTTP1, Hint.HTTP2: Protocol.HTTP2}.get(endpoint.protocol) or spoken(exchange.request.version)


def to_endpoint(rt: Runtime, client: Stream, account: ConnectionAccount) -> Callable[[Target, Endpoint], Awaitable[None]]:
    """Relay `client` to an endpoint, byte for byte."""

    async def use(_: Target, endpoint: Endpoint) -> None:
        async with closing(await rt.connect(endpoint, ALPN_TCP)) as upstream:
            with account.upstream(upstream):
                account.relayed(await relay(client, upstream, idle=rt.config.tcp.idle_timeout))

    return use


def outbound_pools(rt: Runtime) -> Pools[Endpoint]:
    """The kept connections to endpoints."""
    return Pools(rt, DIRECTION, rt.connect)
