"""An entry as a client sees it: which endpoints may be used from where.

The rules are kube-proxy's (KEP-1669, KEP-2433, KEP-3015), so that a service means the same with the
mesh and without it:

* Endpoints that are ready are used. If there is none, those are that are terminating and still serve.
* With internalTrafficPolicy Local only those of the client's own node are, ready or, if none is, terminating; hints do not matter then.
* Hints are used only if each endpoint that is ready has one and one of them is for the client: hints for nodes before hints for zones.

Both address families are served apart, as if they were two services. Clients of one node and zone
see the same, and so do clients of all places where nothing of this matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from control.discovery.entries import EndpointEntry, ServiceEntry


@dataclass(frozen=True, slots=True)
class Place:
    """Where a client is. "": that is not known, and then no hint is for it."""

    node: str = ""
    zone: str = ""


NOWHERE = Place()


def usable(entry: ServiceEntry, place: Place = NOWHERE) -> frozenset[str]:
    """The addresses of the endpoints that a client at `place` may use. One that does not say its
    node may use all of a service that is served locally."""
    found: set[str] = set()
    for six in (False, True):
        family = [endpoint for endpoint in entry.endpoints if (":" in endpoint.address) == six]
        found.update(endpoint.address for endpoint in _usable(family, entry.local, place))
    return frozenset(found)


def _usable(
    endpoints: Sequence[EndpointEntry], local: bool, place: Place
) -> Sequence[EndpointEntry]:
    if local and place.node:
        endpoints = [endpoint for endpoint in endpoints if endpoint.node == place.node]
    ready = [endpoint for endpoint in endpoints if endpoint.state == "ready"]
    if not ready:
        return [endpoint for endpoint in endpoints if endpoint.state == "draining"]
    if local:
        return ready
    for mine, hinted in (
        (
            [endpoint for endpoint in ready if place.node in endpoint.nodes],
            all(endpoint.nodes for endpoint in ready),
        ),
        (
            [endpoint for endpoint in ready if place.zone in endpoint.zones],
            all(endpoint.zones for endpoint in ready),
        ),
    ):
        if hinted and mine:
            return mine
    return ready
