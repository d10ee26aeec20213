"""Waiting for an endpoint of a service whose endpoints are all broken.

Requests and connections wait in the service's queue (balancing/wait_queue.py). The first in it is sent to an endpoint as soon as one may be
tried. What the others are told depends on two things: how long they have waited, and whether an endpoint has been tried in vain since.

    the service has no endpoint that is ready              NoEndpoint, at once
    none is tried within the timeout                       AllBroken, at once
    too many wait already                                  QueueFull, at once
    the outage is young                                    AllBroken, behind the first trial in vain after the timeout
    the outage is old: penalties are beyond the timeout    AllBroken, behind the first trial in vain
    mutual TLS with all endpoints fails                    AllBroken, behind the first trial in vain

So a request is never refused because of a trial from before the service came back. Without that rule, requests whose timeout ended
between the return and the next trial failed, and so did all that came in that time after a long outage.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf

import trio

from proxy.balancing.balancer import Balancer
from proxy.balancing.endpoint_set import EndpointSet
from proxy.directory import Endpoint, Target
from proxy.errors import AllBroken, NoEndpoint, QueueFull
from proxy.telemetry.endpoint_metrics import EndpointMetrics

# A queue looks again after this long (seconds) at the earliest: whatever the reason was that nothing could be picked.
_LOOK_AGAIN = 0.02
# How long a trial may take (seconds) until those who have waited long enough are told.
_TRIAL = 0.25

Found = tuple[Target, EndpointSet, Endpoint]


class Patience:
    """Of one request or connection, over all its attempts: how long it waits for an endpoint of what `choose` says."""

    __slots__ = ("_balancer", "_choose", "_metrics", "_patient_until", "_told_at")

    def __init__(self, balancer: Balancer, metrics: EndpointMetrics, choose: Callable[[], Target]) -> None:
        self._balancer = balancer
        self._metrics = metrics
        self._choose = choose
        self._patient_until: float | None = None  # trio's time; the first trial in vain after it decides. None: it has not waited yet
        self._told_at = inf  # in any case

    async def wait(self) -> Found:
        """Wait until an endpoint may be tried. Raises NoEndpoint, AllBroken, QueueFull, and what `choose` raises."""
        target = self._choose()
        endpoint_set, rules = self._endpoint_set(target), target.policy.queue
        self._check(endpoint_set, target)
        if len(endpoint_set.queue) >= rules.size:
            raise QueueFull(f"{len(endpoint_set.queue)} requests wait for an endpoint of {target.service} already")
        with endpoint_set.queue.place() as place, self._metrics.queued() as record:
            while True:
                soon = trio.current_time() + _LOOK_AGAIN
                await endpoint_set.queue.turn(place, max(soon, endpoint_set.next_probe(target)), max(soon, self._next_check))
                target = self._choose()
                chosen = self._endpoint_set(target)
                endpoint = chosen.pick(target) if endpoint_set.queue.first(place) else None
                if endpoint is not None:
                    record.served = True
                    return target, chosen, endpoint
                self._check(chosen, target)

    def _endpoint_set(self, target: Target) -> EndpointSet:
        # The directory may have forgotten the service meanwhile. What is chosen then is an address of no service, with no history.
        return self._balancer.endpoint_set(target.service or "")

    @property
    def _next_check(self) -> float:
        """When there is something to decide although there is no news."""
        until = self._patient_until
        return until if until is not None and until > trio.current_time() else self._told_at

    def _check(self, endpoint_set: EndpointSet, target: Target) -> None:
        """Raises if there is nothing to wait for any more."""
        if not any(endpoint.ready for endpoint in target.endpoints):
            raise NoEndpoint(f"none of the {len(target.endpoints)} endpoints of {target.service or 'the destination'} is ready")
        now, timeout = trio.current_time(), target.policy.queue.timeout
        until = self._patient_until
        if until is None:
            until = self._begin(endpoint_set, target, now)
        if now < until:
            return
        usable = endpoint_set.usable(target)
        if usable:  # it is a matter of moments until all who wait are served
            self._told_at = until + timeout + _TRIAL
        elif self._told_at == inf:
            trial = now if endpoint_set.trying(target) else max(now, endpoint_set.next_probe(target))
            self._told_at = trial + _TRIAL if trial <= now + timeout else now
        if now >= self._told_at or (not usable and endpoint_set.in_vain(target) > until):
            raise AllBroken(f"{self._broken(target)}, and none could be used within {timeout:g} s")

    def _begin(self, endpoint_set: EndpointSet, target: Target, now: float) -> float:
        """It begins to wait; returns until when it is patient."""
        latest = now + target.policy.queue.timeout
        if endpoint_set.usable(target):
            self._patient_until = latest
            return latest
        if endpoint_set.next_probe(target) > latest and not endpoint_set.trying(target):
            raise AllBroken(f"{self._broken(target)}; the next one is tried in {endpoint_set.next_probe(target) - now:.1f} s")
        self._patient_until = now if endpoint_set.opens(target) > latest or not endpoint_set.may_return(target) else latest
        return self._patient_until

    def _broken(self, target: Target) -> str:
        ready, why = sum(endpoint.ready for endpoint in target.endpoints), self._endpoint_set(target).why(target)
        who = f"all {ready} endpoints of {target.service} are" if ready > 1 else f"the one endpoint of {target.service} is"
        return f"{who} broken (last: {why})"
