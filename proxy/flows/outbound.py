"""Traffic from the local application to the mesh.

    accept -> original destination -> loop guard -> look it up in the directory -> HTTP or opaque?
        opaque  relay <-> connect(endpoint, mutual TLS if it is meshed; a tunnel if it is a gateway
                of another cluster)
        HTTP    server -> measure -> trace -> rescue -> admit -> guard -> deadline -> endpoint
                  -> client -> pool -> connect

The router decides the destination (routing/router.py). The flow asks it when it accepts a
connection, and again for each request: the directory may have changed, and the requests of one
connection may go to different services, clusters and endpoints. The proxy reaches a service of
another cluster through a gateway there. It sends the gateway the service's name in that cluster, as
the authority of the request or in a CONNECT."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from proxy.config.units import within
from proxy.directory import UNANSWERED, Endpoint, Hint, Target, itself
from proxy.directory.policy import DEFAULT_POLICY, Policy
from proxy.errors import LoopDetected, RequestError
from proxy.exchange.client import Client
from proxy.exchange.exchange import ConnectionInfo, Direction, Exchange, Handler, stack
from proxy.exchange.layers import admit, deadline, measure, rescue
from proxy.exchange.loop_layer import hide_names, unguarded
from proxy.exchange.prefixed_stream import PrefixedStream
from proxy.exchange.replay import Replay
from proxy.exchange.trace_layer import trace, untraced
from proxy.exchange.tunnel import open_tunnel
from proxy.exchange.upgrade import carry
from proxy.fastpath.plan import LEAST_LIMIT, ConnectionLease, StreamLease
from proxy.flows.late_detection import FOUND_OPAQUE
from proxy.flows.loop_guard import SelfCall
from proxy.flows.runtime import Runtime, closing
from proxy.flows.upstreams import Pools, serve, upstream_protocol
from proxy.identity.tls_contexts import ALPN_HTTP1
from proxy.net.accept import Connection
from proxy.net.relay import SILENT
from proxy.net.socket_stream import Stream
from proxy.routing.dispatch import Underway
from proxy.telemetry.records import ConnectionAccount
from proxy.wire.messages import RequestHead
from proxy.wire.sniff import Protocol
from tracing.propagation import header

DIRECTION: Direction = "outbound"

Lease = TypeVar("Lease", ConnectionLease, StreamLease)


def outbound(rt: Runtime, pools: Pools[Endpoint]) -> Callable[[Connection], Awaitable[None]]:
    """The handler of the outbound listeners' connections."""
    config = rt.config.outbound
    client: Client[Endpoint] = Client(rt.settings.client, rt.recorder.bridge(rt.relay))
    handler = stack(
        measure(rt.recorder.exchange),
        trace(rt.spans.outbound, "client"),
        rescue(rt.name, rt.tells),
        admit,
        rt.loops.layer(DIRECTION),
        deadline,
        endpoint=to_service(rt, pools, client),
    )
    plan = OutboundPlan(rt, pools)

    async def accept(connection: Connection) -> None:
        about = ConnectionInfo(
            DIRECTION,
            connection.peer,
            rt.destination(connection, config.fixed_destination),
            slot=connection.slot,
        )
        with (
            rt.recorder.connection(connection.stream, about) as account,
            rt.router.holding(about.destination),
            rt.directory.holding(about.destination),
        ):
            rt.loops.accepted(connection, about)
            if rt.directory.asks:
                await rt.directory.learn(about.destination)
            target = rt.router.known(about.destination) or itself(about.destination)
            about.service = target.service
            opaque = target.protocol is Hint.OPAQUE or about.destination.port in config.opaque_ports
            declared = not opaque and target.protocol in (Hint.HTTP1, Hint.HTTP2)
            opening = await account.detect(
                connection.stream, *waits(rt, opaque=opaque, declared=declared)
            )
            account.plain(opening)
            rt.loops.begun(about)
            if opening.how == "closed" or (declared and opening.how == "silent"):
                return
            about.protocol = Protocol.HTTP1 if declared and opening.open else opening.protocol
            stream: Stream | None = connection.stream
            if about.protocol is Protocol.OPAQUE:
                about.unsure = opening.open
                stream = await to_endpoint(rt, target, connection.stream, about, account)
            if stream is not None:
                await serve(rt, stream, about, handler, plan)

    return accept


