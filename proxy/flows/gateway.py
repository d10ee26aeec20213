"""Traffic from other clusters to the services that this cluster exports.

    accept -> mutual TLS with a workload of the trust domain, or a refusal -> HTTP, of either version
      HTTP     server -> measure -> trace -> rescue -> admit -> guard -> deadline -> who? -> what? -> client -> pool
                 -> connect(endpoint, mutual TLS)
      CONNECT  the same, but the endpoint is connected to for bytes, and relayed

*Who* comes before *what*, so that nobody learns which names exist here who may not use them: without an identity, or with one that is
not on the list, 403. What the directory does not export, 404: there is no name by which a gateway could be used as a way to anywhere
else. What it does export goes to an endpoint in this cluster. The splits and failovers of the service are not asked: they were the
business of the proxy that sent the request here, and to ask them twice sends requests back to where they came from (linkerd2 #6569).

The endpoint sees the gateway as its peer. The caller's identity goes along in a field of ours, which proxies believe of a gateway that
they are told to trust and of nobody else, and in `Forwarded` (RFC 7239) for whoever wants to know the way. That is read too: it shows loops
through software that drops our tokens and keeps the standard's field.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import lru_cache

from proxy.directory import Endpoint, Target
from proxy.errors import NotAuthorised, NotExported
from proxy.exchange.client import Client
from proxy.exchange.detect import Opening
from proxy.exchange.exchange import Direction, Exchange, Facts, Handler, Whole, stack
from proxy.exchange.layers import admit, deadline, measure, rescue
from proxy.exchange.trace_layer import trace
from proxy.exchange.upgrade import carry
from proxy.flows.runtime import Runtime, closing
from proxy.flows.tls_termination import INNER, terminate
from proxy.flows.upstreams import Pools, serve, upstream_protocol
from proxy.identity.spiffe import SpiffeId
from proxy.net.accept import Connection
from proxy.net.socket_stream import Stream
from proxy.net.tls.handshake import TLSStream
from proxy.routing.remote_gateways import LIVE
from proxy.telemetry.records import ConnectionAccount
from proxy.wire import forwarded
from proxy.wire.messages import Headers, ProtocolError, ResponseHead
from proxy.wire.sniff import Protocol

DIRECTION: Direction = "gateway"
LONGEST = 16384  # bytes of Forwarded that are read: more hops than loops.max_hops are

_PLAIN = "a gateway takes mutual TLS with a workload of its trust domain only"


def gateway(rt: Runtime, pools: Pools[Endpoint]) -> Callable[[Connection], Awaitable[None]]:
    """The handler of a gateway's connections."""
    patience = rt.config.gateway.detect_timeout
    handler = stack(
        measure(rt.ledger.exchange),
        trace(rt.spans.gateway, "both"),
        rescue(rt.name, rt.tells, rt.reports),
        admit,
        rt.loops.layer(DIRECTION),
        deadline,
        endpoint=to_exported(rt, pools),
    )

    async def accept(connection: Connection) -> None:
        about = Facts(DIRECTION, connection.peer, connection.local, slot=connection.slot)
        with rt.ledger.connection(connection.stream, about) as account:
            opening = await account.detect(connection.stream, patience, patience)
            if opening.how == "closed":
                return
            async with closing(await terminate(rt, connection.stream, opening, about)) as stream:
                connection.slot.settle(member=is_allowed(rt, about.identity))
                about.protocol = inside(stream, opening, account)
                if about.protocol is not Protocol.OPAQUE:
                    await serve(rt, stream, about, handler)
                elif about.identity is None:
                    raise NotAuthorised(_PLAIN)
                else:
                    raise NotExported("bytes that are not HTTP need a name: a gateway takes them by CONNECT")

    return accept


def inside(stream: Stream, opening: Opening, account: ConnectionAccount) -> Protocol:
    """What is spoken. A client without TLS that speaks HTTP can at least be told so."""
    if isinstance(stream, TLSStream):
        account.secured(stream)
        return INNER.get(stream.info.alpn, Protocol.OPAQUE)
    account.plain(opening)
    return opening.protocol


