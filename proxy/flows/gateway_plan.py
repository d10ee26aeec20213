"""The plan of an exchange at a gateway: who may send it, and which exported service it goes to.

The gateway authorises the peer before it looks up the service, so that a peer without permission
cannot learn which names exist. A peer without an identity, or with one that is not on the
allow-list, gets 403. A service that the directory does not export gets 404, so no name turns the
gateway into an open proxy. A request for an exported service goes to an endpoint in this cluster.
The gateway ignores splits and failover of the service, because the proxy that sent the request has
already applied them. If they were applied twice, a request could return to the cluster that it came
from (linkerd2 #6569).

The endpoint sees the gateway as its peer. The gateway sends the caller's identity in a field of the
mesh. Proxies accept that field only from gateways that they are configured to trust. An application
without a proxy accepts it from this gateway. So no peer may send it such a field itself. Therefore
the gateway inspects the bytes of a tunnel to such an application."""

from __future__ import annotations

from proxy.directory import UNANSWERED, Endpoint, Hint, Target
from proxy.errors import DirectoryUnavailable, NotAuthorised, NotExported, RequestError
from proxy.exchange.client import Client
from proxy.exchange.exchange import ConnectionInfo, Exchange, Whole
from proxy.exchange.upgrade import carry
from proxy.flows.forwarded_path import add_forwarded
from proxy.flows.runtime import Runtime, closing
from proxy.flows.serving import HttpLayers
from proxy.flows.upstreams import Pools, upstream_protocol
from proxy.identity.spiffe import SpiffeId
from proxy.net.exceptions import NetError
from proxy.net.relay import SILENT
from proxy.net.socket_stream import Stream
from proxy.routing.remote_gateways import LIVE
from proxy.telemetry.records import note_end
from proxy.wire.messages import Headers, ResponseHead
from proxy.wire.sniff import Protocol

NO_IDENTITY = "a gateway accepts only mutual TLS with a workload of its trust domain"


class GatewayPlanner:
    """Carries the exchanges of a gateway, on the ordinary path only. `handler`: with its layers."""

    def __init__(self, rt: Runtime, pools: Pools[Endpoint]) -> None:
        self._rt = rt
        self._pools = pools
        self._bridge = rt.recorder.bridge(rt.relay)
        self._client: Client[Endpoint] = Client(rt.settings.client, self._bridge)
        self.handler = HttpLayers(rt, "gateway").stack(self._carry)

    async def _carry(self, exchange: Exchange) -> None:
        rt, request = self._rt, exchange.request
        peer = authorise_peer(rt, exchange.facts)
        if request.target == LIVE and request.method == b"GET":
            await answer_probe(rt, exchange)
            return
        if rt.directory.asks and request.authority:
            await rt.directory.learn_name(request.authority, "")
        self._choose(exchange)
        if request.method == b"CONNECT" and request.protocol is None:
            await rt.dispatcher.exchange(exchange, self._choose, self._tunnel)
            return
        exchange.caller = str(peer).encode("ascii")
        add_forwarded(rt, exchange, peer)
        await rt.dispatcher.exchange(exchange, self._choose, self._send)

    def _choose(self, exchange: Exchange) -> Target:
        name = exchange.request.authority or b""
        target = self._rt.directory.current.exported(name)
        if target is UNANSWERED:
            raise DirectoryUnavailable(
                "the directory is unavailable: the control plane has not answered"
            )
        if target is None:
            raise NotExported(
                f"{name[:253].decode('latin-1')!r} is not exported by this cluster"
                if name
                else "the request has no Host"
            )
        return target

    async def _send(self, exchange: Exchange, target: Target, endpoint: Endpoint) -> None:
        exchange.upstream, exchange.service = endpoint.address, target.service
        if endpoint.identity is None:
            self._rt.check_clear_text(endpoint.address)
        protocol = upstream_protocol(exchange, target)
        await carry(self._client, exchange, endpoint, self._pools, protocol)

    async def _tunnel(self, exchange: Exchange, target: Target, endpoint: Endpoint) -> None:
        exchange.service = target.service
        direct = self._rt.is_direct(endpoint)
        if direct and target.protocol in (Hint.HTTP1, Hint.HTTP2):
            raise RequestError(
                f"this port of {target.service} accepts only HTTP, and {endpoint.address} has no"
                " proxy that could inspect a tunnel"
            )
        async with closing(await self._rt.connect_opaque(endpoint)) as upstream:
            account = self._rt.recorder.upstream("gateway", upstream)
            established = ResponseHead(200, Headers(), b"Connection established")
            if exchange.judge is not None:
                # for bytes, a connection is all that an endpoint can prove
                exchange.judge(established, None)
            try:
                exchange.record_upstream(upstream)
                stream = await exchange.switch(established)
                exchange.timer.unlimit()
                if (
                    not direct
                    or target.protocol is Hint.OPAQUE
                    or await self._is_opaque(exchange, stream, upstream)
                ):
                    await self._bridge(exchange, stream, upstream)
            finally:
                account.close()

    async def _is_opaque(self, exchange: Exchange, stream: Stream, upstream: Stream) -> bool:
        """Whether the bytes of a tunnel are not HTTP, so that the rest may be relayed. False: the
        tunnel has ended. Raises RequestError if they are HTTP: requests have to come as such."""
        try:
            patience = self._rt.config.gateway.detect_timeout
            found = await self._rt.detect_late(stream, upstream, patience)
        except NetError as error:
            exchange.failure, exchange.failure_words = "tunnel_lost", str(error)
            return False
        finally:
            exchange.request_bytes += upstream.bytes_written
            exchange.response_bytes += upstream.bytes_read
        if found.silent:
            note_end(exchange, SILENT)
            return False
        if found.protocol is not Protocol.OPAQUE:
            if found.passed:  # a FIN would mean that the data was complete
                upstream.reset()
            raise RequestError("HTTP in a tunnel to an endpoint without a proxy")
        return True


def is_allowed(rt: Runtime, identity: str | None) -> bool:
    """Whether a peer may use this gateway."""
    return identity is not None and rt.config.gateway.admits(identity)


def authorise_peer(rt: Runtime, about: ConnectionInfo) -> SpiffeId:
    """Returns the identity of the peer. Raises NotAuthorised if it is unknown or not on the
    allow-list."""
    if about.identity is None:
        raise NotAuthorised(NO_IDENTITY)
    who = SpiffeId.parse(about.identity)
    if not rt.config.gateway.admits(who):
        raise NotAuthorised(f"{who} is not on the allow-list of this gateway")
    return who


async def answer_probe(rt: Runtime, exchange: Exchange) -> None:
    """Answer the liveness probe of a proxy of another cluster: 200, or 503 while this proxy
    drains."""
    going = rt.drain.draining
    head = ResponseHead(
        503 if going else 200,
        Headers([(b"Content-Type", b"text/plain")]),
        b"Service Unavailable" if going else b"OK",
    )
    await exchange.respond(head, Whole(b"shutting down\n" if going else b"live\n"))
