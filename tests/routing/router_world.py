"""A router with the real balancer, and a clock of the test's."""

from __future__ import annotations

import math
import random
from collections import Counter
from ipaddress import ip_network

from proxy.balancing.balancer import Balancer
from proxy.balancing.circuit_breaker import Failure
from proxy.directory import Directory, Service, Target, parse
from proxy.net.address import Address
from proxy.routing.router import Router

GATEWAY = "spiffe://cluster.local/ns/isthmus/sa/gateway"
SETTLE = 10.0


def text(split: str = "", failover: str = "", ready: str = "true") -> str:
    return f"""
services:
  - name: c
    addresses: [10.96.0.1]
    ports: [{{port: 80}}]
    endpoints: [{{address: 10.1.0.1, ready: {ready}}}, {{address: 10.1.0.2, ready: {ready}}}]
    split: [{split}]
    {failover and f"failover: {failover}"}
  - {{name: new, ports: [{{port: 80}}], endpoints: [{{address: 10.1.0.9}}]}}
  - {{name: empty, ports: [{{port: 80}}]}}
clusters:
  - name: east
    gateways: [{{address: 203.0.113.7, identity: {GATEWAY}}}]
    services: [{{name: c, ports: [{{port: 80}}]}}]
  - name: north
    gateways: [{{address: 203.0.113.8, identity: {GATEWAY}}}]
    services: [{{name: c, ports: [{{port: 80}}]}}]
"""


class Known:
    """A directory that a test replaces."""

    def __init__(self, document: str) -> None:
        self.current: Directory = parse(document, "test")


class Counted:
    def __init__(self) -> None:
        self.away: Counter[tuple[str, str]] = Counter()
        self.states: list[tuple[str, bool]] = []

    def count_remote_attempt(self, cluster: str, why: str) -> None:
        self.away[cluster, why] += 1

    def set_failover(self, service: str, away: bool) -> None:
        self.states.append((service, away))


class World:
    """A router, and its dependencies."""

    def __init__(self, document: str, seed: int = 1) -> None:
        self.now = 1000.0
        self.known = Known(document)
        self.metrics = Counted()
        self.balancer = Balancer(lambda: self.now)
        chance = random.Random(seed)
        self.router = Router(
            self.known,
            self.balancer,
            self.metrics,
            "default",
            SETTLE,
            lambda: self.now,
            chance,
            networks=[ip_network("192.0.2.0/24")],
        )

    def to(self, address: str = "10.96.0.1:80", authority: bytes | None = None) -> Target:
        return self.router.choose(
            self.router.find_target(Address.parse(address), lambda: authority)
        )

    def where(self) -> str | None:
        return self.to().service

    def many(self, count: int) -> Counter[str | None]:
        return Counter(self.where() for _ in range(count))

    def breaks(self, *hosts: str, how: Failure = Failure.UNREACHABLE) -> None:
        """These endpoints have failed so often that their circuits are open now."""
        for service in self.services():
            for target in service.targets.values():
                for endpoint in target.endpoints:
                    if endpoint.address.host in hosts:
                        for _ in range(
                            1 if how is Failure.UNREACHABLE else target.policy.breaker.failures
                        ):
                            work = self.balancer.endpoint_set(target.service or "").begin(
                                target.policy, endpoint, alone=False
                            )
                            work.record_failure("test", how=how)
                            work.end()

    def recovers(self, *hosts: str) -> None:
        """When the open times of these are over, a trial request succeeds."""
        self.now += 1.6
        for service in self.known.current.services:
            for target in service.targets.values():
                for endpoint in target.endpoints:
                    if endpoint.address.host in hosts:
                        work = self.balancer.endpoint_set(target.service or "").begin(
                            target.policy, endpoint, alone=False
                        )
                        work.record_response(None)
                        work.end()

    def services(self) -> list[Service]:
        directory = self.known.current
        return [
            *directory.services,
            *(service for cluster in directory.clusters.values() for service in cluster.services),
        ]


def within(seen: int, share: float, count: int) -> bool:
    """Five standard deviations: one in two million random draws is outside."""
    return abs(seen - share * count) <= 5 * math.sqrt(count * share * (1 - share))
