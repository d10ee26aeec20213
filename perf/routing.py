"""The cost of routing a request, and whether it depends on the number of services.

Each line is one way to select a destination: by the address of a service, by an authority (where it
may select), by neither; and by the address of a service with a split or a failover. For an address
outside the mesh, the authority is not used. The directory has 1 service, then 10,000 with 50,000
endpoints, and as many in another cluster. The ratio is the second divided by the first; it should
be 1 within the noise. (Asking for a thousand services in turn shows the effect of CPU caches:
entries not used recently come from memory.)
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from ipaddress import ip_network

from lab.console import print_table
from proxy.balancing.balancer import Balancer
from proxy.directory import Directory, Target, parse
from proxy.net.address import Address
from proxy.routing.router import Router

GATEWAY = "spiffe://cluster.local/ns/isthmus/sa/gateway"
ROUNDS, REQUESTS = 7, 20_000


@dataclass(frozen=True, slots=True)
class Fixed:
    current: Directory


class Uncounted:
    def count_remote_attempt(self, cluster: str, why: str) -> None:
        pass

    def set_failover(self, service: str, away: bool) -> None:
        pass


def document(services: int) -> str:
    """A directory with that many services of five endpoints each. The first has a split, the second
    a failover.
    """
    lines = ["services:"]
    for number in range(services):
        lines.append(
            f"- {{name: s-{number}, addresses: [10.64.{number >> 8}.{number & 255}], ports:"
            " [{port: 80}], endpoints: ["
        )
        lines += [
            f"  {{address: 10.{128 + (pod >> 16)}.{pod >> 8 & 255}.{pod & 255}, identity:"
            f" spiffe://cluster.local/ns/default/sa/s-{number}}},"
            for pod in range(number * 5, number * 5 + 5)
        ]
        lines.append("]}")
    for name, host, more in (
        (
            "split",
            "10.63.0.1",
            "split: [{service: split, weight: 90}, {service: split, cluster: east, weight: 10}]",
        ),
        ("over", "10.63.0.2", "failover: {clusters: [east]}"),
    ):
        lines.append(
            f"- {{name: {name}, addresses: [{host}], ports: [{{port: 80}}], endpoints: [{{address:"
            f" {host}9}}], {more}}}"
        )
    lines += [
        "clusters:",
        f"- {{name: east, gateways: [{{address: 203.0.113.7, identity: '{GATEWAY}'}}], services: [",
    ]
    lines += [f"  {{name: s-{number}, ports: [{{port: 80}}]}}," for number in range(services)]
    lines += ["  {name: split, ports: [{port: 80}]}, {name: over, ports: [{port: 80}]}]}"]
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Case:
    """One way to select a destination. `addresses` take turns."""

    what: str
    addresses: tuple[str, ...]
    authority: bytes | None = None


def cases(services: int) -> list[Case]:
    last, nowhere = services - 1, ("192.0.2.1:80",)
    each = tuple(
        f"10.64.{n >> 8}.{n & 255}:80" for n in range(0, services, max(1, services // 1000))
    )
    return [
        Case("address of a service", each[-1:]),
        Case("of another one each time", each),
        Case("authority, full name", nowhere, f"s-{last}.default.svc.cluster.local".encode()),
        Case("authority, short name", nowhere, f"s-{last}".encode()),
        Case("authority, other cluster", nowhere, f"s-{last}.east".encode()),
        Case("neither is known", nowhere, b"www.example.com"),
        Case("outside of the mesh", ("198.51.100.1:80",), f"s-{last}".encode()),
        Case("address, with a split", ("10.63.0.1:80",)),
        Case("address, with a failover", ("10.63.0.2:80",)),
    ]


def seconds(router: Router, case: Case) -> float:
    """Seconds for one request."""
    known = [Address.parse(address) for address in case.addresses]

    def ask() -> bytes | None:
        return case.authority

    started = time.perf_counter()
    for turn in range(REQUESTS):
        target: Target = router.choose(router.find_target(known[turn % len(known)], ask))
    took = time.perf_counter() - started
    assert target.endpoints
    return took / REQUESTS


def made(services: int) -> Router:
    started = time.perf_counter()
    directory = parse(document(services), "perf")
    print(
        f"{services:,} services, {directory.endpoint_count:,} endpoints: read in"
        f" {time.perf_counter() - started:.2f} s"
    )
    balancer, networks = Balancer(time.monotonic), [ip_network("192.0.2.0/24")]
    return Router(
        Fixed(directory),
        balancer,
        Uncounted(),
        "default",
        10.0,
        time.monotonic,
        random.Random(1),
        networks=networks,
    )


def main() -> None:
    few, many = made(1), made(10_000)
    rows = []
    for one, other in zip(cases(1), cases(10_000), strict=True):
        # Taking turns, and the best of each: a disturbance affects both.
        rounds = [(seconds(few, one), seconds(many, other)) for _ in range(ROUNDS)]
        small, large = (min(times) * 1e6 for times in zip(*rounds, strict=True))
        rows.append([one.what, *(f"{figure:.2f}" for figure in (small, large, large / small))])
    print_table(["µs a request", "1 service", "10,000", "ratio"], rows)


if __name__ == "__main__":
    main()
