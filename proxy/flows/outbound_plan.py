"""The plan of an outbound exchange: which service and endpoint it goes to, and what it may carry.

Each decision is one function, and both paths call it. `OutboundPlan.carry` is the ordinary path. It
can wait, retry, and send anything. `take` and `share` are the fast path. They decline what it
cannot carry, and change nothing then but what the ordinary path would change too."""

from __future__ import annotations

from proxy.directory import UNANSWERED, UNIDENTIFIED, Endpoint, Target, itself
from proxy.directory.policy import DEFAULT_POLICY, Policy
from proxy.errors import LoopDetected, RequestError, UpstreamTLSError
from proxy.exchange.client import Client
from proxy.exchange.exchange import Exchange
from proxy.exchange.loop_layer import hide_names
from proxy.exchange.upgrade import carry
from proxy.fastpath.plan import LEAST_LIMIT, ConnectionLease, StreamLease
from proxy.flows.loop_guard import SelfCall
from proxy.flows.runtime import Runtime
from proxy.flows.serving import HttpLayers, keep_draws
from proxy.flows.upstreams import Pools, upstream_protocol
from proxy.routing.attempt import Attempt, keep_body, policy_deadline
from proxy.settings.units import within
from proxy.wire.messages import RequestHead, ResponseHead
from proxy.wire.sniff import Protocol


class OutboundPlanner:
    """Makes the plans of outbound exchanges. Implements fastpath.plan.Planner. `handler`: the
    ordinary path, with its layers."""

    def __init__(self, rt: Runtime, pools: Pools[Endpoint]) -> None:
        self.rt = rt
        self.loops = rt.loops
        self.router = rt.router
        self.dispatcher = rt.dispatcher
        self.pools = pools
        self.client: Client[Endpoint] = Client(rt.settings.client, rt.recorder.bridge(rt.relay))
        self.layers = HttpLayers(rt, "outbound")
        self.account = self.layers.account
        self.handler = self.layers.stack(self._carry)

    async def _carry(self, exchange: Exchange) -> None:
        plan = exchange.handoff.plan if exchange.handoff is not None else None
        if plan is None:
            plan = OutboundPlan(self)
        await plan.carry(exchange)

    def take(self, exchange: Exchange, now: float) -> ConnectionLease[Endpoint] | None:
        return OutboundPlan(self).take(exchange, now)

    def share(self, exchange: Exchange) -> StreamLease | None:
        return OutboundPlan(self).share(exchange)


