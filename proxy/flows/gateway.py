"""Traffic from other clusters to the services that this cluster exports.

    accept -> mutual TLS with a workload of the trust domain, or a refusal -> HTTP/1 or HTTP/2
      HTTP     server -> measure -> trace -> rescue -> admit -> guard -> deadline -> authorise
                 -> look up the exported service -> client -> pool -> connect(endpoint, mutual TLS)
      CONNECT  as HTTP, but connects to the endpoint for bytes, and relays

The gateway authorises the peer before it looks up the service, so that a peer without permission
cannot learn which names exist. A peer without an identity, or with one that is not on the
allow-list, gets 403. A service that the directory does not export gets 404, so no name turns the
gateway into an open proxy. A request for an exported service goes to an endpoint in this cluster.
The gateway ignores splits and failover of the service: the proxy that sent the request has already
applied them, and to apply them twice can send a request back to the cluster that it came from
(linkerd2 #6569).

The endpoint sees the gateway as its peer. The gateway sends the caller's identity in a field of the
mesh. Proxies accept that field only from gateways that they are configured to trust. The gateway
also adds an element to `Forwarded` (RFC 7239), for software that wants to know the path. It reads
that field too: this shows loops through software that drops the mesh's tokens and keeps the
standard field."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import lru_cache

from proxy.directory import Endpoint, Target
from proxy.errors import NotAuthorised, NotExported
from proxy.exchange.client import Client
from proxy.exchange.detect import Opening
from proxy.exchange.exchange import ConnectionInfo, Direction, Exchange, Handler, Whole, stack
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
LONGEST = 16384  # bytes of Forwarded that are read: enough for more than loops.max_hops hops

_PLAIN = "a gateway accepts only mutual TLS with a workload of its trust domain"


def gateway(rt: Runtime, pools: Pools[Endpoint]) -> Callable[[Connection], Awaitable[None]]:
    """The handler of a gateway's connections."""
    patience = rt.config.gateway.detect_timeout
    handler = stack(
        measure(rt.recorder.exchange),
        trace(rt.spans.gateway, "both"),
        rescue(rt.name, rt.tells, rt.reports),
        admit,
        rt.loops.layer(DIRECTION),
        deadline,
        endpoint=to_exported(rt, pools),
    )

    async def accept(connection: Connection) -> None:
        about = ConnectionInfo(DIRECTION, connection.peer, connection.local, slot=connection.slot)
        with rt.recorder.connection(connection.stream, about) as account:
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
                    raise NotExported(
                        "traffic that is not HTTP needs a destination name: send CONNECT to the"
                        " gateway"
                    )

    return accept


def inside(stream: Stream, opening: Opening, account: ConnectionAccount) -> Protocol:
    """The protocol inside the connection. A client without TLS that speaks HTTP can at least get an
    HTTP error."""
    if isinstance(stream, TLSStream):
        account.secured(stream)
        return INNER.get(stream.info.alpn, Protocol.OPAQUE)
    account.plain(opening)
    return opening.protocol


def to_exported(rt: Runtime, pools: Pools[Endpoint]) -> Handler:
    """The endpoint of the layer stack: sends each request to an endpoint of the exported service
    that the request names."""
    bridge = rt.recorder.bridge(rt.relay)
    client: Client[Endpoint] = Client(rt.settings.client, bridge)

    def choose(exchange: Exchange) -> Target:
        name = exchange.request.authority or b""
        target = rt.directory.current.exported(name)
        if target is None:
            raise NotExported(
                f"{name[:253].decode('latin-1')!r} is not exported by this cluster"
                if name
                else "the request has no Host"
            )
        return target

    async def send(exchange: Exchange, target: Target, endpoint: Endpoint) -> None:
        exchange.upstream, exchange.service = endpoint.address, target.service
        if endpoint.identity is None:
            rt.check_clear_text(endpoint.address)
        await carry(client, exchange, endpoint, pools, upstream_protocol(exchange, target))

    async def tunnel(exchange: Exchange, target: Target, endpoint: Endpoint) -> None:
        exchange.service = target.service
        async with closing(await rt.connect_opaque(endpoint)) as upstream:
            account = rt.recorder.upstream(DIRECTION, upstream)
            established = ResponseHead(200, Headers(), b"Connection established")
            if exchange.judge is not None:
                exchange.judge(
                    established, None
                )  # for bytes, a connection is all that an endpoint can prove
            try:
                exchange.record_upstream(upstream)
                stream = await exchange.switch(established)
                exchange.timer.unlimit()
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


def authorised(rt: Runtime, about: ConnectionInfo) -> SpiffeId:
    """The identity of the peer. Raises NotAuthorised if it is unknown or not on the allow-list."""
    if about.identity is None:
        raise NotAuthorised(_PLAIN)
    who = SpiffeId.parse(about.identity)
    if not rt.config.gateway.admits(who):
        raise NotAuthorised(f"{who} is not on the allow-list of this gateway")
    return who


async def alive(rt: Runtime, exchange: Exchange) -> None:
    """Answer the liveness probe of a proxy of another cluster: 200, or 503 while this proxy
    drains."""
    going = rt.drain.draining
    head = ResponseHead(
        503 if going else 200,
        Headers([(b"Content-Type", b"text/plain")]),
        b"Service Unavailable" if going else b"OK",
    )
    await exchange.respond(head, Whole(b"shutting down\n" if going else b"live\n"))


def note_way(rt: Runtime, exchange: Exchange, caller: SpiffeId) -> None:
    """Add an element to Forwarded: the sender of the request and its destination. Raises
    LoopDetected if this gateway is in the field too often already.

    Drops and counts lines that cannot be parsed on their own: a quoted string that such a line
    leaves open would swallow this gateway's element. Drops all lines if they are longer than
    `LONGEST` together."""
    request = exchange.request
    headers, host = request.headers, request.authority or b""
    by = node_of(rt.config.cluster, rt.identity.id if rt.identity is not None else caller)
    if b"forwarded" in headers:
        way: list[tuple[bytes, bytes]] = []
        came = len(headers.items)
        few = sum(map(len, headers.all(b"forwarded"))) <= LONGEST
        headers.items = [
            item
            for item in headers.items
            if item[0].lower() != b"forwarded" or (few and read_way(item[1], way))
        ]
        if len(headers.items) < came:
            rt.recorder.metrics.count_dropped_forwarded("malformed" if few else "oversized")
        if way:
            rt.loops.check_forwarded(exchange, way, (by, host))
    element = {"by": by, "for": forwarded.obfuscated(caller.sni), "host": host, "proto": b"https"}
    headers.add(b"Forwarded", forwarded.encode(element))


@lru_cache(maxsize=16)
def node_of(cluster: str, own: SpiffeId) -> bytes:
    """The name of a gateway in `by=`, one name for all replicas:
    `_east.gateway.isthmus.sa.cluster.local`. The gateways of two clusters may have the same
    identity, so the name includes the cluster, which has no dot."""
    return forwarded.obfuscated(f"{cluster}.{own.sni}")


def read_way(line: bytes, way: list[tuple[bytes, bytes]]) -> bool:
    """Append (by, host) of each element of a line to `way`. Returns False if the line is
    malformed."""
    try:
        way += [
            (element.get("by", b""), element.get("host", b""))
            for element in forwarded.parse([line])
        ]
    except ProtocolError:
        return False
    return True