def to_exported(rt: Runtime, pools: Pools[Endpoint]) -> Handler:
    """The endpoint of the stack: each request to an endpoint of the exported service that it names."""
    bridge = rt.ledger.bridge(rt.relay)
    client: Client[Endpoint] = Client(rt.settings.client, bridge)

    def choose(exchange: Exchange) -> Target:
        name = exchange.request.authority or b""
        target = rt.directory.current.exported(name)
        if target is None:
            raise NotExported(f"{name[:253].decode('latin-1')!r} is not exported by this cluster" if name else "the request names nobody")
        return target

    async def send(exchange: Exchange, target: Target, endpoint: Endpoint) -> None:
        exchange.upstream, exchange.service = endpoint.address, target.service
        if endpoint.identity is None:
            rt.check_clear_text(endpoint.address)
        await carry(client, exchange, endpoint, pools, upstream_protocol(exchange, target))

    async def tunnel(exchange: Exchange, target: Target, endpoint: Endpoint) -> None:
        exchange.service = target.service
        async with closing(await rt.connect_opaque(endpoint)) as upstream:
            account = rt.ledger.upstream(DIRECTION, upstream)
            established = ResponseHead(200, Headers(), b"Connection established")
            if exchange.judge is not None:
                exchange.judge(established, None)  # that it is there is all that bytes can say for an endpoint
            try:
                exchange.carried(upstream)
                stream = await exchange.switch(established)
                exchange.clock.unlimit()
                await bridge(exchange, stream, upstream)
            finally:
                account.close()

    async def handle(exchange: Exchange) -> None:
        who = authorised(rt, exchange.facts)
        request = exchange.request
        if request.target == LIVE and request.method == b"GET":
            await alive(rt, exchange)
            return
        choose(exchange)
        if request.method == b"CONNECT" and request.protocol is None:
            await rt.dispatcher.exchange(exchange, choose, tunnel)
            return
        exchange.caller = str(who).encode("ascii")
        note_way(rt, exchange, who)
        await rt.dispatcher.exchange(exchange, choose, send)

    return handle


def is_allowed(rt: Runtime, identity: str | None) -> bool:
    """Whether a peer may use this gateway."""
    return identity is not None and rt.config.gateway.admits(identity)


def authorised(rt: Runtime, about: Facts) -> SpiffeId:
    """Who the peer is. Raises NotAuthorised if that is unknown, or not on the list."""
    if about.identity is None:
        raise NotAuthorised(_PLAIN)
    who = SpiffeId.parse(about.identity)
    if not rt.config.gateway.admits(who):
        raise NotAuthorised(f"{who} is not on the list of those who may use this gateway")
    return who


async def alive(rt: Runtime, exchange: Exchange) -> None:
    """A proxy of another cluster asks whether to send requests here."""
    going = rt.drain.draining
    head = ResponseHead(503 if going else 200, Headers([(b"Content-Type", b"text/plain")]), b"Service Unavailable" if going else b"OK")
    await exchange.respond(head, Whole(b"shutting down\n" if going else b"live\n"))


def note_way(rt: Runtime, exchange: Exchange, caller: SpiffeId) -> None:
    """Add who has sent the request here, and to whom, to Forwarded. Raises LoopDetected if we stand there too often already.

    Lines of others that cannot be read by themselves are dropped, and counted: what they leave open would swallow ours. All are, if they
    are longer than `LONGEST` together."""
    request = exchange.request
    headers, host = request.headers, request.authority or b""
    by = node_of(rt.config.cluster, rt.identity.id if rt.identity is not None else caller)
    if b"forwarded" in headers:
        way: list[tuple[bytes, bytes]] = []
        came = len(headers.items)
        few = sum(map(len, headers.all(b"forwarded"))) <= LONGEST
        headers.items = [item for item in headers.items if item[0].lower() != b"forwarded" or (few and read_way(item[1], way))]
        if len(headers.items) < came:
            rt.ledger.metrics.way_dropped("broken" if few else "oversized")
        if way:
            rt.loops.noted(exchange, way, (by, host))
    element = {"by": by, "for": forwarded.obfuscated(caller.sni), "host": host, "proto": b"https"}
    headers.add(b"Forwarded", forwarded.encode(element))


@lru_cache(maxsize=16)
def node_of(cluster: str, own: SpiffeId) -> bytes:
    """A gateway as `by=` names it, all replicas by one name: `_east.gateway.isthmus.sa.cluster.local`. The gateways of two clusters may
    have one identity, and a cluster's name has no dot."""
    return forwarded.obfuscated(f"{cluster}.{own.sni}")


def read_way(line: bytes, way: list[tuple[bytes, bytes]]) -> bool:
    """Add (by, host) of each element of a line. False: it is not of the grammar."""
    try:
        way += [(element.get("by", b""), element.get("host", b"")) for element in forwarded.parse([line])]
    except ProtocolError:
        return False
    return True
