"""Traffic from the mesh to the local application.

    accept -> original destination -> loop guard
      -> TLS for this proxy? yes: terminate it and verify the peer. no: pass the bytes unchanged
      -> may this peer use this port?
      -> HTTP or opaque? (by ALPN if this proxy terminated TLS, otherwise by the first bytes)
           opaque  relay <-> dial(application)
           HTTP    server -> measure -> trace -> rescue -> admit -> guard -> deadline -> policy
                     -> client -> pool -> dial(application)

The proxy connects to the address that the peer connected to, so the application may listen on any
address."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from proxy.errors import NotAuthorised, RequestError
from proxy.exchange.client import Client
from proxy.exchange.exchange import ConnectionInfo, Direction, Exchange, Handler, stack
from proxy.exchange.layers import admit, deadline, measure, rescue
from proxy.exchange.loop_layer import unguarded
from proxy.exchange.prefixed_stream import PrefixedStream
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
    client: Client[Address] = Client(rt.settings.client, rt.recorder.bridge(rt.relay))
    handler = stack(
        measure(rt.recorder.exchange),
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
        about = ConnectionInfo(
            DIRECTION,
            connection.peer,
            rt.destination(connection, config.fixed_destination),
            slot=slot,
        )
        with rt.recorder.connection(connection.stream, about) as account:
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


def authorise(rt: Runtime, about: ConnectionInfo) -> None:
    """Raises NotAuthorised if the policy of the port does not admit this peer."""
    port = about.destination.port
    if rt.config.inbound.allows(port, about.identity):
        return
    if about.identity is None:
        raise NotAuthorised(
            f"port {port} requires a verified identity, and {about.peer} presented no client"
            " certificate"
        )
    raise NotAuthorised(f"{about.identity} is not on the allow-list of port {port}")


def to_application(rt: Runtime, pools: Pools[Address], client: Client[Address]) -> Handler:
    """The endpoint of the layer stack: sends each request to the application, in the protocol in
    which it arrived. The outbound side has already translated it."""

    async def send(exchange: Exchange) -> None:
        authorise(rt, exchange.facts)
        exchange.caller = caller(rt, exchange)
        exchange.upstream = exchange.facts.destination
        await carry(
            client, exchange, exchange.facts.destination, pools, spoken(exchange.request.version)
        )

    return send


def caller(rt: Runtime, exchange: Exchange) -> bytes | None:
    """The sender of a request, for the application: the identity of the TLS peer, or, if that is a
    trusted gateway, the identity that the gateway names. None: the peer has no identity."""
    peer = exchange.facts.identity
    if peer is None:
        return None
    if rt.config.inbound.trusts(peer) and not exchange.facts.unnamed:
        named = exchange.request.headers.all(CALLER)
        if len(named) == 1 and is_identity(named[0]):
            return named[0]
    return peer.encode("ascii")


class InboundPlan:
    """Plans inbound exchanges on the fast path."""

    def __init__(self, rt: Runtime, pools: Pools[Address]) -> None:
        self._rt = rt
        self.account = rt.recorder.exchange
        self._allows = rt.config.inbound.allows
        self._tracing = rt.spans.inbound
        self._pools = pools
        self._hop_tokens = rt.loops.hop_tokens(DIRECTION)

    def take(self, exchange: Exchange, now: float) -> ConnectionLease | None:
        return self._pools.take(exchange.facts.destination, now) if self._plain(exchange) else None

    def share(self, exchange: Exchange) -> StreamLease | None:
        return self._pools.share(exchange.facts.destination) if self._plain(exchange) else None

    def _plain(self, exchange: Exchange) -> bool:
        facts = exchange.facts
        if not self._allows(facts.destination.port, facts.identity):
            return False
        if not untraced(exchange, self._tracing) or not unguarded(exchange, self._hop_tokens):
            return False
        exchange.caller = caller(self._rt, exchange)
        exchange.upstream = facts.destination
        return True


async def to_listener(
    rt: Runtime,
    stream: Stream,
    about: ConnectionInfo,
    account: ConnectionAccount,
    pools: Pools[Address],
) -> Stream | None:
    """Relay `stream` to the application, byte for byte. Raises RequestError on a port for HTTP
    only.

    An application may rely on a header that this proxy sets (the identity of the caller). So bytes
    that have not been inspected must not reach it. A peer selects the protocol by ALPN, and a
    client without TLS by its first bytes. Therefore, if the port is not declared opaque (`about` is
    unsure), this function inspects the bytes, those of a tunnel too. If they are HTTP, it relays
    nothing, and returns the stream to serve, from its first byte. It keeps the connection to the
    application for the first request if no byte has passed on it: a second connection would double
    the connections of an application that opens one to another service for each that it accepts."""
    if about.destination.port in rt.config.inbound.http_ports:
        raise RequestError(
            f"port {about.destination.port} accepts only HTTP (inbound.http_ports), and this"
            " connection is not HTTP"
        )
    owner = closing(await dialled(rt, stream, about))
    async with owner as application:
        await confirm(stream)
        with account.upstream(application) as opened:
            found = (
                await rt.look(stream, application, rt.config.inbound.detect_timeout)
                if about.unsure
                else FOUND_OPAQUE
            )
            if found.protocol is Protocol.OPAQUE:
                account.relayed(
                    SILENT if found.silent else await rt.relay(stream, application, about)
                )
                return None
            about.protocol, about.unnamed = found.protocol, True
            if (
                found.protocol is Protocol.HTTP1 and found.untouched and not about.depth
            ):  # the pool keeps connections of depth 1 only
                pools.adopt(about.destination, application, opened.handed_over())
                owner.release()
            elif found.passed:  # a FIN would mean that the data was complete
                application.reset()
            return PrefixedStream(stream, found.said)


async def dialled(rt: Runtime, stream: Stream, about: ConnectionInfo) -> Stream:
    """Connect to the application. If that fails, report it to the peer of `stream`, and raise the
    dialler's error."""
    failure: ConnectFailed | None = None
    try:
        return await rt.dialer.dial(about.destination, about.depth + 1)
    except ConnectFailed as error:
        failure = error
    await decline(stream, failure)
    raise failure


def inbound_pools(rt: Runtime) -> Pools[Address]:
    """The connection pools to the application."""

    async def connect(address: Address, _: bytes) -> Stream:
        return await rt.dialer.dial(address)

    return Pools(rt, DIRECTION, connect)
