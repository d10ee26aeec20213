"""Splits and failovers: other destinations for the requests of a service, as the directory document
declares them.

`split` distributes the requests of a service over several services, which may include itself.
`failover` names clusters that can serve it instead. These are two steps: a split selects a service,
and a failover selects where that service is served. Each step happens once. A request that was
split is not split again, even if its backend has a split.

A cycle of services that send requests to each other is still a mistake. If it runs through the
gateway of another cluster, both directories would have to change to break it. So this module
searches for cycles along splits, failovers, mirrors of mirrors and gateways whose names are behind
themselves, and reports them as mistakes of the document."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from loopguard.graph import cycles
from proxy.directory.service_names import ServiceNames
from proxy.directory.snapshot import Backend, Cluster, Plan, Service, Target
from proxy.settings.document import (
    Mistakes,
    Plain,
    child,
    closest,
    describe,
    mapping,
    sequence,
    unknown_keys,
)

MAX_SHARE = 1_000_000
MOST_BACKENDS = 64

SPLIT = ("service", "namespace", "cluster", "weight")
FAILOVER = ("clusters", "below")


@dataclass(frozen=True, slots=True)
class RawPlan:
    """The unread `split` and `failover` of one service. `targets` belong to the service, and get
    the plans."""

    service: Service
    targets: dict[int, Target]
    path: str
    split: Plain
    failover: Plain


@dataclass(frozen=True, slots=True)
class PlanContext:
    """All services that a plan may name. `name`: of this cluster, "" if the document does not give
    it."""

    name: str
    services: tuple[Service, ...]
    clusters: Mapping[str, Cluster]
    names: ServiceNames[Service]


@dataclass(frozen=True, slots=True)
class _Failover:
    services: tuple[Service, ...] = ()
    below: int = 1


def plan(raw_plans: list[RawPlan], context: PlanContext, mistakes: Mistakes) -> None:
    """Put the plans into the targets of these services. Add a mistake for each invalid plan and
    each cycle."""
    reader = _Reader(context, mistakes)
    failovers = {raw.service.qualified: reader.failover(raw) for raw in raw_plans}
    splits = {raw.service.qualified: reader.split(raw) for raw in raw_plans}
    for raw in raw_plans:
        name = raw.service.qualified
        shares = splits[name] or [(1, raw.service, raw.path)]
        for port in raw.targets:
            backends = [
                backend
                for weight, service, path in shares
                if (
                    backend := _backend(
                        weight,
                        service,
                        port,
                        failovers.get(service.qualified, _Failover()),
                        (path, mistakes),
                    )
                )
                is not None
            ]
            raw.targets[port] = replace(raw.targets[port], plan=Plan(tuple(backends)))
    graph = _graph(
        context,
        {name: [service for _, service, _ in shares] for name, shares in splits.items()},
        failovers,
    )
    paths = {raw.service.qualified: raw.path for raw in raw_plans}
    for cycle in cycles(graph):
        where = next((paths[node] for node in cycle if node in paths), "clusters")
        mistakes.add(where, f"its requests would go in a cycle: {' -> '.join(cycle)}")


def _backend(
    weight: int, service: Service, port: int, failover: _Failover, notes: tuple[str, Mistakes]
) -> Backend | None:
    path, mistakes = notes
    found = []
    for place in (service, *failover.services):
        target = place.targets.get(port)
        if target is None:
            mistakes.add(path, f"{place.qualified} has no port {port}")
            return None
        found.append(target if target.plan is None else replace(target, plan=None))
    return Backend(weight, found[0], tuple(found[1:]), failover.below)


class _Reader:
    def __init__(self, context: PlanContext, mistakes: Mistakes) -> None:
        self._context = context
        self._mistakes = mistakes
        everywhere = [
            context.services,
            *(cluster.services for cluster in context.clusters.values()),
        ]
        self._services = {
            service.qualified: service for services in everywhere for service in services
        }

    def split(self, raw: RawPlan) -> list[tuple[int, Service, str]]:
        """(weight, service, path) of each backend."""
        path = child(raw.path, "split")
        items = sequence(raw.split, path, self._mistakes)
        if len(items) > MOST_BACKENDS:
            self._mistakes.add(path, f"at most {MOST_BACKENDS} backends, found {len(items)}")
        found: dict[str, tuple[int, Service, str]] = {}
        for index, item in enumerate(items):
            here = f"{path}[{index}]"
            if (backend := self._share(item, raw.service, here)) is None:
                continue
            if backend[1].qualified in found:
                self._mistakes.add(here, f"{backend[1].qualified} is listed twice")
            found[backend[1].qualified] = (*backend, here)
        if found and not any(weight for weight, _, _ in found.values()):
            self._mistakes.add(path, "all weights are 0: at least one weight must be above 0")
        return list(found.values())

    def _share(self, value: Plain, apex: Service, path: str) -> tuple[int, Service] | None:
        given = mapping(value, path, self._mistakes)
        if given is None:
            return None
        unknown_keys(given, SPLIT, path, self._mistakes)
        weight = given.get("weight")
        if isinstance(weight, bool) or not isinstance(weight, int) or not 0 <= weight <= MAX_SHARE:
            wrong = (
                "must be given"
                if weight is None
                else f"expected a whole number from 0 to {MAX_SHARE}, found {describe(weight)}"
            )
            self._mistakes.add(child(path, "weight"), wrong)
            weight = 0
        if "service" not in given:
            self._mistakes.add(child(path, "service"), "must be given")
            return None
        cluster = (
            self._cluster(given["cluster"], child(path, "cluster")) if "cluster" in given else ""
        )
        if cluster is None:
            return None
        service = self._find(
            f"{given.get('namespace', apex.namespace)}/{given['service']}", cluster, path
        )
        return (weight, service) if service is not None else None

    def failover(self, raw: RawPlan) -> _Failover:
        path = child(raw.path, "failover")
        if raw.failover is None or (given := mapping(raw.failover, path, self._mistakes)) is None:
            return _Failover()
        unknown_keys(given, FAILOVER, path, self._mistakes)
        below = given.get("below", 1)
        if isinstance(below, bool) or not isinstance(below, int) or not 1 <= below <= 1_000_000:
            self._mistakes.add(
                child(path, "below"),
                f"expected a whole number from 1 to 1000000, found {describe(below)}",
            )
            below = 1
        listed = sequence(given.get("clusters"), child(path, "clusters"), self._mistakes)
        if not listed:
            self._mistakes.add(child(path, "clusters"), "at least one cluster must be named")
        found: dict[str, Service] = {}
        for index, item in enumerate(listed):
            here = f"{path}.clusters[{index}]"
            if (cluster := self._cluster(item, here)) is None:
                continue
            if cluster in found or cluster == "":
                self._mistakes.add(
                    here,
                    f"{describe(item)} is {'listed twice' if cluster else 'this cluster itself'}",
                )
            elif (service := self._find(raw.service.qualified, cluster, here)) is not None:
                found[cluster] = service
        return _Failover(tuple(found.values()), below)

    def _cluster(self, value: Plain, path: str) -> str | None:
        """The name of a known cluster, "" for this cluster. None: not known."""
        if isinstance(value, str) and value and value == self._context.name:
            return ""
        if isinstance(value, str) and value in self._context.clusters:
            return value
        near = closest(value, self._context.clusters) if isinstance(value, str) else ""
        self._mistakes.add(
            path,
            f"expected the name of a cluster in `clusters`, found {describe(value)}{near}",
        )
        return None

    def _find(self, qualified: str, cluster: str, path: str) -> Service | None:
        name = f"{cluster}/{qualified}" if cluster else qualified
        service = self._services.get(name)
        if service is None:
            self._mistakes.add(
                path, f"there is no service {name} in this document{closest(name, self._services)}"
            )
        return service


def _graph(
    context: PlanContext,
    splits: Mapping[str, Iterable[Service]],
    failovers: Mapping[str, _Failover],
) -> dict[str, list[str]]:
    """The graph of forwarded requests, by service name."""
    graph: dict[str, list[str]] = defaultdict(list)
    for name, services in splits.items():
        graph[name] += [service.qualified for service in services if service.qualified != name]
    for name, failover in failovers.items():
        graph[name] += [service.qualified for service in failover.services]
    exported = {
        service.qualified for cluster in context.clusters.values() for service in cluster.services
    }
    exported |= {service.qualified for service in context.services}
    for cluster in context.clusters.values():
        behind = [
            context.names.find(gateway.host, "")
            for gateway in cluster.gateways
            if not gateway.literal
        ]
        for service in cluster.services:
            graph[service.qualified] += [
                gateway.qualified for gateway in behind if gateway is not None
            ]
            if (mirrored := _mirrored(service, context, exported)) is not None:
                graph[service.qualified].append(mirrored)
    return graph


def _mirrored(service: Service, context: PlanContext, exported: set[str]) -> str | None:
    """The service that an exported service of another cluster only mirrors there, as its name
    shows. None: it is not a mirror."""
    for other in (context.name, *context.clusters):
        if other and other != service.cluster and service.name.endswith(f"-{other}"):
            local = f"{service.namespace}/{service.name.removesuffix(f'-{other}')}"
            name = local if other == context.name else f"{other}/{local}"
            if name in exported:
                return name
    return None
