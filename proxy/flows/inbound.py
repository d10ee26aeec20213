"""Traffic from the mesh to the local application.

    accept -> original destination -> loop guard
      -> TLS for this proxy? yes: terminate it and verify the peer. no: pass the bytes unchanged
      -> may this peer use this port?
      -> HTTP or opaque? (by ALPN if this proxy terminated TLS, otherwise by the first bytes)
           opaque  relay <-> dial(application): inbound_relay.py
           HTTP    server -> measure -> trace -> rescue -> admit -> guard -> deadline -> plan
                     -> client -> pool -> dial(application): inbound_plan.py

The proxy connects to the address that the peer connected to, so the application may listen on any
address."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from proxy.exchange.exchange import ConnectionInfo
from proxy.flows.inbound_plan import InboundPlanner, authorise
from proxy.flows.inbound_relay import relay_to_application
from proxy.flows.runtime import Runtime, closing
from proxy.flows.serving import serve
from proxy.flows.tls_termination import INNER, terminate
from proxy.flows.upstreams import Pools
from proxy.net.accept import Connection
from proxy.net.address import Address
from proxy.net.socket_stream import Stream
from proxy.net.tls.handshake import TLSStream
from proxy.wire.sniff import Protocol


def inbound(rt: Runtime, pools: Pools[Address]) -> Callable[[Connection], Awaitable[None]]:
    """The handler of the inbound listeners' connections."""
    config = rt.config.inbound
    planner = InboundPlanner(rt, pools)

    async def accept(connection: Connection) -> None:
        slot = connection.slot
        about = ConnectionInfo(
            "inbound",
            connection.peer,
            rt.destination(connection, config.fixed_destination),
            slot=slot,
        )
        with rt.recorder.connection(connection.stream, about) as account:
            rt.loops.check_accepted(connection, about)
            port = about.destination.port
            opaque = port in config.opaque_ports
            http_only = port in config.http_ports
            patience = rt.config.http.head_timeout if http_only else config.detect_timeout
            opening = await account.detect(connection.stream, silence(rt, port), patience)
            if opening.how == "closed" or (http_only and opening.how == "silent"):
                return
            rt.loops.check_again(about)
            async with closing(await terminate(rt, connection.stream, opening, about)) as stream:
                slot.settle(
                    member=about.identity is not None and config.allows(port, about.identity)
                )
                if isinstance(stream, TLSStream):
                    account.secured(stream)
                    about.protocol = INNER.get(stream.info.alpn, Protocol.OPAQUE)
                else:
                    account.plain(opening)
                    about.protocol = Protocol.OPAQUE if opaque else opening.protocol
                    if http_only and opening.open:  # an incomplete request head from a slow client
                        about.protocol = Protocol.HTTP1
                http: Stream | None = stream
                if about.protocol is Protocol.OPAQUE:
                    authorise(rt, about)
                    about.unsure = not opaque and (opening.open or isinstance(stream, TLSStream))
                    http = await relay_to_application(rt, stream, about, account, pools)
                if http is not None:
                    with pools.client(about.destination):
                        await serve(rt, http, about, planner.handler, planner)

    return accept


def silence(rt: Runtime, port: int) -> float | None:
    """Seconds that a client may be silent before it counts as one that waits for the server to
    speak. None: do not wait.

    A peer of the mesh sends its ClientHello as soon as it is connected. So on a port that is
    declared opaque and accepts peers without an identity, a short wait is enough. If this proxy has
    no identity, it terminates no TLS, and does not wait."""
    config = rt.config.inbound
    if port in config.http_ports:  # as an HTTP server waits for a request
        return rt.config.http.idle_timeout
    if port not in config.opaque_ports or config.requires_identity(port):
        return config.detect_timeout
    return None if rt.identity is None else config.hello_timeout
