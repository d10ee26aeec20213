"""Traffic from the mesh to the local application.

    accept -> original destination -> loop guard -> TLS for me? terminate it, and know who the peer is : leave it as it is
      -> may this peer use this port?
      -> HTTP or opaque? (named by ALPN where TLS was ours; otherwise seen)
           opaque  relay <-> dial(application)
           HTTP    server -> measure -> trace -> rescue -> admit -> guard -> deadline -> policy -> client -> pool -> dial(application)

The application is dialled at the very address that the peer dialled, so it is found on whatever address it listens.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from proxy.errors import NotAuthorised, RequestError
from proxy.exchange.client import Client
from proxy.exchange.exchange import Direction, Exchange, Facts, Handler, stack
from proxy.exchange.layers import admit, deadline, measure, rescue
from proxy.exchange.loop_layer import unguarded
from proxy.exchange.prefixed_stream import Resumed
from proxy.exchange.trace_layer import trace, untraced
from proxy.exchange.upgrade import carry
from proxy.fastpath.plan import ConnectionLease, StreamLease
from proxy.flows.confirmation import confirm, decline
from proxy.flows.late_detection import FOUND_OPAQUE
from proxy.flows.runtime import Runtime, closing
from proxy.flows.tls_termination import INNER, terminate
from proxy.flows.upstreams import Pools, serve, spoken
from proxy.identity.spiffe import is_identity
from proxy.net.accept import Connection
from proxy.net.address import Address
from proxy.net.exceptions import ConnectFailed
from proxy.net.relay import SILENT
from proxy.net.socket_stream import Stream
from proxy.net.tls.handshake import TLSStream
from proxy.telemetry.records import ConnectionAccount
from proxy.wire.messages import CALLER
from proxy.wire.sniff import Protocol

DIRECTION: Direction = "inbound"


def inbound(rt: Runtime, pools: Pools[Address]) -> Callable[[Connection], Awaitable[None]]:
    """The handler of the inbound listeners' connections."""
    config = rt.config.inbound
    client: Client[Address] = Client(rt.settings.client, rt.ledger.bridge(rt.relay))
    handler = stack(
        measure(rt.ledger.exchange),
        trace(rt.spans.inbound, "server"),
        rescue(rt.name, rt.tells, rt.reports),
        admit,
        rt.loops.layer(DIRECTION),
        deadline,
        endpoint=to_application(rt, pools, client),
    )
    plan = InboundPlan(rt, pools)

    async def accept(connection: Connection) -> None:
        slot = connection.slot
        about = Facts(DIRECTION, connection.peer, rt.destination(connection, config.fixed_destination), slot=slot)
        with rt.ledger.connection(connection.stream, about) as account:
            rt.loops.accepted(connection, about)
            port = about.destination.port
            opaque = port in config.opaque_ports
            http_only = port in config.http_ports
            patience = rt.config.http.head_timeout if http_only else config.detect_timeout
            opening = await account.detect(connection.stream, silence(rt, port), patience)
            if opening.how == "closed" or (http_only and opening.how == "silent"):
                return
            rt.loops.begun(about)
            async with closing(await terminate(rt, connection.stream, opening, about)) as stream:
                slot.settle(member=about.identity is not None and config.allows(port, about.identity))
                if isinstance(stream, TLSStream):
                    account.secured(stream)
                    about.protocol = INNER.get(stream.info.alpn, Protocol.OPAQUE)
                else:
                    account.plain(opening)
                    about.protocol = Protocol.OPAQUE if opaque else opening.protocol
                    if http_only and opening.open:  # it has begun what may be a request, and is slow
                        about.protocol = Protocol.HTTP1
                if about.protocol is not Protocol.OPAQUE:
                    with pools.client(about.destination):
                        await serve(rt, stream, about, handler, plan)
                else:
                    authorise(rt, about)
                    about.unsure = not opaque and (opening.open or isinstance(stream, TLSStream))
                    late = await to_listener(rt, stream, about, account, pools)
                    if late is not None:
                        with pools.client(about.destination):
                            await serve(rt, late, about, handler, plan)

    return accept


def silence(rt: Runtime, port: int) -> float | None:
    """Seconds that a client may say nothing until it is taken for one that waits for the server; None: at once.

    A peer of the mesh sends its ClientHello as soon as it is connected. So on a port that is declared opaque, and open to peers without an
    identity, a short wait tells the two apart; and where no TLS can be ours, there is nothing to wait for.
    """
    config = rt.config.inbound
    if port in config.http_ports:  # as a server of HTTP waits for a request
        return rt.config.http.idle_timeout
    if port not in config.opaque_ports or config.requires_identity(port):
        return config.detect_timeout
    return None if rt.identity is None else config.hello_timeout


