"""Writes entries as the document of a directory file, as seen from one place.

docs/configuration.md, "The directory", describes the format. An endpoint that clients at this place
may not use is in the document too, with `ready: false`: a client that connects to its address
directly still expects its identity. A service without ports is left out.

In a document an address has one identity. The services of two namespaces may expect different ones
at an address outside. Then these endpoints are left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from typing import Any

from control.contract import NOT_SERVED, SpiffeId
from control.discovery.entries import EndpointEntry, ServiceEntry
from control.discovery.usable_endpoints import NOWHERE, Place, usable


def document(
    entries: Iterable[ServiceEntry], place: Place = NOWHERE, *, domain: str = "cluster.local"
) -> dict[str, Any]:
    """The document as plain values. It is sorted by namespace and name."""
    listed = sorted(entries, key=lambda entry: entry.key)
    outside: dict[str, set[SpiffeId | None]] = {}
    for entry in listed:
        for endpoint in entry.endpoints:
            if endpoint.outside:
                outside.setdefault(endpoint.address, set()).add(endpoint.identity)
    disputed = {address for address, identities in outside.items() if len(identities) > 1}
    services = [_service(entry, place, disputed) for entry in listed if entry.ports]
    return {"domain": domain, "services": services}


def _service(entry: ServiceEntry, place: Place, without: AbstractSet[str]) -> dict[str, Any]:
    namespace, name = entry.key
    may = usable(entry, place)
    ports = [
        {"port": port.port, "target_port": port.target, "protocol": port.protocol.value}
        for port in entry.ports
    ]
    targets = {port.port: port.target for port in entry.ports}
    endpoints = [
        _endpoint(endpoint, targets, ready=endpoint.address in may)
        for endpoint in entry.endpoints
        if endpoint.address not in without
    ]
    return {
        "name": name,
        "namespace": namespace,
        "addresses": list(entry.addresses),
        "ports": ports,
        "endpoints": endpoints,
        "export": entry.exported,
    }


def _endpoint(endpoint: EndpointEntry, targets: dict[int, int], *, ready: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"address": endpoint.address}
    if endpoint.identity is not None:
        found |= {"identity": str(endpoint.identity), "skip_ports": sorted(endpoint.skip_ports)}
    served = dict(endpoint.ports)
    elsewhere = {
        str(port): served.get(port, NOT_SERVED)
        for port, target in targets.items()
        if served.get(port) != target
    }
    if elsewhere:
        found["ports"] = elsewhere
    if not ready:
        found["ready"] = False
    if endpoint.zone:
        found["zone"] = endpoint.zone
    return found
