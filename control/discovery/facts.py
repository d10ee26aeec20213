"""Facts: the fields of API objects that discovery needs, in a compact form.

Objects with equal facts are the same to discovery: a change of any other field is ignored.
Addresses are in their canonical form. Only TCP ports are kept, because proxies carry only TCP.
"""

from __future__ import annotations

import functools
import ipaddress
from typing import Literal

import msgspec

from control.contract import ADMIN_PORT, Hint, SpiffeId, SpiffeIdError
from control.discovery import metadata
from control.kube.objects import EndpointSlice, PartialObjectMetadata, Pod, Service, SliceEndpoint
from control.kube.resources import Key


class Fact(msgspec.Struct, frozen=True, gc=False):
    """The base of all facts."""


class PodFact(Fact, frozen=True):
    """A pod that may be running. `account`: its service account, which the API server has checked.
    `skip_ports`: see metadata.py. `problems`: values that cannot be read, as texts for people.
    """

    uid: str
    account: str
    ips: tuple[str, ...]
    node: str
    host_network: bool
    meshed: bool
    skip_ports: frozenset[int]
    created: str
    problems: tuple[str, ...] = ()


class PortFact(Fact, frozen=True):
    """A port of a service. `target`: the port of its endpoints, if the service gives a number for
    it; else `port`.
    """

    name: str
    port: int
    target: int
    protocol: Hint


class ServiceFact(Fact, frozen=True):
    """A service. `local`: clients may use only endpoints on their own node. `identity`: the
    identity of endpoints that are not pods. `identity_unreadable`: the annotation for it is set but
    cannot be read. `exported`: clients of other clusters may use it.
    """

    uid: str
    created: str
    addresses: tuple[str, ...]
    ports: tuple[PortFact, ...]
    local: bool = False
    identity: SpiffeId | None = None
    identity_unreadable: bool = False
    problems: tuple[str, ...] = ()
    exported: bool = False


# The pod that an endpoint names: namespace, name and uid ("": not given).
Target = tuple[str, str, str]
State = Literal["ready", "draining", "unready"]


class EndpointFact(Fact, frozen=True):
    """An endpoint of a slice. `target`: the pod that it names; None: it names no pod. `zones` and
    `nodes`: the clients that it is meant for. State "draining": terminating, but still serving.
    """

    address: str
    state: State
    target: Target | None
    node: str
    zone: str
    hostname: str
    zones: frozenset[str]
    nodes: frozenset[str]


class SliceFact(Fact, frozen=True):
    """Some endpoints of a service. `ports`: name and number (None: the port that the client
    connects to). `order`: higher for newer slices.
    """

    service: Key
    order: tuple[int, str]
    ports: tuple[tuple[str, int | None], ...]
    endpoints: tuple[EndpointFact, ...]
    problems: tuple[str, ...] = ()


_NONE: frozenset[str] = frozenset()


def pod_fact(pod: Pod) -> PodFact | None:
    """The fact of a pod. None: it has ended, and its address may already belong to another pod."""
    if pod.status.phase in ("Succeeded", "Failed"):
        return None
    meta, spec = pod.metadata, pod.spec
    meshed = not spec.host_network and metadata.is_meshed(meta.labels or {})
    skip_ports = _ADMIN_ONLY
    problems: tuple[str, ...] = ()
    if meshed:
        try:
            skip_ports = _same(metadata.skipped_ports(meta.annotations or {}))
        except metadata.MetadataError as error:
            problems = (
                f"pod {meta.name}: {metadata.SKIP_INBOUND_PORTS} or {metadata.ADMIN}: {error}",
            )
    given = (canonical(entry.ip) for entry in pod.status.pod_ips or ())
    ips = tuple(ip for ip in given if ip is not None)
    account = spec.service_account_name or "default"
    created = meta.creation_timestamp or ""
    return PodFact(
        meta.uid,
        account,
        ips,
        spec.node_name,
        spec.host_network,
        meshed,
        skip_ports,
        created,
        problems,
    )


