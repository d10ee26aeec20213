"""The plan of an inbound exchange: whether the peer may use the port, and what the application is
told about it. All exchanges of a connection go to one address, so one object plans them all."""

from __future__ import annotations

from proxy.errors import NotAuthorised
from proxy.exchange.client import Client
from proxy.exchange.exchange import ConnectionInfo, Exchange
from proxy.exchange.upgrade import carry
from proxy.fastpath.plan import ConnectionLease, StreamLease
from proxy.flows.runtime import Runtime
from proxy.flows.serving import HttpLayers, keep_draws
from proxy.flows.upstreams import Pools, protocol_of
from proxy.identity.spiffe import is_identity
from proxy.net.address import Address
from proxy.wire.messages import CALLER


class InboundPlanner:
    """Plans the exchanges of the inbound flow. Implements fastpath.plan.Planner. `handler`: the
    ordinary path, with its layers."""

    def __init__(self, rt: Runtime, pools: Pools[Address]) -> None:
        self._rt = rt
        self._pools = pools
        self._client: Client[Address] = Client(rt.settings.client, rt.recorder.bridge(rt.relay))
        self._layers = HttpLayers(rt, "inbound")
        self.account = self._layers.account
        self.handler = self._layers.stack(self._carry)

    def _direct(self, exchange: Exchange) -> None:
        """For both paths: direct the exchange to the application. Raises NotAuthorised."""
        authorise(self._rt, exchange.facts)
        exchange.caller = caller(self._rt, exchange)
        exchange.upstream = exchange.facts.destination

    async def _carry(self, exchange: Exchange) -> None:
        """The ordinary path. The application gets the protocol in which the request arrived: the
        outbound side has already translated it."""
        if not exchange.underway:
            self._direct(exchange)
        protocol, application = protocol_of(exchange.request.version), exchange.facts.destination
        await carry(self._client, exchange, application, self._pools, protocol)

    def take(self, exchange: Exchange, now: float) -> ConnectionLease[Address] | None:
        if self._start(exchange):
            lease = self._pools.take(exchange.facts.destination, now)
            if lease is not None:
                return lease
        keep_draws(exchange, None)
        return None

    def share(self, exchange: Exchange) -> StreamLease | None:
        if self._start(exchange):
            lease = self._pools.share(exchange.facts.destination)
            if lease is not None:
                return lease
        keep_draws(exchange, None)
        return None

    def _start(self, exchange: Exchange) -> bool:
        """The fast path. False: the ordinary path has to record spans, or to report an error."""
        if self._layers.begin_trace(exchange) or not self._layers.add_token(exchange):
            return False
        try:
            self._direct(exchange)
        except NotAuthorised:
            return False
        return True


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
