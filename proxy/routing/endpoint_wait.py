"""The wait for an endpoint of a service while the circuit breakers of all its endpoints are open.

Requests and connections wait in the queue of the service (balancing/wait_queue.py). The first one
is sent to an endpoint as soon as a trial is allowed. The outcome of the others depends on how long
they have waited, and on whether a trial has failed since:

    the service has no ready endpoint              NoEndpoint, at once
    no trial is due within the timeout             AllCircuitsOpen, at once
    the queue is full                              QueueFull, at once
    the outage is short                            AllCircuitsOpen, after the first failed trial
                                                   that follows the timeout
    the outage is longer than the timeout          AllCircuitsOpen, after the first failed trial
    mutual TLS with all endpoints fails            AllCircuitsOpen, after the first failed trial

So a trial from before the service recovered never fails a request. Without this rule, requests
failed whose timeout ended between the recovery and the next trial, and so did all requests in that
time after a long outage."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

import trio

from proxy.balancing.balancer import Balancer
from proxy.balancing.endpoint_set import EndpointSet
from proxy.directory import Endpoint, Target
from proxy.errors import AllCircuitsOpen, NoEndpoint, QueueFull
from proxy.telemetry.endpoint_metrics import EndpointMetrics

# Minimum time (seconds) before a queue checks again, whatever the reason for the wait.
_LOOK_AGAIN = 0.02
# Maximum duration of a trial (seconds) before the requests that have waited long enough fail.
_TRIAL = 0.25

Found = tuple[Target, EndpointSet, Endpoint]


class EndpointWait:
    """The patience of one request or connection, over all its attempts: how long it waits for an
    endpoint of the target that `choose` returns."""

    __slots__ = ("_balancer", "_choose", "_fail_at", "_metrics", "_patient_until")

    def __init__(
        self, balancer: Balancer, metrics: EndpointMetrics, choose: Callable[[], Target]
    ) -> None:
        self._balancer = balancer
        self._metrics = metrics
        self._choose = choose
        self._patient_until: float | None = (
            None  # trio's time; the first failed trial after it decides. None: not waited yet
        )
        self._fail_at = inf  # fail at this time in any case

    async def wait(self) -> Found:
        """Wait until an endpoint may be tried. Raises NoEndpoint, AllCircuitsOpen, QueueFull, and
        what `choose` raises."""
        target = self._choose()
        endpoint_set, rules = self._endpoint_set(target), target.policy.queue
        self._check(endpoint_set, target)
        if len(endpoint_set.queue) >= rules.size:
            raise QueueFull(
                f"{len(endpoint_set.queue)} requests already wait for an endpoint of"
                f" {target.service}"
            )
        with endpoint_set.queue.place() as place, self._metrics.record_wait() as record:
            while True:
                soon = trio.current_time() + _LOOK_AGAIN
                await endpoint_set.queue.turn(
                    place, max(soon, endpoint_set.next_probe(target)), max(soon, self._next_check)
                )
                target = self._choose()
                chosen = self._endpoint_set(target)
                endpoint = chosen.pick(target) if endpoint_set.queue.first(place) else None
                if endpoint is not None:
                    record.served = True
                    return target, chosen, endpoint
                self._check(chosen, target)

    def _endpoint_set(self, target: Target) -> EndpointSet:
        # The new directory may not have the service. Then the target is an address without a
        # service, which has no history.
        return self._balancer.endpoint_set(target.service or "")

    @property
    def _next_check(self) -> float:
        """When to check although nothing has changed (trio's time)."""
        until = self._patient_until
        return until if until is not None and until > trio.current_time() else self._fail_at

    def _check(self, endpoint_set: EndpointSet, target: Target) -> None:
        """Raises NoEndpoint or AllCircuitsOpen if it makes no sense to wait any longer."""
        if not any(endpoint.ready for endpoint in target.endpoints):
            raise NoEndpoint(
                f"none of the {len(target.endpoints)} endpoints of"
                f" {target.service or 'the destination'} is ready"
            )
        now, timeout = trio.current_time(), target.policy.queue.timeout
        until = self._patient_until
        if until is None:
            until = self._begin(endpoint_set, target, now)
        if now < until:
            return
        usable = endpoint_set.usable(target)
        if usable:  # all waiting requests will be served in a moment
            self._fail_at = until + timeout + _TRIAL
        elif self._fail_at == inf:
            trial = (
                now
                if endpoint_set.trial_in_progress(target)
                else max(now, endpoint_set.next_probe(target))
            )
            self._fail_at = trial + _TRIAL if trial <= now + timeout else now
        if now >= self._fail_at or (not usable and endpoint_set.last_failed_trial(target) > until):
            raise AllCircuitsOpen(
                f"{self._broken(target)}, and none became usable within {timeout:g} s"
            )

    def _begin(self, endpoint_set: EndpointSet, target: Target, now: float) -> float:
        """Start the wait. Returns the time until which it is patient. Raises AllCircuitsOpen if no
        trial is due within the timeout."""
        latest = now + target.policy.queue.timeout
        if endpoint_set.usable(target):
            self._patient_until = latest
            return latest
        if endpoint_set.next_probe(target) > latest and not endpoint_set.trial_in_progress(target):
            raise AllCircuitsOpen(
                f"{self._broken(target)}; the next trial is in"
                f" {endpoint_set.next_probe(target) - now:.1f} s"
            )
        self._patient_until = (
            now
            if endpoint_set.penalty_ends(target) > latest or not endpoint_set.may_return(target)
            else latest
        )
        return self._patient_until

    def _broken(self, target: Target) -> str:
        ready, why = (
            sum(endpoint.ready for endpoint in target.endpoints),
            self._endpoint_set(target).why(target),
        )
        who = (
            f"breakers of all {ready} endpoints of {target.service} are"
            if ready > 1
            else f"breaker of the only endpoint of {target.service} is"
        )
        return f"the circuit {who} open (last failure: {why})"