def service_fact(service: Service) -> ServiceFact | None:
    """The fact of a service. None: it is an ExternalName. Applications connect to its target name
    themselves.
    """
    meta, spec = service.metadata, service.spec
    if spec.type == "ExternalName":
        return None
    annotations, problems = meta.annotations or {}, []
    opaque: frozenset[int] = frozenset()
    try:
        opaque = metadata.port_list(annotations.get(metadata.OPAQUE_PORTS, ""))
    except metadata.MetadataError as error:
        problems.append(f"{metadata.OPAQUE_PORTS}: {error}")
    identity, identity_unreadable = None, False
    if metadata.ENDPOINT_IDENTITY in annotations:
        try:
            identity = SpiffeId.parse(annotations[metadata.ENDPOINT_IDENTITY])
        except SpiffeIdError as error:
            identity_unreadable = True
            problems.append(f"{metadata.ENDPOINT_IDENTITY}: {error}")
    ports: dict[int, PortFact] = {}
    for port in spec.ports or ():
        if port.protocol == "TCP" and 1 <= port.port <= 65535:
            target = (
                port.target_port
                if isinstance(port.target_port, int) and port.target_port > 0
                else port.port
            )
            protocol = Hint.OPAQUE if port.port in opaque else metadata.hint(port.app_protocol)
            ports.setdefault(port.port, PortFact(port.name or "", port.port, target, protocol))
    given = (canonical(ip) for ip in spec.cluster_ips or (spec.cluster_ip,))
    addresses = tuple(ip for ip in given if ip is not None)
    local = spec.internal_traffic_policy == "Local"
    created = meta.creation_timestamp or ""
    return ServiceFact(
        meta.uid,
        created,
        addresses,
        tuple(ports.values()),
        local,
        identity,
        identity_unreadable,
        tuple(problems),
        metadata.is_exported(meta.labels or {}),
    )


def slice_fact(found: EndpointSlice) -> SliceFact | None:
    """The fact of a slice. None: it belongs to no service, or has names instead of addresses."""
    meta = found.metadata
    name = (meta.labels or {}).get(metadata.SERVICE_NAME, "")
    if not name or found.address_type not in ("IPv4", "IPv6"):
        return None
    ports = tuple(
        (port.name or "", port.port)
        for port in found.ports or ()
        if port.protocol in (None, "TCP") and (port.port is None or 1 <= port.port <= 65535)
    )
    endpoints, problems = [], []
    for endpoint in found.endpoints or ():
        fact = _endpoint(endpoint, meta.namespace)
        if fact is None:
            said = endpoint.addresses[0] if endpoint.addresses else ""
            problems.append(f"slice {meta.name}: {said[:60]!r} is not a usable unicast address")
        else:
            endpoints.append(fact)
    version = (
        int(meta.resource_version)
        if meta.resource_version.isascii() and meta.resource_version.isdigit()
        else 0
    )
    return SliceFact(
        (meta.namespace, name),
        (version, meta.name),
        ports,
        tuple(endpoints),
        tuple(problems[:_MOST_PROBLEMS]),
    )


def node_zone(node: PartialObjectMetadata) -> str | None:
    """The zone of a node. None: it has no zone label."""
    return (node.metadata.labels or {}).get(metadata.ZONE) or None


# The most problems that are reported of one slice. More would not help a reader, and would fill
# events.
_MOST_PROBLEMS = 5


def _endpoint(endpoint: SliceEndpoint, namespace: str) -> EndpointFact | None:
    address = canonical(endpoint.addresses[0]) if endpoint.addresses else None
    if address is None:
        return None
    target, reference = None, endpoint.target_ref
    if reference is not None and reference.kind in ("Pod", ""):
        target = (reference.namespace or namespace, reference.name, reference.uid)
    conditions, hints = endpoint.conditions, endpoint.hints
    ready, draining = True, False
    if conditions is not None:
        ready = conditions.ready is not False
        draining = conditions.terminating is True and conditions.serving is True
    zones = frozenset(zone.name for zone in hints.for_zones or ()) if hints is not None else _NONE
    nodes = frozenset(node.name for node in hints.for_nodes or ()) if hints is not None else _NONE
    state: State = "ready" if ready else "draining" if draining else "unready"
    return EndpointFact(
        address,
        state,
        target,
        endpoint.node_name or "",
        (endpoint.zone or "")[:63],
        endpoint.hostname or "",
        zones,
        nodes,
    )


@functools.lru_cache(maxsize=65536)
def canonical(text: str) -> str | None:
    """An IP address in its canonical form. None: not an IP address, or not a unicast address that a
    connection can go to (such as loopback or link-local).
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id:
            return None
        address = address.ipv4_mapped or address
    if (
        address.is_unspecified
        or address.is_multicast
        or address.is_loopback
        or address.is_link_local
    ):
        return None
    return str(address)


@functools.lru_cache(maxsize=1024)
def _same(ports: frozenset[int]) -> frozenset[int]:
    """Return the same object for equal sets. Nearly all pods have the same set, so this saves
    memory.
    """
    return ports


_ADMIN_ONLY = _same(frozenset({ADMIN_PORT}))
