"""The directory: which services there are, where their endpoints are, and who the endpoints are.

A snapshot is immutable. It is built whole from one document, with every index it needs, and replaced whole by the next one
(proxy/mesh/watch.py): a connection resolves against one consistent world, and no lock is needed.

Connections are keyed on the address that the application dialled, never on a name inside the request, which the application
could choose freely. Three kinds of address are known, and tried in this order:

    a service's cluster address and port    -> the service's endpoints
    an endpoint's address and target port   -> that one endpoint, with what its service says of the port
    an endpoint's address, any other port   -> that one pod: its identity holds for every port, nothing is said of the protocol

Every other address is the one plain endpoint at exactly that address: it is never replaced by a guess. An endpoint with an
identity is meshed, and is spoken to by mutual TLS only; one without is spoken to as it is.
"""

from __future__ import annotations

import enum
import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from proxy.mesh.document import DocumentError, Mistakes, Plain, child, closest, load, mapping, said, sequence, unknown_keys
from proxy.mesh.spiffe import SpiffeId, SpiffeIdError
from proxy.net.address import Address

MAX_WEIGHT = 1000
# RFC 1123: what Kubernetes accepts as a name of a service or namespace.
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")


class Hint(enum.StrEnum):
    """What is known of the protocol before a byte has been seen."""

    HTTP1 = "http1"
    HTTP2 = "http2"
    OPAQUE = "opaque"
    DETECT = "detect"


_HINTS: Mapping[str, Hint] = {hint.value: hint for hint in Hint}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One place that serves. `identity` None: not meshed, so clear text; otherwise only this peer is accepted there."""

    address: Address
    identity: SpiffeId | None = None
    protocol: Hint = Hint.DETECT
    ready: bool = True
    weight: int = 1
    zone: str = ""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a connection may go. `service` is "namespace/name", None for an address of no service. No endpoints: nobody serves it."""

    service: str | None
    endpoints: tuple[Endpoint, ...]
    protocol: Hint = Hint.DETECT


@dataclass(frozen=True, slots=True)
class Port:
    """A port of a service, and the port on which its endpoints serve it (unless an endpoint says otherwise)."""

    port: int
    target_port: int
    protocol: Hint


