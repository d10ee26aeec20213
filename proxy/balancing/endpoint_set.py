"""The endpoints of one service as this proxy has come to know them: how busy they are, which of them are broken, which are new.

balancer.py has the theory. All decisions are synchronous: `pick` says which endpoint, and changes nothing; `begin` takes it; what came of
it is told to the `Work`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from proxy.balancing.circuit_breaker import Breaker, Failure, State
from proxy.balancing.ewma import PeakEwma
from proxy.balancing.retry_budget import RetryBudget
from proxy.balancing.wait_queue import WaitQueue
from proxy.balancing.weighted import View, WeightedEndpoints
from proxy.directory import Endpoint, Target
from proxy.directory.policy import Policy
from proxy.net.address import Address

# What differs by less is equal (docs/decisions/25-peak-ewma.md has what that costs and brings).
_NEARLY_EQUAL = 1.25
# The share with which a new endpoint begins: enough to warm it up.
_FIRST_SHARE = 0.1
# Draws before all endpoints are looked at, when some of them are broken.
_DRAWS = 8
# Endpoints with a memory. A service with more is served, some of it by chance instead of by what is known.
_MOST = 65536
# After its last failure (seconds) a breaker is forgotten, be it closed or of an endpoint that nobody asks for any more.
_FORGET = 600.0
_LONGEST_START = 3600.0


class Change(NamedTuple):
    """A breaker has changed its state."""

    service: str
    address: Address
    state: State
    penalty: float  # seconds, if it has opened
    why: str  # the last failure


@dataclass(slots=True)
class Surroundings:
    """What all endpoint sets of a proxy share."""

    clock: Callable[[], float]
    chance: random.Random
    zone: str
    on_change: Callable[[Change], None]


class EndpointSet:
    """Of one service. It is told what came of each request by the `Work` that it gave out for it."""

    def __init__(self, around: Surroundings, service: str) -> None:
        self.service = service
        self.budget = RetryBudget(around.clock())
        self.queue = WaitQueue()
        self.broken: dict[Address, Breaker] = {}  # the breakers that are not closed
        self._around = around
        self._changes = 0  # of breakers
        self._dark = False  # all of a target's endpoints were broken, so one was tried early
        self._failed: dict[Address, Breaker] = {}  # all breakers
        self._loads: dict[Address, PeakEwma] = {}
        self._joined: dict[Address, float] = {}  # new endpoints, and since when
        self._views: dict[int, View] = {}
        self._older: dict[int, View] = {}  # of the time before the last sweep
        self._known: dict[tuple[int, bool], frozenset[Address]] = {}
        self._swept = 0  # requests at the last sweep

    # Which one...

    def pick(self, target: Target, exclude: Collection[Endpoint] = ()) -> Endpoint | None:
        """An endpoint of `target` that is ready, not in `exclude`, and not broken, or to be tried, or the best that is left; None: there is
        none now."""
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
        return self._careful(view.all, target.policy, exclude) or self._last(view.all, target.policy, exclude)

    def _better(self, weighted: WeightedEndpoints, policy: Policy) -> Endpoint:
        """The less busy one of two."""
        one, two = weighted.draw(self._around.chance)
        if one is two:
            return one
        now, rules, mean = self._around.clock(), policy.balancing, weighted.mean
        first, second = self._loads.get(one.address), self._loads.get(two.address)
        cost_one = rules.default_rtt if first is None else first.cost(now, rules.decay, mean / one.weight)
        cost_two = rules.default_rtt if second is None else second.cost(now, rules.decay, mean / two.weight)
        chosen, other = (two, one) if cost_two * _NEARLY_EQUAL < cost_one else (one, two)
        if self._joined and self._passed_over(chosen, now, rules.slow_start):
            return other
        return chosen

    def _passed_over(self, endpoint: Endpoint, now: float, slow_start: float) -> bool:
        """A new endpoint's share grows with its age."""
        joined = self._joined.get(endpoint.address)
        if joined is None:
            return False
        if now - joined >= slow_start:
            del self._joined[endpoint.address]
            return False
        return self._around.chance.random() > max(_FIRST_SHARE, (now - joined) / slow_start)

    def _careful(self, weighted: WeightedEndpoints, policy: Policy, exclude: Collection[Endpoint]) -> Endpoint | None:
        """The same where some are broken or excluded: one that may be tried again is, at once."""
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
        return self._one_of([endpoint for endpoint in weighted.endpoints if self._will_do(endpoint, exclude)], policy)

    def _one_of(self, left: list[Endpoint], policy: Policy) -> Endpoint | None:
        if len(left) > 1:
            return self._better(WeightedEndpoints(left), policy)
        return left[0] if left else None

    def _last(self, weighted: WeightedEndpoints, policy: Policy, exclude: Collection[Endpoint]) -> Endpoint | None:
        """Of endpoints that are all broken, one that responds; if none does, the one that has not been tried for longest, if it is time
        to."""
        if last := weighted.last(self.broken, self._changes):
            return self._one_of([endpoint for endpoint in last if endpoint not in exclude], policy)
        if self._around.clock() < weighted.early_probe(self.broken, self._changes):
            return None
        left = [endpoint for endpoint in weighted.endpoints if endpoint not in exclude]
        return min(left, key=lambda endpoint: self.broken[endpoint.address].early, default=None)

    def _will_do(self, endpoint: Endpoint, exclude: Collection[Endpoint]) -> bool:
        return endpoint.address not in self.broken and endpoint not in exclude

    def sound(self, endpoint: Endpoint, target: Target) -> bool:
        """Whether `endpoint` is `target`'s, and can be used."""
        return endpoint in target.endpoints and endpoint.ready and endpoint.address not in self.broken

    def usable(self, target: Target) -> int:
        """How many endpoints of `target` are ready and not broken."""
        return self._usable(self._laid_out(target).all)

    def _usable(self, weighted: WeightedEndpoints) -> int:
        return len(weighted.addresses) - len(weighted.broken(self.broken, self._changes)) if self.broken else len(weighted.addresses)

    def trial(self, target: Target, *, alone: bool) -> bool:
        """Whether `pick` would have a broken endpoint of `target` used now. `alone`: nobody else could take the request, so it may be
        early, or one that is the best that is left."""
        if not self.broken:
            return False
        due = self.next_probe(target) if alone else self._laid_out(target).all.next_probe(self.broken, self._changes)
        return self._around.clock() >= due

    def opens(self, target: Target) -> float:
        """When the penalty of the next one of `target`'s broken endpoints is, or was, over: how long it is thought to be away."""
        weighted = self._laid_out(target).all
        if weighted.last(self.broken, self._changes):
            return -inf
        return min((breaker.until for breaker in weighted.broken(self.broken, self._changes)), default=inf)

    def next_probe(self, target: Target) -> float:
        """When the next one of `target`'s broken endpoints may be used."""
        weighted = self._laid_out(target).all
        if weighted.last(self.broken, self._changes):
            return -inf
        return min(weighted.next_probe(self.broken, self._changes), weighted.early_probe(self.broken, self._changes))

    def trying(self, target: Target) -> bool:
        """Whether a request on probation is under way to one of `target`'s endpoints."""
        return any(breaker.state is State.PROBATION for breaker in self._laid_out(target).all.broken(self.broken, self._changes))

    def may_return(self, target: Target) -> bool:
        """Whether one of `target`'s broken endpoints does not respond, for a reason that time may change: it restarts, for example. False:
        they all respond, or mutual TLS with them fails."""
        broken = self._laid_out(target).all.broken(self.broken, self._changes)
        return any(not breaker.responds and not breaker.rejected for breaker in broken)

    def in_vain(self, target: Target) -> float:
        """When the last request on probation at one of `target`'s broken endpoints has failed; 0: there was none."""
        return max((breaker.in_vain for breaker in self._laid_out(target).all.broken(self.broken, self._changes)), default=0.0)

    def _laid_out(self, target: Target) -> View:
        return self._views.get(id(target)) or self._view(target)

    def _view(self, target: Target) -> View:
        view = self._older.pop(id(target), None)
        if view is None:
            view = View(target, self._around.zone)
            self._notice_new(view.all)
        self._views[id(target)] = view
        return view

    def _notice_new(self, weighted: WeightedEndpoints) -> None:
        if not weighted.endpoints:
            return
        first = weighted.endpoints[0].address
        key = first.port, first.is_ipv6  # a service may have a target for each of its ports, and for each address family
        known = self._known.get(key, frozenset())
        new = weighted.addresses - known
        if len(new) < len(weighted.addresses):
            now = self._around.clock()
            self._joined.update((address, now) for address in new)
        self._known[key] = weighted.addresses

    # What came of it...

    def begin(self, policy: Policy, endpoint: Endpoint, *, alone: bool) -> Work:
        """Something is sent to `endpoint`; the work has to be finished, whatever happens. `alone`: nobody compares it with others."""
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
        return Work(self, policy, endpoint, load, breaker is not None)

    def _probe(self, policy: Policy, endpoint: Endpoint, breaker: Breaker) -> None:
        now = self._around.clock()
        self._dark = self._dark or now < breaker.until
        if breaker.responds and not breaker.due(now):
            return  # it is used because all are broken, not to be tried
        if breaker.probe(now, policy.breaker, self._around.chance.random()):
            self._changed(endpoint.address, breaker)
        else:
            self._changes += 1

    def note(self, work: Work, seconds: float | None, *, bad: bool) -> None:
        """Called by the work: how long the response took (None: there was none), and whether it was bad, whatever that means."""
        if work.load is None or seconds is None:
            return
        now, decay = self._around.clock(), work.policy.balancing.decay
        if bad:  # a quick error must not make an endpoint attractive, nor what is known of it fade
            seconds = max(seconds, work.load.rtt)
        work.load.observe(seconds, now, decay)

    @property
    def failing(self) -> bool:
        """Something has failed not long ago."""
        return bool(self._failed)

    def succeeded(self, work: Work, *, begun: bool) -> None:
        if self._failed:
            breaker = self._failed.get(work.endpoint.address)
            if breaker is not None and breaker.succeeded(probe=work.probe, begun=begun):
                if self._dark:
                    self._dawn(work.policy)
                self._changed(work.endpoint.address, breaker)

    def _dawn(self, policy: Policy) -> None:
        """One of those that were all broken is back. The others may well be too, and it should not have to do their work for a minute."""
        self._dark = False
        now, chance = self._around.clock(), self._around.chance
        for breaker in self.broken.values():
            breaker.hasten(now, policy.breaker, chance.random())

    def failed(self, work: Work, why: str, how: Failure) -> None:
        address = work.endpoint.address
        breaker = self._failed.get(address)
        if breaker is None:
            breaker = Breaker()
            if len(self._failed) >= _MOST:
                return
            self._failed[address] = breaker
        breaker.why = why
        chance, now = self._around.chance.random(), self._around.clock()
        if breaker.failed(now, work.policy.breaker, chance, how, probe=work.probe):
            self._changed(address, breaker)

    def abandoned(self, work: Work) -> None:
        """A probe has ended without an answer."""
        breaker = self.broken.get(work.endpoint.address)
        if breaker is not None and breaker.abandoned(self._around.clock()):
            self._changed(work.endpoint.address, breaker)

    def _changed(self, address: Address, breaker: Breaker) -> None:
        self._changes += 1
        penalty = 0.0
        if breaker.state is State.CLOSED:
            del self.broken[address]
            self._joined[address] = self._around.clock()  # back, and to be burdened gently
        else:
            self.broken[address] = breaker
            penalty = max(0.0, breaker.until - self._around.clock())
        if breaker.state is not State.PROBATION:
            self.queue.wake()
        self._around.on_change(Change(self.service, address, breaker.state, penalty, breaker.why))

    def why(self, target: Target) -> str:
        """What the last failure of `target`'s broken endpoints was; "" if none is broken."""
        broken = self._laid_out(target).all.broken(self.broken, self._changes)
        return max(broken, key=lambda breaker: breaker.seen).why if broken else ""

    def outstanding(self, address: Address) -> int:
        """What has been begun at `address` and not finished; 0 for an endpoint that is alone."""
        load = self._loads.get(address)
        return 0 if load is None else load.pending

    def sweep(self, now: float) -> bool:
        """Forget what says nothing any more. Returns whether anything is left."""
        self._older, self._views = self._views, {}
        for address in [address for address, load in self._loads.items() if load.idle(now)]:
            del self._loads[address]
        for address in [address for address, breaker in self._failed.items() if now - max(breaker.seen, breaker.until) > _FORGET]:
            del self._failed[address]
            if self.broken.pop(address, None) is not None:
                self._changes += 1
        for address in [address for address, joined in self._joined.items() if now - joined > _LONGEST_START]:
            del self._joined[address]
        used, self._swept = self.budget.requests != self._swept, self.budget.requests
        return bool(used or self._loads or self._failed or self.queue)


