"""A balancer on simulated time, and endpoints for it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from proxy.balancing.balancer import Balancer
from proxy.balancing.circuit_breaker import Failure
from proxy.balancing.endpoint_set import BreakerChange, EndpointSet
from proxy.directory import Endpoint, Target
from proxy.directory.policy import DEFAULT_POLICY, Policy
from proxy.net.address import Address


def endpoints(count: int, **facts: Any) -> tuple[Endpoint, ...]:
    return tuple(Endpoint(Address(f"10.0.{n >> 8}.{n & 255}", 80), **facts) for n in range(count))


def target(*places: Endpoint, policy: Policy = DEFAULT_POLICY) -> Target:
    return Target("default/web", places, policy=policy)


class World:
    """A balancer, its clock, and the changes that it has reported."""

    def __init__(self, zone: str = "", seed: int = 7) -> None:
        self.now = 1000.0
        self.changes: list[BreakerChange] = []
        self.balancer = Balancer(lambda: self.now, random.Random(seed), zone)
        self.balancer.on_change(self.changes.append)

    @property
    def endpoint_set(self) -> EndpointSet:
        return self.balancer.endpoint_set("default/web")

    def picks(
        self, where: Target, times: int = 200, exclude: Sequence[Endpoint] = ()
    ) -> Counter[Endpoint | None]:
        return Counter(self.endpoint_set.pick(where, exclude) for _ in range(times))

    def fail(
        self,
        where: Target,
        endpoint: Endpoint,
        times: int = 1,
        *,
        how: Failure = Failure.UNREACHABLE,
    ) -> None:
        for _ in range(times):
            work = self.endpoint_set.begin(where.policy, endpoint, alone=False)
            work.record_failure("test", how=how)
            work.end()

    def succeed(self, where: Target, endpoint: Endpoint, seconds: float = 0.01) -> None:
        work = self.endpoint_set.begin(where.policy, endpoint, alone=False)
        work.record_response(seconds)
        work.end()
