"""The endpoints of one service, as this proxy sees them: their load, their circuit breakers, their
age.

balancer.py explains the method. All decisions are synchronous. `pick` selects an endpoint and
changes nothing. `begin` starts a request at it, and returns a `ActiveRequest` that takes the
outcome."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from proxy.balancing.circuit_breaker import BreakerState, CircuitBreaker, Failure
from proxy.balancing.ewma import PeakEwma
from proxy.balancing.retry_budget import RetryBudget
from proxy.balancing.wait_queue import WaitQueue
from proxy.balancing.weighted import TargetView, WeightedEndpoints
from proxy.directory import Endpoint, Target
from proxy.directory.policy import Policy
from proxy.net.address import Address

# Loads that differ by less count as equal (docs/decisions/25-peak-ewma.md has the effects).
_NEARLY_EQUAL = 1.25
# The initial share of a new endpoint: enough to warm it up.
_FIRST_SHARE = 0.1
# Number of draws before all endpoints are checked, if some circuit breakers are open.
_DRAWS = 8
# Maximum number of endpoints with state. A larger service works, but the load of further endpoints
# is unknown.
_MOST = 65536
# Seconds after its last failure when a circuit breaker is dropped, closed or not.
_FORGET = 600.0
_LONGEST_START = 3600.0


class BreakerChange(NamedTuple):
    """A circuit breaker has changed its state."""

    service: str
    address: Address
    state: BreakerState
    penalty: float  # seconds, if it opened
    why: str  # reason of the last failure


@dataclass(slots=True)
class Surroundings:
    """What all endpoint sets of a proxy share."""

    clock: Callable[[], float]
    chance: random.Random
    zone: str
    on_change: Callable[[BreakerChange], None]


class EndpointSet:
    """The endpoints of one service. The `ActiveRequest` of each request reports the outcome."""

    def __init__(self, around: Surroundings, service: str) -> None:
        self.service = service
        self.budget = RetryBudget(around.clock())
        self.queue = WaitQueue()
        self.broken: dict[Address, CircuitBreaker] = {}  # the breakers that are not closed
        self._around = around
        self._changes = 0  # count of breaker changes
        self._all_open = (
            False  # all breakers of a target were open, so one endpoint got an early trial
        )
        self._failed: dict[Address, CircuitBreaker] = {}  # all breakers
        self._loads: dict[Address, PeakEwma] = {}
        self._joined: dict[Address, float] = {}  # new endpoints, and the time when they joined
        self._views: dict[int, TargetView] = {}
        self._older: dict[int, TargetView] = {}  # views from before the last sweep
        self._known: dict[tuple[int, bool], frozenset[Address]] = {}
        self._swept = 0  # requests at the last sweep

    # The selection.

    def pick(self, target: Target, exclude: Collection[Endpoint] = ()) -> Endpoint | None:
        """An endpoint of `target` that is ready and not in `exclude`. Its circuit breaker is
        closed, or it is due for a trial, or it is the best that is left. None: no endpoint can be
        used now."""
        careful = bool(self.broken or exclude)
        if len(target.endpoints) == 1 and not careful:
            endpoint = target.endpoints[0]
            return endpoint if endpoint.ready else None
        view = self._views.get(id(target)) or self._view(target)
        if not careful:
            weighted = view.near or view.all
            if len(weighted.endpoints) > 1:
                return self._better(weighted, target.policy)
            return weighted.endpoints[0] if weighted.endpoints else None
        if view.near is not None and self._usable(view.near) >= view.enough:
            found = self._careful(view.near, target.policy, exclude)
            if found is not None:
                return found
        return self._careful(view.all, target.policy, exclude) or self._last(
            view.all, target.policy, exclude
        )

    def _better(self, weighted: WeightedEndpoints, policy: Policy) -> Endpoint:
        """Draw two, and return the less busy one."""
        one, two = weighted.draw(self._around.chance)
        if one is two:
            return one
        now, rules, mean = self._around.clock(), policy.balancing, weighted.mean
        first, second = self._loads.get(one.address), self._loads.get(two.address)
        cost_one = (
            rules.default_rtt if first is None else first.cost(now, rules.decay, mean / one.weight)
        )
        cost_two = (
            rules.default_rtt
            if second is None
            else second.cost(now, rules.decay, mean / two.weight)
        )
        chosen, other = (two, one) if cost_two * _NEARLY_EQUAL < cost_one else (one, two)
        if self._joined and self._passed_over(chosen, now, rules.slow_start):
            return other
        return chosen

    def _passed_over(self, endpoint: Endpoint, now: float, slow_start: float) -> bool:
        """Whether the draw skips a new endpoint. The probability decreases with its age."""
        joined = self._joined.get(endpoint.address)
        if joined is None:
            return False
        if now - joined >= slow_start:
            del self._joined[endpoint.address]
            return False
        return self._around.chance.random() > max(_FIRST_SHARE, (now - joined) / slow_start)

    def _careful(
        self, weighted: WeightedEndpoints, policy: Policy, exclude: Collection[Endpoint]
    ) -> Endpoint | None:
        """Select an endpoint if some breakers are open or some endpoints are excluded. An endpoint
        that is due for a trial comes first."""
        now = self._around.clock()
        if now >= weighted.next_probe(self.broken, self._changes):
            for endpoint in weighted.endpoints:
                breaker = self.broken.get(endpoint.address)
                if breaker is not None and breaker.due(now) and endpoint not in exclude:
                    return endpoint
        if len(weighted.endpoints) > _DRAWS:
            for _ in range(_DRAWS):
                endpoint = self._better(weighted, policy)
                if self._will_do(endpoint, exclude):
                    return endpoint
        return self._one_of(
            [endpoint for endpoint in weighted.endpoints if self._will_do(endpoint, exclude)],
            policy,
        )

    def _one_of(self, left: list[Endpoint], policy: Policy) -> Endpoint | None:
        if len(left) > 1:
            return self._better(WeightedEndpoints(left), policy)
        return left[0] if left else None

    def _last(
        self, weighted: WeightedEndpoints, policy: Policy, exclude: Collection[Endpoint]
    ) -> Endpoint | None:
        """Select an endpoint if all breakers are open: one that responds. If none responds, the one
        whose last trial is the longest ago, if an early trial is due."""
        if last := weighted.last(self.broken, self._changes):
            return self._one_of([endpoint for endpoint in last if endpoint not in exclude], policy)
        if self._around.clock() < weighted.early_probe(self.broken, self._changes):
            return None
        left = [endpoint for endpoint in weighted.endpoints if endpoint not in exclude]
        return min(left, key=lambda endpoint: self.broken[endpoint.address].early, default=None)

    def _will_do(self, endpoint: Endpoint, exclude: Collection[Endpoint]) -> bool:
        return endpoint.address not in self.broken and endpoint not in exclude

    def is_usable(self, endpoint: Endpoint, target: Target) -> bool:
        """Whether `endpoint` belongs to `target` and is usable."""
        return (
            endpoint in target.endpoints and endpoint.ready and endpoint.address not in self.broken
        )

    def usable(self, target: Target) -> int:
        """The number of endpoints of `target` that are ready and whose breaker is closed."""
        return self._usable(self._view_of(target).all)

    def _usable(self, weighted: WeightedEndpoints) -> int:
        return (
            len(weighted.addresses) - len(weighted.broken(self.broken, self._changes))
            if self.broken
            else len(weighted.addresses)
        )

    def trial(self, target: Target, *, alone: bool) -> bool:
        """Whether `pick` would select an endpoint whose breaker is open. `alone`: no other target
        can take the request, so the trial may be early, or the endpoint may be the best that is
        left."""
        if not self.broken:
            return False
        due = (
            self.next_probe(target)
            if alone
            else self._view_of(target).all.next_probe(self.broken, self._changes)
        )
        return self._around.clock() >= due

    def penalty_ends(self, target: Target) -> float:
        """The earliest end of a penalty of `target`'s endpoints, or -inf if endpoints respond
        although all breakers are open. The expected end of the outage."""
        weighted = self._view_of(target).all
        if weighted.last(self.broken, self._changes):
            return -inf
        return min(
            (breaker.until for breaker in weighted.broken(self.broken, self._changes)), default=inf
        )

    def next_probe(self, target: Target) -> float:
        """The earliest time when one of `target`'s endpoints with an open breaker may get a
        request."""
        weighted = self._view_of(target).all
        if weighted.last(self.broken, self._changes):
            return -inf
        return min(
            weighted.next_probe(self.broken, self._changes),
            weighted.early_probe(self.broken, self._changes),
        )

    def trial_in_progress(self, target: Target) -> bool:
        """Whether a trial request is in progress at one of `target`'s endpoints."""
        return any(
            breaker.state is BreakerState.HALF_OPEN
            for breaker in self._view_of(target).all.broken(self.broken, self._changes)
        )

    def may_return(self, target: Target) -> bool:
        """Whether one of `target`'s endpoints does not respond for a reason that may end with time,
        for example a restart. False: all of them respond, or mutual TLS with them fails."""
        broken = self._view_of(target).all.broken(self.broken, self._changes)
        return any(not breaker.responds and not breaker.rejected for breaker in broken)

    def last_failed_trial(self, target: Target) -> float:
        """The time of the last failed trial at one of `target`'s endpoints. 0: there was none."""
        return max(
            (
                breaker.last_failed_trial
                for breaker in self._view_of(target).all.broken(self.broken, self._changes)
            ),
            default=0.0,
        )

    def _view_of(self, target: Target) -> TargetView:
        return self._views.get(id(target)) or self._view(target)

    def _view(self, target: Target) -> TargetView:
        view = self._older.pop(id(target), None)
        if view is None:
            view = TargetView(target, self._around.zone)
            self._notice_new(view.all)
        self._views[id(target)] = view
        return view

    def _notice_new(self, weighted: WeightedEndpoints) -> None:
        if not weighted.endpoints:
            return
        first = weighted.endpoints[0].address
        key = first.port, first.is_ipv6  # a service may have one target per port and address family
        known = self._known.get(key, frozenset())
        new = weighted.addresses - known
        if len(new) < len(weighted.addresses):
            now = self._around.clock()
            self._joined.update((address, now) for address in new)
        self._known[key] = weighted.addresses

    # Outcomes.

    def begin(self, policy: Policy, endpoint: Endpoint, *, alone: bool) -> ActiveRequest:
        """Record that a request or connection goes to `endpoint`. The caller must call `end`
        on the result in any case. `alone`: the service has no other endpoint to compare with."""
        load = None
        if not alone:
            load = self._loads.get(endpoint.address)
            if load is None:
                load = PeakEwma(policy.balancing.default_rtt, self._around.clock())
                if len(self._loads) < _MOST:
                    self._loads[endpoint.address] = load
            load.pending += 1
        breaker = self.broken.get(endpoint.address) if self.broken else None
        if breaker is not None:
            self._probe(policy, endpoint, breaker)
        return ActiveRequest(self, policy, endpoint, load, breaker is not None)

    def _probe(self, policy: Policy, endpoint: Endpoint, breaker: CircuitBreaker) -> None:
        now = self._around.clock()
        self._all_open = self._all_open or now < breaker.until
        if breaker.responds and not breaker.due(now):
            return  # used because all breakers are open, not as a trial
        if breaker.begin_trial(now, policy.breaker, self._around.chance.random()):
            self._on_breaker_change(endpoint.address, breaker)
        else:
            self._changes += 1

    def record_latency(self, active: ActiveRequest, seconds: float | None, *, bad: bool) -> None:
        """Called by `ActiveRequest`: record the response time in seconds (None: no response), and
        whether the response was bad."""
        if active.load is None or seconds is None:
            return
        now, decay = self._around.clock(), active.policy.balancing.decay
        if bad:  # a quick error must not make an endpoint attractive, nor let its known load decay
            seconds = max(seconds, active.load.rtt)
        active.load.observe(seconds, now, decay)

    @property
    def failing(self) -> bool:
        """Whether an endpoint failed recently."""
        return bool(self._failed)

    def record_success(self, active: ActiveRequest, *, response_started: bool) -> None:
        if self._failed:
            breaker = self._failed.get(active.endpoint.address)
            if breaker is not None and breaker.record_success(
                probe=active.probe, response_started=response_started
            ):
                if self._all_open:
                    self._shorten_penalties(active.policy)
                self._on_breaker_change(active.endpoint.address, breaker)

    def _shorten_penalties(self, policy: Policy) -> None:
        """All breakers were open, and one endpoint has recovered. The others may have recovered
        too. Shorten their penalties, so that the first one does not take all the load for long."""
        self._all_open = False
        now, chance = self._around.clock(), self._around.chance
        for breaker in self.broken.values():
            breaker.shorten_penalty(now, policy.breaker, chance.random())

    def record_failure(self, active: ActiveRequest, why: str, how: Failure) -> None:
        address = active.endpoint.address
        breaker = self._failed.get(address)
        if breaker is None:
            breaker = CircuitBreaker()
            if len(self._failed) >= _MOST:
                return
            self._failed[address] = breaker
        breaker.why = why
        chance, now = self._around.chance.random(), self._around.clock()
        if breaker.record_failure(now, active.policy.breaker, chance, how, probe=active.probe):
            self._on_breaker_change(address, breaker)

    def record_no_outcome(self, active: ActiveRequest) -> None:
        """A trial ended without an outcome."""
        breaker = self.broken.get(active.endpoint.address)
        if breaker is not None and breaker.record_no_outcome(self._around.clock()):
            self._on_breaker_change(active.endpoint.address, breaker)

    def _on_breaker_change(self, address: Address, breaker: CircuitBreaker) -> None:
        self._changes += 1
        penalty = 0.0
        if breaker.state is BreakerState.CLOSED:
            del self.broken[address]
            self._joined[address] = self._around.clock()  # recovered, so apply slow start
        else:
            self.broken[address] = breaker
            penalty = max(0.0, breaker.until - self._around.clock())
        if breaker.state is not BreakerState.HALF_OPEN:
            self.queue.wake()
        self._around.on_change(
            BreakerChange(self.service, address, breaker.state, penalty, breaker.why)
        )

    def why(self, target: Target) -> str:
        """The reason of the last failure of `target`'s endpoints with open breakers. "": none is
        open."""
        broken = self._view_of(target).all.broken(self.broken, self._changes)
        return max(broken, key=lambda breaker: breaker.last_failure).why if broken else ""

    def outstanding(self, address: Address) -> int:
        """The number of requests and connections in progress at `address`. 0 if the endpoint is
        alone."""
        load = self._loads.get(address)
        return 0 if load is None else load.pending

    def sweep(self, now: float) -> bool:
        """Drop state that is no longer meaningful. Returns whether any state is left."""
        self._older, self._views = self._views, {}
        for address in [address for address, load in self._loads.items() if load.idle(now)]:
            del self._loads[address]
        for address in [
            address
            for address, breaker in self._failed.items()
            if now - max(breaker.last_failure, breaker.until) > _FORGET
        ]:
            del self._failed[address]
            if self.broken.pop(address, None) is not None:
                self._changes += 1
        for address in [
            address for address, joined in self._joined.items() if now - joined > _LONGEST_START
        ]:
            del self._joined[address]
        used, self._swept = self.budget.requests != self._swept, self.budget.requests
        return bool(used or self._loads or self._failed or self.queue)