def waits(rt: Runtime, *, opaque: bool, declared: bool) -> tuple[float | None, float]:
    """(seconds that a client may be silent, seconds for the rest of the request's start). If HTTP
    is declared, the proxy waits as long as an HTTP server would."""
    if opaque:
        return None, 0.0
    if declared:
        return rt.config.http.idle_timeout, rt.config.http.head_timeout
    return rt.config.outbound.detect_timeout, rt.config.outbound.detect_timeout


def to_service(rt: Runtime, pools: Pools[Endpoint], client: Client[Endpoint]) -> Handler:
    """The endpoint of the layer stack: sends each request to one of the endpoints of its
    destination."""

    def choose(exchange: Exchange) -> Target:
        request = exchange.request
        destination = exchange.facts.destination
        meant = rt.router.meant(destination, lambda: whom(request))
        if meant is UNANSWERED and not rt.directory.inside(destination.host):
            meant = itself(destination)
        exchange.service = meant.service
        return rt.router.choose(meant)

    async def send(exchange: Exchange, target: Target, endpoint: Endpoint) -> None:
        exchange.upstream, exchange.chosen = endpoint.address, target.service
        exchange.authority = told(exchange.request, target)
        if endpoint.identity is None:
            rt.check_clear_text(endpoint.address)
            hide_names(exchange)
        protocol = upstream_protocol(exchange, target)
        if exchange.underway or not rt.loops.calls_itself(endpoint.address.host):
            await carry(client, exchange, endpoint, pools, protocol)
            return
        with rt.loops.self_call(endpoint.address.port) as call:
            call.follow(exchange)
            await carry(client, exchange, endpoint, pools, protocol)

    async def handle(exchange: Exchange) -> None:
        if rt.directory.asks:
            await _learn(rt, exchange)
        await rt.dispatcher.exchange(exchange, choose, send)

    return handle


async def _learn(rt: Runtime, exchange: Exchange) -> None:
    """Wait until the directory can tell where the request goes, or the limit is reached. It is
    known for all but the first requests."""
    destination, request = exchange.facts.destination, exchange.request
    if rt.router.meant(destination, lambda: whom(request)) is not UNANSWERED:
        return
    await rt.directory.learn(destination)
    if rt.router.known(destination) is None and (name := whom(request)):
        await rt.directory.learn_name(name, rt.router.namespace)


def whom(request: RequestHead) -> bytes | None:
    """The authority in the request. None for a CONNECT for a tunnel, which is addressed to the
    proxy that receives it."""
    return None if request.method == b"CONNECT" and request.protocol is None else request.authority


def told(request: RequestHead, target: Target) -> bytes | None:
    """The authority for a gateway: the service's name in its own cluster. None: the request's own
    authority is right. Raises RequestError (501) for a CONNECT of the application to a service of
    another cluster.

    Such a CONNECT is addressed to a forward proxy, and its authority is the destination of the
    tunnel. It cannot carry both names."""
    if target.remote is None:
        return None
    if request.method == b"CONNECT" and request.protocol is None:
        raise RequestError(
            f"CONNECT to {target.service}, a proxy in another cluster: declare its port opaque in"
            " the directory",
            501,
        )
    return target.remote.authority


