"""An entry as a client sees it: which endpoints it may use, by its node and zone.

The rules are those of kube-proxy (KEP-1669, KEP-2433, KEP-3015). So a service means the same with
and without the mesh:

* Ready endpoints are used. If there are none, endpoints that are terminating but still serve are
  used.
* With internalTrafficPolicy Local, only endpoints on the client's own node are used: the ready
  ones, or the terminating ones if none is ready. Hints are ignored then.
* Hints are used only if every ready endpoint has one and at least one of them is for the client.
  Hints for nodes come before hints for zones.

IPv4 and IPv6 endpoints are handled separately, as if they were two services. Clients of the same
node and zone see the same endpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from control.discovery.entries import EndpointEntry, ServiceEntry


@dataclass(frozen=True, slots=True)
class Place:
    """Where a client is. "": not known, so no hint is for it. `namespace`: the client's own."""

    node: str = ""
    zone: str = ""
    namespace: str = ""


NOWHERE = Place()


def usable(entry: ServiceEntry, place: Place = NOWHERE) -> frozenset[str]:
    """The addresses of the endpoints that a client at `place` may use. A client without a node may
    use all endpoints of a service with internalTrafficPolicy Local.
    """
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
