"""What is drawn from: the places of endpoints.

An endpoint of weight w holds w places. It is places that are drawn, each as likely as any other, so where all endpoints are equally good
shares are as the weights say; and with equal weights, which is nearly always, a place is an endpoint.

A target's endpoints are laid out once, and kept as long as the target is used.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import ceil, gcd, inf

from proxy.balancing.circuit_breaker import Breaker, State
from proxy.directory import Endpoint, Target
from proxy.net.address import Address


class WeightedEndpoints:
    """Endpoints that are ready: all of a target, or those in one zone."""

    __slots__ = ("_broken", "_due", "_early", "_last", "_places", "_seen", "addresses", "endpoints", "mean")

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self.endpoints = tuple(endpoints)
        self.addresses = frozenset(endpoint.address for endpoint in endpoints)
        weights = [endpoint.weight for endpoint in endpoints]
        unit = gcd(*weights) or 1
        # None: one place for each endpoint
        self._places = None if all(weight == unit for weight in weights) else list(accumulate(weight // unit for weight in weights))
        self.mean = sum(weights) / len(weights) if weights else 1.0
        self._seen = -1
        self._broken: list[Breaker] = []
        self._due = self._early = inf
        self._last: tuple[Endpoint, ...] = ()

    def draw(self, chance: random.Random) -> tuple[Endpoint, Endpoint]:
        """Two places, which are one endpoint's if chance has it so; of at least two endpoints."""
        endpoints, places = self.endpoints, self._places
        count = len(endpoints) if places is None else places[-1]
        first = int(chance.random() * count)
        second = int(chance.random() * (count - 1))
        second += second >= first
        if places is None:
            return endpoints[first], endpoints[second]
        return endpoints[bisect(places, first)], endpoints[bisect(places, second)]

    def broken(self, among: Mapping[Address, Breaker], change: int) -> list[Breaker]:
        """The breakers `among` these that are its endpoints'. They are looked for when `change` is another number than the last time."""
        if self._seen != change:
            self._seen = change
            if len(among) <= len(self.addresses):
                self._broken = [breaker for address, breaker in among.items() if address in self.addresses]
            else:
                self._broken = [among[address] for address in self.addresses if address in among]
            self._due = min((breaker.until for breaker in self._broken if breaker.state is State.OPEN), default=inf)
            alone = len(self._broken) == len(self.addresses)
            self._last = tuple(place for place in self.endpoints if among[place.address].responds) if alone else ()
            self._early = max((breaker.early for breaker in self._broken), default=inf) if alone and not self._last else inf
        return self._broken

    def next_probe(self, among: Mapping[Address, Breaker], change: int) -> float:
        """When the penalty of the next of its endpoints that are left alone is over."""
        self.broken(among, change)
        return self._due

    def early_probe(self, among: Mapping[Address, Breaker], change: int) -> float:
        """When one may be tried because all are broken: a step after the last one was. Never, as long as one is not, or responds."""
        self.broken(among, change)
        return self._early

    def last(self, among: Mapping[Address, Breaker], change: int) -> tuple[Endpoint, ...]:
        """If all are broken: those that respond, which are used for want of better ones."""
        self.broken(among, change)
        return self._last


class View:
    """A target as it is drawn from. It keeps the target alive, so that the target's id stays its own."""

    __slots__ = ("all", "enough", "near", "target")

    def __init__(self, target: Target, zone: str) -> None:
        """`zone`: the proxy's own; "" if it is not known."""
        self.target = target
        self.all = WeightedEndpoints([endpoint for endpoint in target.endpoints if endpoint.ready])
        self.near: WeightedEndpoints | None = None  # those in the own zone, if they come first
        self.enough = 0  # as long as so many of them can be used
        if zone and target.policy.balancing.zone == "prefer":
            near = [endpoint for endpoint in self.all.endpoints if endpoint.zone == zone]
            listed = sum(endpoint.zone == zone for endpoint in target.endpoints)
            self.enough = max(1, ceil(target.policy.balancing.zone_share * listed - 1e-9))
            if self.enough <= len(near) < len(self.all.endpoints):
                self.near = WeightedEndpoints(near)