class OutboundPlan:
    """One exchange. Implements exchange.exchange.ExchangePlan. It keeps no reference to the
    exchange, which may refer to it."""

    __slots__ = ("_attempt", "_call", "_endpoint", "_flow", "_policy")

    def __init__(self, flow: OutboundPlanner) -> None:
        self._flow = flow
        self._policy: Policy = DEFAULT_POLICY
        # drawn on the fast path, without a connection there: the ordinary path tries it first
        self._endpoint: Endpoint | None = None
        self._attempt: Attempt | None = None  # of the fast path
        self._call: SelfCall | None = None  # the exchange, if it is a call of the pod to itself

    # The decisions, for both paths.

    def _find_service(self, exchange: Exchange) -> Target:
        """The target that the request is for. UNANSWERED, UNIDENTIFIED: the directory does not know
        yet."""
        request = exchange.request
        target = self._flow.router.find_target(
            exchange.facts.destination, lambda: requested_authority(request)
        )
        exchange.service = target.service
        return target

    def _direct(self, exchange: Exchange, target: Target, endpoint: Endpoint) -> None:
        """Direct the exchange to `endpoint`. Raises RequestError, UpstreamTLSError."""
        exchange.upstream, exchange.chosen = endpoint.address, target.service
        exchange.authority = gateway_authority(exchange.request, target)
        if endpoint.identity is None:
            self._flow.rt.check_clear_text(endpoint.address)
            hide_names(exchange)

    def _begin_call(self, endpoint: Endpoint) -> None:
        """Count the exchange if it is a call of the pod to itself. Raises LoopDetected."""
        loops, address = self._flow.loops, endpoint.address
        self._call = loops.call_self(address.port) if loops.calls_itself(address.host) else None

    def _end_call(self) -> None:
        if self._call is not None:
            self._call.end()
            self._call = None

    # The ordinary path.

    async def carry(self, exchange: Exchange) -> None:
        """Carry the exchange to its end. Raises what Dispatcher.exchange raises."""
        flow = self._flow
        if flow.rt.directory.asks and not exchange.underway:
            await self._learn(exchange)
        attempt, self._attempt = self._attempt, None
        await flow.dispatcher.exchange(exchange, self._choose, self._send, attempt, self._endpoint)

    async def _learn(self, exchange: Exchange) -> None:
        """Wait until the directory can tell where the request goes, or the limit is reached. It is
        known for all but the first requests."""
        target = self._find_service(exchange)
        if target is not UNANSWERED and target is not UNIDENTIFIED:
            return
        rt, destination = self._flow.rt, exchange.facts.destination
        await rt.directory.learn(destination)
        name = requested_authority(exchange.request)
        if name and rt.router.find_address(destination) is None:
            await rt.directory.learn_name(name, rt.router.namespace)

    def _choose(self, exchange: Exchange) -> Target:
        target, destination = self._find_service(exchange), exchange.facts.destination
        if target is UNANSWERED and not self._flow.rt.directory.inside(destination.host):
            target = itself(destination)
        return self._flow.router.choose(target)

    async def _send(self, exchange: Exchange, target: Target, endpoint: Endpoint) -> None:
        flow = self._flow
        if not exchange.underway:  # otherwise the fast path has decided this
            self._direct(exchange, target, endpoint)
            self._begin_call(endpoint)
            self.begin(exchange)
        try:
            protocol = upstream_protocol(exchange, target)
            await carry(flow.client, exchange, endpoint, flow.pools, protocol)
        finally:
            self._end_call()

    # The fast path.

    def take(self, exchange: Exchange, now: float) -> ConnectionLease[Endpoint] | None:
        target = self._find_simple_target(exchange, Protocol.HTTP1)
        endpoint = self._draw(exchange, target) if target is not None else None
        lease = self._flow.pools.take(endpoint, now) if endpoint is not None else None
        if target is None or endpoint is None or lease is None:
            self._decline(exchange, endpoint)
            return None
        if not self._start(exchange, target, endpoint):
            lease.cancel()
            return None
        lease.plan, lease.limit = self, policy_deadline(exchange, self._policy)
        return lease

    def share(self, exchange: Exchange) -> StreamLease | None:
        target = self._find_simple_target(exchange, Protocol.HTTP2)
        endpoint = self._draw(exchange, target) if target is not None else None
        lease = self._flow.pools.share(endpoint) if endpoint is not None else None
        if target is None or endpoint is None or lease is None:
            self._decline(exchange, endpoint)
            return None
        if not self._start(exchange, target, endpoint):
            return None
        lease.plan, lease.limit = self, policy_deadline(exchange, self._policy)
        if target.service is not None and exchange.body.length != 0:
            keep_body(exchange, target.policy)
        return lease

    def _find_simple_target(self, exchange: Exchange, protocol: Protocol) -> Target | None:
        """The target, if the fast path can carry the exchange there: in `protocol`, in this
        cluster, without a split, and with a policy that it can apply."""
        if self._flow.layers.begin_trace(exchange):
            return None
        target = self._find_service(exchange)
        if (
            target.plan is not None
            or target.remote is not None
            or upstream_protocol(exchange, target) is not protocol
            or (target.policy is not DEFAULT_POLICY and not is_simple(target.policy, exchange))
        ):
            return None
        self._policy = target.policy
        return target

    def _draw(self, exchange: Exchange, target: Target) -> Endpoint | None:
        endpoint = self._flow.dispatcher.pick_healthy(target)
        return endpoint if endpoint is None or self._flow.layers.add_token(exchange) else None

    def _decline(self, exchange: Exchange, endpoint: Endpoint | None) -> None:
        """No connection to `endpoint` is ready, or it was not even drawn."""
        self._endpoint = endpoint
        keep_draws(exchange, self if endpoint is not None else None)

    def _start(self, exchange: Exchange, target: Target, endpoint: Endpoint) -> bool:
        """Direct the exchange to `endpoint` and begin the attempt. False: the ordinary path has to
        report an error."""
        try:
            self._begin_call(endpoint)
            self._direct(exchange, target, endpoint)
        except (LoopDetected, UpstreamTLSError):
            self._end_call()
            exchange.upstream = exchange.chosen = None
            keep_draws(exchange, None)
            return False
        self._attempt = self._flow.dispatcher.begin(target, endpoint)
        return True

    def begin(self, exchange: Exchange) -> None:
        """Also for the ordinary path: the account of the exchange is open."""
        if self._call is not None:
            self._call.end_at_response(exchange)

    def answered(self) -> None:
        if self._attempt is not None:
            self._attempt.answered()

    def declines(self, head: ResponseHead) -> bool:
        """Whether the policy may retry a response with this status."""
        return within(head.status, self._policy.retries.statuses)

    def end(self, exchange: Exchange) -> None:
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.end(exchange)
        self._end_call()


def is_simple(policy: Policy, exchange: Exchange) -> bool:
    """Whether the fast path can apply `policy`. It has the whole body of an HTTP/1.1 request, so it
    can always send it again."""
    times, length = policy.timeouts, exchange.body.length
    if not policy.plain or (times.request is not None and times.request < LEAST_LIMIT):
        return False
    return exchange.request.version == b"2" or (
        isinstance(length, int) and length <= policy.retries.max_body
    )


def requested_authority(request: RequestHead) -> bytes | None:
    """The authority in the request. None for a CONNECT for a tunnel, which is addressed to the
    proxy that receives it."""
    return None if request.method == b"CONNECT" and request.protocol is None else request.authority


def gateway_authority(request: RequestHead, target: Target) -> bytes | None:
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
