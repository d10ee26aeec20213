"""Traffic from other clusters to the services that this cluster exports.

    accept -> mutual TLS with a workload of the trust domain, or a refusal -> HTTP/1 or HTTP/2
      HTTP     server -> measure -> trace -> rescue -> admit -> guard -> deadline -> authorise
                 -> look up the exported service -> client -> pool -> connect(endpoint, mutual TLS)
      CONNECT  as HTTP, but connects to the endpoint for bytes, and relays

gateway_plan.py decides about a request. forwarded_path.py reads and writes the field `Forwarded`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from proxy.directory import Endpoint
from proxy.errors import NotAuthorised, NotExported
from proxy.exchange.detect import Opening
from proxy.exchange.exchange import ConnectionInfo
from proxy.flows.gateway_plan import NO_IDENTITY, GatewayPlanner, is_allowed
from proxy.flows.runtime import Runtime, closing
from proxy.flows.serving import serve
from proxy.flows.tls_termination import INNER, terminate
from proxy.flows.upstreams import Pools
from proxy.net.accept import Connection
from proxy.net.socket_stream import Stream
from proxy.net.tls.handshake import TLSStream
from proxy.telemetry.records import ConnectionAccount
from proxy.wire.sniff import Protocol


def gateway(rt: Runtime, pools: Pools[Endpoint]) -> Callable[[Connection], Awaitable[None]]:
    """The handler of a gateway's connections."""
    patience = rt.config.gateway.detect_timeout
    planner = GatewayPlanner(rt, pools)

    async def accept(connection: Connection) -> None:
        about = ConnectionInfo("gateway", connection.peer, connection.local, slot=connection.slot)
        with rt.recorder.connection(connection.stream, about) as account:
            opening = await account.detect(connection.stream, patience, patience)
            if opening.how == "closed":
                return
            async with closing(await terminate(rt, connection.stream, opening, about)) as stream:
                connection.slot.settle(member=is_allowed(rt, about.identity))
                about.protocol = note_protocol(stream, opening, account)
                if about.protocol is not Protocol.OPAQUE:
                    await serve(rt, stream, about, planner.handler)
                elif about.identity is None:
                    raise NotAuthorised(NO_IDENTITY)
                else:
                    raise NotExported(
                        "traffic that is not HTTP needs a destination name: send CONNECT to the"
                        " gateway"
                    )

    return accept


def note_protocol(stream: Stream, opening: Opening, account: ConnectionAccount) -> Protocol:
    """Note in `account` how the connection is secured. Returns the protocol inside it. A client
    without TLS that speaks HTTP can at least get an HTTP error."""
    if isinstance(stream, TLSStream):
        account.secured(stream)
        return INNER.get(stream.info.alpn, Protocol.OPAQUE)
    account.plain(opening)
    return opening.protocol