class OutboundPlan:
    """Plans outbound exchanges on the fast path: those for services of this cluster without special
    policies."""

    def __init__(self, rt: Runtime, pools: Pools[Endpoint]) -> None:
        self.account = rt.recorder.exchange
        self._rt = rt
        self._pools = pools
        self._hop_tokens = rt.loops.hop_tokens(DIRECTION)

    def take(self, exchange: Exchange, now: float) -> ConnectionLease | None:
        return self._leased(exchange, Hint.HTTP2, lambda endpoint: self._pools.take(endpoint, now))

    def share(self, exchange: Exchange) -> StreamLease | None:
        shared = self._leased(exchange, Hint.HTTP1, self._pools.share)
        if shared is not None and isinstance(shared.attempt, Underway):
            shared.on_answer = shared.attempt.answered
            # The server may refuse a stream after part of its body was sent. An address without a
            # service gets one attempt only.
            target = shared.attempt.target
            if target.service is not None and exchange.body.length != 0:
                exchange.body = Replay(
                    exchange.body, target.policy.retries.max_body, exchange.facts.share
                )
        return shared

    def _leased(
        self, exchange: Exchange, foreign: Hint, lend: Callable[[Endpoint], Lease | None]
    ) -> Lease | None:
        """Lease what `lend` returns for the chosen endpoint. `foreign`: the protocol that would
        need translation. None: the exchange takes the ordinary path."""
        rt, request = self._rt, exchange.request
        if not untraced(exchange, rt.spans.outbound):
            return None
        target = rt.router.meant(exchange.facts.destination, lambda: whom(request))
        policy = target.policy
        if target.plan is not None or target.remote is not None or target.protocol is foreign:
            return None
        if policy is not DEFAULT_POLICY and not _plain(policy, exchange):
            return None
        endpoint = rt.dispatcher.sound(target)
        if (
            endpoint is None
            or (endpoint.identity is None and not rt.clear_text_allowed(endpoint.address))
            or not unguarded(exchange, self._hop_tokens)
        ):
            return None
        lease = lend(endpoint)
        if lease is None:
            # A second draw would favour endpoints with a ready connection.
            exchange.service, exchange.first = target.service, endpoint
            return None
        call = None
        if rt.loops.calls_itself(endpoint.address.host):
            try:
                call = rt.loops.call_self(endpoint.address.port)
            except LoopDetected:  # the ordinary path reports it
                lease.unused()
                return None
        exchange.upstream, exchange.service, exchange.chosen = (
            endpoint.address,
            target.service,
            target.service,
        )
        if endpoint.identity is None:
            hide_names(exchange)
        if policy is not DEFAULT_POLICY:
            if statuses := policy.retries.statuses:
                lease.declines = lambda head: within(head.status, statuses)
            if policy.timeouts.request is not None:
                lease.limit = trio.current_time() + policy.timeouts.request
        lease.attempt = underway = rt.dispatcher.watch(exchange, target, endpoint)
        lease.on_end = underway.ended
        if call is not None:
            lease.on_begin, lease.on_end = call.follow, call.then(lease.on_end)
        return lease


def _plain(policy: Policy, exchange: Exchange) -> bool:
    """Whether the fast path can apply `policy`. It has the whole body of an HTTP/1.1 request, so it
    can always send it again."""
    times, length = policy.timeouts, exchange.body.length
    if not policy.plain or (times.request is not None and times.request < LEAST_LIMIT):
        return False
    return exchange.request.version == b"2" or (
        isinstance(length, int) and length <= policy.retries.max_body
    )


async def to_endpoint(
    rt: Runtime, target: Target, client: Stream, about: ConnectionInfo, account: ConnectionAccount
) -> Stream | None:
    """Relay `client` to an endpoint, byte for byte. If `about` is unsure and the client turns out
    to speak HTTP, relay nothing, and return the stream to serve, from its first byte."""
    calls: list[SelfCall] = []  # this connection, if it is a call of the pod to itself

    async def connect(target: Target, endpoint: Endpoint) -> Stream:
        about.chosen = target.service
        if not rt.loops.calls_itself(endpoint.address.host):
            return await to_its_port(rt, target, endpoint, about)
        calls.append(rt.loops.call_self(endpoint.address.port))
        try:
            return await to_its_port(rt, target, endpoint, about)
        except BaseException:
            calls.pop().answered()
            raise

    try:
        async with (
            rt.dispatcher.connection(lambda: rt.router.choose(target), connect) as stream,
            closing(stream) as upstream,
        ):
            with account.upstream(upstream):
                heard = calls[0].moved if calls else None
                found = (
                    await rt.look(client, upstream, rt.config.outbound.detect_timeout)
                    if about.unsure
                    else FOUND_OPAQUE
                )
                if found.protocol is not Protocol.OPAQUE:
                    if found.passed:  # a FIN would mean that the data was complete
                        upstream.reset()
                    about.protocol = found.protocol
                    return PrefixedStream(client, found.said)
                account.relayed(
                    SILENT if found.silent else await rt.relay(client, upstream, about, heard)
                )
        return None
    except LoopDetected:
        rt.loops.stop(about)
        raise
    finally:
        for call in calls:
            call.answered()


async def to_its_port(
    rt: Runtime, target: Target, endpoint: Endpoint, about: ConnectionInfo
) -> Stream:
    """Connect to the target's port at an endpoint, through a tunnel if the endpoint is a
    gateway."""
    remote = target.remote
    if remote is None:
        return await rt.connect_opaque(endpoint, about.depth + 1)
    trace = [header(about.trace.trace_id, about.trace.span_id)] if about.trace is not None else []
    stream = await rt.connect(endpoint, ALPN_HTTP1, about.depth + 1)
    try:
        fields = [*trace, *rt.loops.fields(b"CONNECT", remote.tunnel)]
        return await open_tunnel(
            stream, remote.tunnel, fields, rt.settings.limits, rt.config.clusters.tunnel_timeout
        )
    except BaseException:
        stream.close()
        raise
