"""Makes the entry of a service from the service, its slices and the known pods.

An endpoint may be in two slices: while it moves between them, or because each slice has some of its
ports. The entry has it once. Where the slices disagree, the newer one wins. A port of the service
is looked up by name in each slice, because a named target port may have a different number in each
pod.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from control.discovery.entries import EndpointEntry, PortEntry, ServiceEntry
from control.discovery.facts import EndpointFact, ServiceFact, SliceFact
from control.discovery.judge import ClusterView, ExpectedPeer, Refusal, judge
from control.kube.resources import Key

# The most problems that are reported of one service. More would not help a reader.
_MOST_PROBLEMS = 10
# The most endpoints times ports of one service. A proxy that uses the service makes that many
# targets, so a tenant could exhaust the memory of its clients and of the control plane.
_MOST_TARGETS = 200_000

# Pairs of a service port and the own port of an endpoint, sorted. Endpoints share them.
_Ports = tuple[tuple[int, int], ...]


def resolve(
    key: Key,
    service: ServiceFact,
    addresses: tuple[str, ...],
    slices: Iterable[SliceFact],
    cluster: ClusterView,
) -> tuple[ServiceEntry, tuple[str, ...]]:
    """Return the entry of a service and its problems, as texts for people.

    `addresses`: the cluster addresses of the service that belong to no other service.
    """
    problems = list(service.problems)
    newest: dict[str, tuple[EndpointFact, ExpectedPeer]] = {}
    ports: dict[str, _Ports] = {}
    parts = sorted(slices, key=lambda part: part.order)
    if sum(len(part.endpoints) for part in parts) * max(1, len(service.ports)) > _MOST_TARGETS:
        problems.append(f"more than {_MOST_TARGETS} endpoints times ports: no endpoint is used")
        parts = []
    joined: dict[tuple[_Ports, _Ports], _Ports] = {}
    for part in parts:
        problems += part.problems
        numbers = tuple(sorted(_ports(service, part)))
        for endpoint in part.endpoints:
            who = judge(endpoint, key[0], service, cluster)
            if isinstance(who, Refusal):
                problems += [who.why] if who.why else []
                continue
            newest[endpoint.address] = endpoint, who
            known = ports.setdefault(endpoint.address, numbers)
            if known is not numbers and known != numbers:
                both = known, numbers
                if both not in joined:
                    joined[both] = tuple(sorted({**dict(known), **dict(numbers)}.items()))
                ports[endpoint.address] = joined[both]
    endpoints = tuple(
        _entry(endpoint, who, ports[address], cluster)
        for address, (endpoint, who) in sorted(newest.items(), key=lambda item: item[0])
    )
    listed = tuple(PortEntry(port.port, port.target, port.protocol) for port in service.ports)
    shown = tuple(dict.fromkeys(problems))[:_MOST_PROBLEMS]
    local, exported = service.local, service.exported
    return ServiceEntry(key, service.uid, addresses, listed, endpoints, local, exported), shown


def _ports(service: ServiceFact, part: SliceFact) -> Iterator[tuple[int, int]]:
    """Pairs of a service port that the slice's endpoints serve, and their own port for it."""
    numbers = dict(part.ports)
    for port in service.ports:
        if port.name in numbers:
            yield port.port, numbers[port.name] or port.port


def _entry(
    endpoint: EndpointFact, who: ExpectedPeer, ports: _Ports, cluster: ClusterView
) -> EndpointEntry:
    return EndpointEntry(
        endpoint.address,
        who.identity,
        who.skip_ports,
        ports,
        endpoint.state,
        endpoint.node,
        endpoint.zone or cluster.zone(endpoint.node),
        endpoint.hostname,
        endpoint.zones,
        endpoint.nodes,
        who.outside,
    )