class ActiveRequest:
    """One request or connection at an endpoint. The caller reports the outcome once, or when the
    response starts and again at its end, and then calls `end`. It may call `end` without
    an outcome."""

    __slots__ = ("_endpoint_set", "_has_outcome", "endpoint", "load", "policy", "probe")

    def __init__(
        self,
        endpoint_set: EndpointSet,
        policy: Policy,
        endpoint: Endpoint,
        load: PeakEwma | None,
        probe: bool,
    ) -> None:
        self._endpoint_set = endpoint_set
        self._has_outcome = False
        self.policy = policy
        self.endpoint = endpoint
        self.load = load
        self.probe = probe  # the breaker was not closed, so the outcome decides its state

    @property
    def has_outcome(self) -> bool:
        return self._has_outcome

    def record_response(
        self, seconds: float | None, *, bad: bool = False, response_started: bool = False
    ) -> None:
        """The endpoint answered after `seconds` (None: not measured). `bad`: with an error that
        does not count against the endpoint. `response_started`: the response has started, and may
        still fail."""
        self._has_outcome = True
        if self.load is not None:
            self._endpoint_set.record_latency(self, seconds, bad=bad)
        self._endpoint_set.record_success(self, response_started=response_started)

    def record_failure(
        self, why: str, seconds: float | None = None, how: Failure = Failure.RESPONSE
    ) -> None:
        """The endpoint failed, or answered with a failure. `why`: a short reason."""
        self._has_outcome = True
        self._endpoint_set.record_latency(self, seconds, bad=True)
        self._endpoint_set.record_failure(self, why, how)

    def record_no_response(self, seconds: float | None) -> None:
        """The request was given up after `seconds` without a response. The endpoint is at least
        that slow, but this does not count as a failure."""
        self._endpoint_set.record_latency(self, seconds, bad=True)

    def end(self) -> None:
        """The request or connection has ended, whatever the result."""
        if self.load is not None:
            self.load.pending -= 1
            self.load = None
        if self.probe and not self._has_outcome:
            self._endpoint_set.record_no_outcome(self)