def authorise(rt: Runtime, about: Facts) -> None:
    """Raises NotAuthorised if the port's policy does not let this peer in."""
    port = about.destination.port
    if rt.config.inbound.allows(port, about.identity):
        return
    if about.identity is None:
        raise NotAuthorised(f"port {port} takes peers with a verified identity only, and {about.peer} has shown none")
    raise NotAuthorised(f"{about.identity} is not on the list of those who may use port {port}")


def to_application(rt: Runtime, pools: Pools[Address], client: Client[Address]) -> Handler:
    """The endpoint of the stack: each request to the application, in the protocol it came by: the outbound side has translated already."""

    async def send(exchange: Exchange) -> None:
        authorise(rt, exchange.facts)
        exchange.caller = caller(rt, exchange)
        exchange.upstream = exchange.facts.destination
        await carry(client, exchange, exchange.facts.destination, pools, spoken(exchange.request.version))

    return send


def caller(rt: Runtime, exchange: Exchange) -> bytes | None:
    """Who has sent a request, for the application: the peer, as TLS has verified it; if that is a gateway that we trust, whom it names."""
    peer = exchange.facts.identity
    if peer is None:
        return None
    if rt.config.inbound.trusts(peer) and not exchange.facts.unnamed:
        named = exchange.request.headers.all(CALLER)
        if len(named) == 1 and is_identity(named[0]):
            return named[0]
    return peer.encode("ascii")


class InboundPlan:
    """The same on the fast path."""

    def __init__(self, rt: Runtime, pools: Pools[Address]) -> None:
        self._rt = rt
        self.account = rt.ledger.exchange
        self._allows = rt.config.inbound.allows
        self._tracing = rt.spans.inbound
        self._pools = pools
        self._waypoint = rt.loops.waypoint(DIRECTION)

    def take(self, exchange: Exchange, now: float) -> ConnectionLease | None:
        return self._pools.take(exchange.facts.destination, now) if self._plain(exchange) else None

    def share(self, exchange: Exchange) -> StreamLease | None:
        return self._pools.share(exchange.facts.destination) if self._plain(exchange) else None

    def _plain(self, exchange: Exchange) -> bool:
        facts = exchange.facts
        if not self._allows(facts.destination.port, facts.identity):
            return False
        if not untraced(exchange, self._tracing) or not unguarded(exchange, self._waypoint):
            return False
        exchange.caller = caller(self._rt, exchange)
        exchange.upstream = facts.destination
        return True


async def to_listener(
    rt: Runtime, stream: Stream, about: Facts, account: ConnectionAccount, pools: Pools[Address]
) -> Stream | None:
    """Relay `stream` to the application, byte for byte. Raises RequestError on a port for HTTP only.

    An application that goes by what this proxy says in a header (who the caller is) must not be reachable by bytes that have not been
    looked at. A peer chooses by ALPN how it is read, and a client without TLS by its first bytes. So where the port is not declared opaque
    (`about` is unsure), the bytes are looked at, a tunnel's too. If they are HTTP, nothing is relayed: returns the stream to serve, from
    its first byte. The connection to the application is kept for the first request if nothing has passed on it: to dial again would double
    the connections of an application that dials another one for each.
    """
    if about.destination.port in rt.config.inbound.http_ports:
        raise RequestError(f"port {about.destination.port} takes HTTP only (inbound.http_ports), and this is something else")
    owner = closing(await dialled(rt, stream, about))
    async with owner as application:
        await confirm(stream)
        with account.upstream(application) as opened:
            found = await rt.look(stream, application, rt.config.inbound.detect_timeout) if about.unsure else FOUND_OPAQUE
            if found.protocol is Protocol.OPAQUE:
                account.relayed(SILENT if found.silent else await rt.relay(stream, application, about))
                return None
            about.protocol, about.unnamed = found.protocol, True
            if found.protocol is Protocol.HTTP1 and found.untouched and not about.depth:  # the pool has connections of the first level
                pools.adopt(about.destination, application, opened.handed_over())
                owner.release()
            elif found.passed:  # a FIN would say that this was all
                application.reset()
            return Resumed(stream, found.said)


async def dialled(rt: Runtime, stream: Stream, about: Facts) -> Stream:
    """A connection to the application. If there is none, the peer of `stream` is told so, and what the dialler raised is raised."""
    failure: ConnectFailed | None = None
    try:
        return await rt.dialer.dial(about.destination, about.depth + 1)
    except ConnectFailed as error:
        failure = error
    await decline(stream, failure)
    raise failure


def inbound_pools(rt: Runtime) -> Pools[Address]:
    """The kept connections to the application."""

    async def connect(address: Address, _: bytes) -> Stream:
        return await rt.dialer.dial(address)

    return Pools(rt, DIRECTION, connect)
