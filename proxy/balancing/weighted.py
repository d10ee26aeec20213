"""Weighted endpoints: the places that the balancer draws from.

An endpoint of weight w holds w places. The draw selects places with equal probability. So if all
endpoints are equally good, their shares follow the weights. If all weights are equal, which is the
usual case, there is one place per endpoint.

The places of a target are computed once, and kept as long as the target is used."""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import ceil, gcd, inf

from proxy.balancing.circuit_breaker import BreakerState, CircuitBreaker
from proxy.directory import Endpoint, Target
from proxy.net.address import Address


class WeightedEndpoints:
    """Ready endpoints: all of a target, or those in one zone."""

    __slots__ = (
        "_broken",
        "_due",
        "_early",
        "_last",
        "_places",
        "_seen",
        "addresses",
        "endpoints",
        "mean",
    )

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self.endpoints = tuple(endpoints)
        self.addresses = frozenset(endpoint.address for endpoint in endpoints)
        weights = [endpoint.weight for endpoint in endpoints]
        unit = gcd(*weights) or 1
        # None: one place per endpoint
        self._places = (
            None
            if all(weight == unit for weight in weights)
            else list(accumulate(weight // unit for weight in weights))
        )
        self.mean = sum(weights) / len(weights) if weights else 1.0
        self._seen = -1
        self._broken: list[CircuitBreaker] = []
        self._due = self._early = inf
        self._last: tuple[Endpoint, ...] = ()

    def draw(self, chance: random.Random) -> tuple[Endpoint, Endpoint]:
        """Draw two places. Both may belong to one endpoint. Requires at least two endpoints."""
        endpoints, places = self.endpoints, self._places
        count = len(endpoints) if places is None else places[-1]
        first = int(chance.random() * count)
        second = int(chance.random() * (count - 1))
        second += second >= first
        if places is None:
            return endpoints[first], endpoints[second]
        return endpoints[bisect(places, first)], endpoints[bisect(places, second)]

    def broken(self, among: Mapping[Address, CircuitBreaker], change: int) -> list[CircuitBreaker]:
        """The breakers in `among` that belong to these endpoints. The result is computed again when
        `change` differs from the last call."""
        if self._seen != change:
            self._seen = change
            if len(among) <= len(self.addresses):
                self._broken = [
                    breaker for address, breaker in among.items() if address in self.addresses
                ]
            else:
                self._broken = [among[address] for address in self.addresses if address in among]
            self._due = min(
                (breaker.until for breaker in self._broken if breaker.state is BreakerState.OPEN),
                default=inf,
            )
            alone = len(self._broken) == len(self.addresses)
            self._last = (
                tuple(place for place in self.endpoints if among[place.address].responds)
                if alone
                else ()
            )
            self._early = (
                max((breaker.early for breaker in self._broken), default=inf)
                if alone and not self._last
                else inf
            )
        return self._broken

    def next_probe(self, among: Mapping[Address, CircuitBreaker], change: int) -> float:
        """The earliest end of a penalty of these endpoints, as time of the balancer's clock."""
        self.broken(among, change)
        return self._due

    def early_probe(self, among: Mapping[Address, CircuitBreaker], change: int) -> float:
        """The time of the next early trial, if all breakers are open. Infinite if one is closed or
        an endpoint responds."""
        self.broken(among, change)
        return self._early

    def last(self, among: Mapping[Address, CircuitBreaker], change: int) -> tuple[Endpoint, ...]:
        """If all breakers are open: the endpoints that still respond."""
        self.broken(among, change)
        return self._last


class TargetView:
    """A target, prepared for the draw. It keeps the target alive, so that the target's id stays
    unique."""

    __slots__ = ("all", "enough", "near", "target")

    def __init__(self, target: Target, zone: str) -> None:
        """`zone`: the proxy's own. "": not known."""
        self.target = target
        self.all = WeightedEndpoints([endpoint for endpoint in target.endpoints if endpoint.ready])
        self.near: WeightedEndpoints | None = (
            None  # those in the own zone, if the policy prefers them
        )
        self.enough = 0  # minimum number of them that must be usable
        if zone and target.policy.balancing.zone == "prefer":
            near = [endpoint for endpoint in self.all.endpoints if endpoint.zone == zone]
            listed = sum(endpoint.zone == zone for endpoint in target.endpoints)
            self.enough = max(1, ceil(target.policy.balancing.zone_share * listed - 1e-9))
            if self.enough <= len(near) < len(self.all.endpoints):
                self.near = WeightedEndpoints(near)
