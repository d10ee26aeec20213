"""Traffic from the local application to the mesh.

    accept -> original destination -> loop guard -> look it up in the directory -> HTTP or opaque?
        opaque  relay <-> connect(endpoint, mutual TLS if it is meshed; a tunnel if it is a gateway
                of another cluster): outbound_relay.py
        HTTP    server -> measure -> trace -> rescue -> admit -> guard -> deadline -> plan
                  -> client -> pool -> connect: outbound_plan.py

The router decides the destination (routing/router.py). The flow asks it when it accepts a
connection, and again for each request. The directory may have changed, and the requests of one
connection may go to different services, clusters and endpoints. The proxy reaches a service of
another cluster through a gateway there. It sends the gateway the service's name in that cluster, as
the authority of the request or in a CONNECT."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from proxy.directory import UNANSWERED, Endpoint, Hint, Target, itself
from proxy.exchange.exchange import ConnectionInfo
from proxy.flows.outbound_plan import OutboundPlanner
from proxy.flows.outbound_relay import relay_to_endpoint
from proxy.flows.runtime import Runtime
from proxy.flows.serving import serve
from proxy.flows.upstreams import Pools
from proxy.net.accept import Connection
from proxy.net.address import Address
from proxy.net.socket_stream import Stream
from proxy.wire.sniff import Protocol


def outbound(rt: Runtime, pools: Pools[Endpoint]) -> Callable[[Connection], Awaitable[None]]:
    """The handler of the outbound listeners' connections."""
    config = rt.config.outbound
    planner = OutboundPlanner(rt, pools)

    async def accept(connection: Connection) -> None:
        about = ConnectionInfo(
            "outbound",
            connection.peer,
            rt.destination(connection, config.fixed_destination),
            slot=connection.slot,
        )
        with (
            rt.recorder.connection(connection.stream, about) as account,
            rt.router.holding(about.destination),
            rt.directory.holding(about.destination),
        ):
            rt.loops.check_accepted(connection, about)
            if rt.directory.asks:
                await rt.directory.learn(about.destination)
            target = _find(rt, about.destination)
            about.service = target.service
            opaque = target.protocol is Hint.OPAQUE or about.destination.port in config.opaque_ports
            declared = not opaque and target.protocol in (Hint.HTTP1, Hint.HTTP2)
            opening = await account.detect(
                connection.stream, *waits(rt, opaque=opaque, declared=declared)
            )
            account.plain(opening)
            rt.loops.check_again(about)
            if opening.how == "closed" or (declared and opening.how == "silent"):
                return
            about.protocol = Protocol.HTTP1 if declared and opening.open else opening.protocol
            stream: Stream | None = connection.stream
            if about.protocol is Protocol.OPAQUE:
                about.unsure = opening.open
                # The client may have been silent for seconds: the directory may know more now.
                target = _find(rt, about.destination)
                about.service = target.service
                stream = await relay_to_endpoint(rt, target, connection.stream, about, account)
            if stream is not None:
                await serve(rt, stream, about, planner.handler, planner)

    return accept


def _find(rt: Runtime, destination: Address) -> Target:
    """The target of a connection. UNANSWERED and UNIDENTIFIED: the directory does not know."""
    target = rt.router.find_address(destination)
    if target is UNANSWERED and not rt.directory.inside(destination.host):
        target = None  # another connection waits for the answer
    return target or itself(destination)


def waits(rt: Runtime, *, opaque: bool, declared: bool) -> tuple[float | None, float]:
    """(seconds that a client may be silent, seconds for the rest of the request's start). If HTTP
    is declared, the proxy waits as long as an HTTP server would."""
    if opaque:
        return None, 0.0
    if declared:
        return rt.config.http.idle_timeout, rt.config.http.head_timeout
    return rt.config.outbound.detect_timeout, rt.config.outbound.detect_timeout