class Work:
    """One request or connection at an endpoint. Told what came of it (once, or when it has begun to be answered and again at its end), and
    then finished; or finished without."""

    __slots__ = ("_endpoint_set", "_told", "endpoint", "load", "policy", "probe")

    def __init__(self, endpoint_set: EndpointSet, policy: Policy, endpoint: Endpoint, load: PeakEwma | None, probe: bool) -> None:
        self._endpoint_set = endpoint_set
        self._told = False
        self.policy = policy
        self.endpoint = endpoint
        self.load = load
        self.probe = probe  # it began while the endpoint was broken, so it decides whether that is used again

    @property
    def told(self) -> bool:
        return self._told

    def answered(self, seconds: float | None, *, bad: bool = False, begun: bool = False) -> None:
        """The endpoint has answered after `seconds` (None: not measured). `bad`: with an error, which says nothing against the endpoint.
        `begun`: it has begun to, and at the end may turn out to have failed."""
        self._told = True
        if self.load is not None:
            self._endpoint_set.note(self, seconds, bad=bad)
        self._endpoint_set.succeeded(self, begun=begun)

    def failed(self, why: str, seconds: float | None = None, how: Failure = Failure.RESPONSE) -> None:
        """The endpoint has failed, or answered with what counts as that: `why`, in a word or two."""
        self._told = True
        self._endpoint_set.note(self, seconds, bad=True)
        self._endpoint_set.failed(self, why, how)

    def silent(self, seconds: float | None) -> None:
        """There was no answer in `seconds`, and then it was given up: that is how busy the endpoint is at least, though it may be well."""
        self._endpoint_set.note(self, seconds, bad=True)

    def finished(self) -> None:
        """It is over, however it ended."""
        if self.load is not None:
            self.load.pending -= 1
            self.load = None
        if self.probe and not self._told:
            self._endpoint_set.abandoned(self)
