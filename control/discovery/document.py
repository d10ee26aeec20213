"""Entries as the document of a directory file (docs/configuration.md, "The directory"), as it is
seen from one place.

An endpoint that may not be used from there stands in the document all the same, and is not ready:
who dials its address still meets its identity. A service without ports has no place in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from control.contract import NOT_SERVED
from control.discovery.entries import EndpointEntry, ServiceEntry
from control.discovery.views import NOWHERE, Place, usable


def document(
    entries: Iterable[ServiceEntry], place: Place = NOWHERE, *, domain: str = "cluster.local"
) -> dict[str, Any]:
    """The document, as plain values."""
    services = [
        _service(entry, place)
        for entry in sorted(entries, key=lambda entry: entry.key)
        if entry.ports
    ]
    return {"domain": domain, "services": services}


def _service(entry: ServiceEntry, place: Place) -> dict[str, Any]:
    namespace, name = entry.key
    may = usable(entry, place)
    ports = [
        {"port": port.port, "target_port": port.target, "protocol": port.protocol.value}
        for port in entry.ports
    ]
    targets = {port.port: port.target for port in entry.ports}
    endpoints = [
        _endpoint(endpoint, targets, ready=endpoint.address in may) for endpoint in entry.endpoints
    ]
    return {
        "name": name,
        "namespace": namespace,
        "addresses": list(entry.addresses),
        "ports": ports,
        "endpoints": endpoints,
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