@dataclass(frozen=True, slots=True)
class Service:
    """A service, and for each of its ports where a connection to it may go."""

    name: str
    namespace: str
    addresses: tuple[str, ...]
    ports: tuple[Port, ...]
    targets: Mapping[int, Target] = field(repr=False)

    @property
    def qualified(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Directory:
    """A snapshot. Made by `parse`; `Directory()` knows nothing, and resolves every address to itself."""

    services: tuple[Service, ...] = ()
    _clustered: Mapping[Address, Target] = field(default_factory=dict, repr=False)
    _served: Mapping[Address, Target] = field(default_factory=dict, repr=False)
    _pods: Mapping[str, Endpoint] = field(default_factory=dict, repr=False)

    def resolve(self, original: Address) -> Target:
        """Where a connection to `original` goes. Never fails; takes the same time however much there is to know."""
        target = self._clustered.get(original) or self._served.get(original)
        if target is not None:
            return target
        pod = self._pods.get(original.host)
        if pod is None:
            if original.host.startswith("::ffff:"):
                return self.resolve(Address(normalised(original.host), original.port))
            return Target(None, (Endpoint(original),))
        return Target(None, (Endpoint(original, pod.identity, Hint.DETECT, pod.ready, pod.weight, pod.zone),))

    @property
    def endpoint_count(self) -> int:
        """How many pods are known."""
        return len(self._pods)


class DirectoryError(DocumentError):
    """The text is not a directory. `.mistakes` has one line for each thing that is wrong, with its path."""


def normalised(host: str) -> str:
    """An IP literal in its one canonical form, IPv4-mapped IPv6 as IPv4; anything else unchanged."""
    try:
        literal = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(literal, ipaddress.IPv6Address) and literal.ipv4_mapped is not None:
        literal = literal.ipv4_mapped
    return str(literal)


def parse(text: str, source: str) -> Directory:
    """The directory in a YAML document; `source` names it in errors. Raises DirectoryError with all mistakes."""
    try:
        value = load(text, source)
    except DocumentError as error:
        raise DirectoryError(source, error.mistakes) from error
    builder = _Builder()
    if (root := mapping(value, "", builder.mistakes)) is not None:
        unknown_keys(root, ("services",), "", builder.mistakes)
        if "services" not in root:
            builder.mistakes.add("services", "must be given (an empty list, if there are none)")
        for index, service in enumerate(sequence(root.get("services"), "services", builder.mistakes)):
            builder.service(service, f"services[{index}]")
    if builder.mistakes:
        raise DirectoryError(source, builder.mistakes.found())
    return builder.directory()


def _of_family(target: Target, host: str) -> Target:
    """The endpoints of a target that have the address family of `host`, as without a proxy: an application may listen on that one only. All
    of them, if none has it: then a proxy can help that the network could not."""
    same = tuple(endpoint for endpoint in target.endpoints if endpoint.address.is_ipv6 == (":" in host))
    return Target(target.service, same, target.protocol) if same and len(same) < len(target.endpoints) else target


@dataclass(slots=True)
class _Pod:
    """One entry under `endpoints`, before it is known on which ports it serves."""

    host: str
    template: Endpoint
    ports: Mapping[int, int]


class _Builder:
    """Collects services, and the mistakes in them; the indexes make sure that no address means two things."""

    def __init__(self) -> None:
        self.mistakes = Mistakes()
        self._services: list[Service] = []
        self._names: dict[str, str] = {}
        self._clustered: dict[Address, Target] = {}
        self._owners: dict[Address, str] = {}
        self._served: dict[Address, Target] = {}
        self._pods: dict[str, Endpoint] = {}
        self._identities: dict[str, SpiffeId] = {}

    def directory(self) -> Directory:
        return Directory(tuple(self._services), self._clustered, self._served, self._pods)

    def service(self, value: Plain, path: str) -> None:
        given = mapping(value, path, self.mistakes)
        if given is None:
            return
        unknown_keys(given, ("name", "namespace", "addresses", "ports", "endpoints"), path, self.mistakes)
        name = self._label(given.get("name"), child(path, "name"))
        namespace = self._label(given.get("namespace", "default"), child(path, "namespace"))
        qualified = f"{namespace}/{name}"
        if name and namespace and (first := self._names.setdefault(qualified, path)) != path:
            self.mistakes.add(path, f"the service {qualified} is already at {first}")
        listed = sequence(given.get("addresses"), child(path, "addresses"), self.mistakes)
        hosts = tuple(self._host(host, f"{path}.addresses[{index}]") for index, host in enumerate(listed))
        ports = self._ports(given.get("ports"), child(path, "ports"))
        pods = self._endpoints(given.get("endpoints"), child(path, "endpoints"), ports)
        targets = {port.port: self._target(qualified, port, pods) for port in ports}
        for index, host in enumerate(hosts):
            for port in ports:
                self._claim(Address(host, port.port), _of_family(targets[port.port], host), f"{path}.addresses[{index}]")
        self._services.append(Service(name, namespace, hosts, tuple(ports), targets))

    def _claim(self, address: Address, target: Target, path: str) -> None:
        if address in self._owners and address.host:
            self.mistakes.add(path, f"{address} already belongs to {self._owners[address]}")
            return
        self._owners[address] = f"{target.service} ({path})"
        self._clustered[address] = target

    def _target(self, service: str, port: Port, pods: list[_Pod]) -> Target:
        endpoints = []
        for pod in pods:
            address = Address(pod.host, pod.ports.get(port.port, port.target_port))
            known = pod.template
            endpoint = Endpoint(address, known.identity, port.protocol, known.ready, known.weight, known.zone)
            endpoints.append(endpoint)
            before = self._served.get(address)
            if before is None:
                self._served[address] = Target(service, (endpoint,), port.protocol)
            elif before.service != service or before.protocol != port.protocol:
                # Two services share the pod's port: the address alone does not say which of them is meant.
                hint = port.protocol if before.protocol == port.protocol else Hint.DETECT
                ready = known.ready or before.endpoints[0].ready
                shared = Endpoint(address, known.identity, hint, ready, known.weight, known.zone)
                self._served[address] = Target(None, (shared,), hint)
        return Target(service, tuple(endpoints), port.protocol)

    def _ports(self, value: Plain, path: str) -> list[Port]:
        ports: dict[int, Port] = {}
        for index, item in enumerate(sequence(value, path, self.mistakes)):
            here = f"{path}[{index}]"
            given = mapping(item, here, self.mistakes)
            if given is None:
                continue
            unknown_keys(given, ("port", "target_port", "protocol"), here, self.mistakes)
            port = self._port(given.get("port"), child(here, "port"))
            target = self._port(given["target_port"], child(here, "target_port")) if "target_port" in given else port
            if port in ports and port:
                self.mistakes.add(child(here, "port"), f"port {port} is listed twice")
            ports[port] = Port(port, target, self._hint(given.get("protocol", "detect"), child(here, "protocol")))
        if not ports:
            self.mistakes.add(path, "at least one port must be given")
        return list(ports.values())

    def _endpoints(self, value: Plain, path: str, ports: list[Port]) -> list[_Pod]:
        pods: dict[str, _Pod] = {}
        for index, item in enumerate(sequence(value, path, self.mistakes)):
            pod = self._endpoint(item, f"{path}[{index}]", ports)
            if pod is None:
                continue
            if pod.host in pods:
                self.mistakes.add(f"{path}[{index}].address", f"{pod.host} is listed twice in this service")
            pods[pod.host] = pod
        return list(pods.values())

    def _endpoint(self, value: Plain, path: str, ports: list[Port]) -> _Pod | None:
        given = mapping(value, path, self.mistakes)
        if given is None:
            return None
        unknown_keys(given, ("address", "identity", "ports", "ready", "weight", "zone"), path, self.mistakes)
        host = self._host(given.get("address"), child(path, "address"))
        identity = self._identity(given["identity"], child(path, "identity")) if "identity" in given else None
        ready, weight, zone = given.get("ready", True), given.get("weight", 1), given.get("zone", "")
        if not isinstance(ready, bool):
            self.mistakes.add(child(path, "ready"), f"expected true or false, found {said(ready)}")
        if isinstance(weight, bool) or not isinstance(weight, int) or not 1 <= weight <= MAX_WEIGHT:
            self.mistakes.add(child(path, "weight"), f"expected a whole number from 1 to {MAX_WEIGHT}, found {said(weight)}")
            weight = 1
        if not isinstance(zone, str) or len(zone) > 63:
            self.mistakes.add(child(path, "zone"), f"expected a text of at most 63 characters, found {said(zone)}")
        elsewhere = self._own_ports(given.get("ports"), child(path, "ports"), ports)
        template = Endpoint(Address(host, 0), identity, Hint.DETECT, ready is True, weight, str(zone))
        known = self._pods.setdefault(host, template)
        if known.identity != identity and host:
            # A pod has one identity. If one place forgot it, that place would speak clear text to a meshed pod.
            was, now = known.identity or "no identity", identity or "no identity"
            self.mistakes.add(path, f"{host} has {now} here, but {was} in another service")
        return _Pod(host, template, elsewhere)

    def _own_ports(self, value: Plain, path: str, ports: list[Port]) -> Mapping[int, int]:
        if value is None:
            return {}
        found: dict[int, int] = {}
        names = {str(port.port): port.port for port in ports}
        for key, item in (mapping(value, path, self.mistakes) or {}).items():
            if key not in names:
                self.mistakes.add(child(path, key), "is not a port of this service")
            else:
                found[names[key]] = self._port(item, child(path, key))
        return found

    def _label(self, value: Plain, path: str) -> str:
        if isinstance(value, str) and _LABEL.match(value):
            return value
        expected = "expected a name of at most 63 lower-case letters, digits and dashes"
        self.mistakes.add(path, "must be given" if value is None else f"{expected}, found {said(value)}")
        return ""

    def _host(self, value: Plain, path: str) -> str:
        try:
            literal = ipaddress.ip_address(value) if isinstance(value, str) else None
        except ValueError:
            literal = None
        if literal is None:
            self.mistakes.add(path, "must be given" if value is None else f"expected an IP address, found {said(value)}")
            return ""
        if literal.is_unspecified or literal.is_multicast:
            self.mistakes.add(path, f"{literal} is not the address of one place")
        mapped = literal.ipv4_mapped if isinstance(literal, ipaddress.IPv6Address) else None
        return str(mapped or literal)

    def _port(self, value: Plain, path: str) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 65535:
            return value
        self.mistakes.add(path, "must be given" if value is None else f"expected a port from 1 to 65535, found {said(value)}")
        return 0

    def _hint(self, value: Plain, path: str) -> Hint:
        hint = _HINTS.get(value) if isinstance(value, str) else None
        if hint is None:
            near = closest(value, _HINTS) if isinstance(value, str) else ""
            self.mistakes.add(path, f"expected one of {', '.join(_HINTS)}; found {said(value)}{near}")
        return hint or Hint.DETECT

    def _identity(self, value: Plain, path: str) -> SpiffeId | None:
        if not isinstance(value, str):
            # Nothing would mean clear text, which nobody should get by leaving a value out.
            self.mistakes.add(path, f"expected a SPIFFE ID, found {said(value)} (leave the key out for an endpoint without a proxy)")
            return None
        found = self._identities.get(value)
        if found is None:
            try:
                found = self._identities[value] = SpiffeId.parse(value)
            except SpiffeIdError as error:
                self.mistakes.add(path, str(error))
        return found


def directory_schema() -> dict[str, object]:
    """The JSON schema (2020-12) of the file, for editors and checks. What contradicts itself across entries is found by `parse` alone."""
    label: dict[str, object] = {"type": "string", "pattern": "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"}
    number: dict[str, object] = {"type": "integer", "minimum": 1, "maximum": 65535}
    port = {"port": number, "target_port": number, "protocol": {"enum": list(_HINTS)}}
    endpoint = {
        "address": {"type": "string"},
        "identity": {"type": "string", "pattern": "^spiffe://[^/]+/ns/[^/]+/sa/[^/]+$"},
        "ports": {"type": "object", "additionalProperties": number},
        "ready": {"type": "boolean"},
        "weight": {"type": "integer", "minimum": 1, "maximum": MAX_WEIGHT},
        "zone": {"type": "string", "maxLength": 63},
    }
    service = {
        "name": label,
        "namespace": label,
        "addresses": {"type": "array", "items": {"type": "string"}},
        "ports": {"type": "array", "minItems": 1, "items": _closed(port, "port")},
        "endpoints": {"type": "array", "items": _closed(endpoint, "address")},
    }
    return _closed({"services": {"type": "array", "items": _closed(service, "name", "ports")}}, "services")


def _closed(properties: Mapping[str, object], *required: str) -> dict[str, object]:
    return {"type": "object", "additionalProperties": False, "properties": dict(properties), "required": list(required)}
