"""The directory as an immutable snapshot, and its lookups by address and by name.

reader.py builds a snapshot from one document, with all indexes; channel/assembly.py builds one from
the entries that the control plane sent. The next snapshot replaces it as a whole. So each lookup
sees consistent data, without a lock.

Three kinds of address are known. The lookup tries them in this order:

    a service's cluster address and port    -> the service
    an endpoint's address and target port   -> that one endpoint, with its service's settings
    an endpoint's address, any other port   -> that one pod, with unknown protocol

An endpoint's identity applies to all ports except those that its proxy does not intercept
(`skip_ports`: the admin port, and the ports in `intercept.skip_inbound_ports` there). Connections
to those are clear text.

Every other address is one endpoint in clear text at exactly that address. The proxy never guesses
another one. An endpoint with an identity is meshed, and is reached by mutual TLS only. One without
an identity gets clear text.

The endpoints of a target in another cluster are the gateways of that cluster. `remote` has the name
that a gateway needs. A target may have a plan: other places where its requests may go
(proxy/routing/router.py decides)."""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from proxy.directory.policy import DEFAULT_POLICY, Policy
from proxy.directory.service_names import ServiceNames, split_authority
from proxy.identity.spiffe import SpiffeId
from proxy.net.address import Address

# RFC 9110 §4.2.1. A request that the proxy can read is not inside TLS of the application.
HTTP_PORT = 80
# The port of a proxy's probes and metrics. It is never redirected.
ADMIN_PORT = 4191


class Hint(enum.StrEnum):
    """The protocol of a port as declared, before any byte arrived."""

    HTTP1 = "http1"
    HTTP2 = "http2"
    OPAQUE = "opaque"
    DETECT = "detect"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One address that serves a service. `identity` None: not meshed, so clear text. Otherwise only
    this peer is accepted there."""

    address: Address
    identity: SpiffeId | None = None
    protocol: Hint = Hint.DETECT
    ready: bool = True
    weight: int = 1
    zone: str = ""

    def __hash__(self) -> int:
        """Pools use endpoints as keys, and each request looks one up, so this must be fast. Two
        endpoints rarely have the same address."""
        return hash(self.address)


@dataclass(frozen=True, slots=True)
class Pod:
    """One pod: its identity, and the ports without it. `endpoint` has the port 0."""

    endpoint: Endpoint
    skip_ports: frozenset[int]

    def at(self, address: Address, protocol: Hint = Hint.DETECT) -> Endpoint:
        """The pod at one of its ports. `address` must have the pod's host."""
        known = self.endpoint
        identity = None if address.port in self.skip_ports else known.identity
        return Endpoint(address, identity, protocol, known.ready, known.weight, known.zone)


@dataclass(frozen=True, slots=True)
class Remote:
    """A port of a service in another cluster, in the form that its gateway needs."""

    cluster: str
    host: str  # the service's full name there
    port: int

    @property
    def authority(self) -> bytes:
        """The authority of a request: with a port, except port 80."""
        return self.host.encode("ascii") if self.port == HTTP_PORT else self.tunnel

    @property
    def tunnel(self) -> bytes:
        """The authority for CONNECT, which always has a port (RFC 9110 §9.3.6)."""
        return f"{self.host}:{self.port}".encode("ascii")


@dataclass(frozen=True, slots=True)
class Target:
    """Where a connection may go. `service` is "namespace/name", or "cluster/namespace/name" for
    another cluster. None: an address without a service. No endpoints: the service is not
    available."""

    service: str | None
    endpoints: tuple[Endpoint, ...]
    protocol: Hint = Hint.DETECT
    policy: Policy = DEFAULT_POLICY
    remote: Remote | None = None  # if set, the endpoints are gateways
    plan: Plan | None = None


@dataclass(frozen=True, slots=True)
class Backend:
    """One backend of a split: the target, and the alternatives if fewer than `below` of its
    endpoints are usable. These targets have no plan: a split is not split again."""

    weight: int
    target: Target
    elsewhere: tuple[Target, ...] = ()
    below: int = 1


@dataclass(frozen=True, slots=True)
class Plan:
    """How the requests for a service are distributed. At least one weight is above zero."""

    backends: tuple[Backend, ...]


@dataclass(frozen=True, slots=True)
class Port:
    """A port of a service, and the default port of its endpoints."""

    port: int
    target_port: int
    protocol: Hint


@dataclass(frozen=True, slots=True)
class Service:
    """A service, and the target of each of its ports. `cluster` is "" for this cluster."""

    name: str
    namespace: str
    addresses: tuple[str, ...]
    ports: tuple[Port, ...]
    targets: Mapping[int, Target] = field(repr=False)
    cluster: str = ""
    exported: bool = False  # to other clusters, through this cluster's gateway

    @property
    def qualified(self) -> str:
        """The unique name in this snapshot: "namespace/name", or "cluster/namespace/name" for
        another cluster."""
        local = f"{self.namespace}/{self.name}"
        return f"{self.cluster}/{local}" if self.cluster else local


@dataclass(frozen=True, slots=True)
class Gateway:
    """A gateway of another cluster. `host` is an IP literal, or a name that the proxy resolves
    while it runs."""

    host: str
    port: int
    identity: SpiffeId
    literal: bool

    def at(self, host: str) -> Endpoint:
        """The gateway as an endpoint. It is the same for all services behind it, so they share its
        connections. Its protocol is the client's, because the directory with the declaration is in
        the other cluster."""
        return Endpoint(Address(host, self.port), self.identity)


@dataclass(frozen=True, slots=True)
class Cluster:
    """Another cluster: its gateways, and the services that it exports."""

    name: str
    domain: str
    gateways: tuple[Gateway, ...]
    services: tuple[Service, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a document permits to lose its identity (downgrades.py): everything, or services
    ("namespace/name") and IP addresses."""

    everything: bool = False
    names: frozenset[str] = frozenset()

    def covers(self, names: Iterable[str]) -> bool:
        """Whether one of `names` may lose its identity."""
        return self.everything or not self.names.isdisjoint(names)


@dataclass(slots=True)
class Requested:
    """What a directory has of the control plane's answers. Unlike a snapshot it changes: all
    snapshots of one source share it."""

    hosts: set[str] = field(default_factory=set)  # asked for, and not answered
    unidentified: set[str] = field(default_factory=set)  # answered: the identity is unknown
    names: set[str] = field(default_factory=set)  # "name.namespace", answered
    used: set[str] = field(default_factory=set)  # names that were looked up; the source clears it

    def answered(self, name: str | None) -> bool:
        """Whether the meaning of a name is known. None: it cannot be the name of a service."""
        if name is None:
            return True
        self.used.add(name)
        return name in self.names


@dataclass(frozen=True, slots=True)
class Directory:
    """A snapshot, made by `parse`. `Directory()` is empty, and resolves every address to itself.
    `requested`: set if it has only what the proxy asked for (proxy/directory/channel)."""

    services: tuple[Service, ...] = ()
    clusters: Mapping[str, Cluster] = field(default_factory=dict)
    name: str = ""  # of this cluster; "": the document does not give it
    clustered: Mapping[Address, Target] = field(default_factory=dict, repr=False)
    served: Mapping[Address, Target] = field(default_factory=dict, repr=False)
    pods: Mapping[str, Pod] = field(default_factory=dict, repr=False)
    _names: ServiceNames[Service] = field(default_factory=ServiceNames, repr=False)
    allowance: Allowance = Allowance()
    requested: Requested | None = field(default=None, repr=False, compare=False)
    _by_family: dict[tuple[int, bool], Target] = field(
        default_factory=dict, repr=False, compare=False
    )

    def find_address(self, original: Address) -> Target | None:
        """The target of an address. None: the directory does not have it. UNANSWERED: whether it
        has the address is not known. UNIDENTIFIED: which identity is there is not known. The time
        does not depend on the size of the directory."""
        target = self.clustered.get(original) or self.served.get(original)
        if target is not None:
            return target
        pod = self.pods.get(original.host)
        if pod is None:
            if original.host.startswith("::ffff:"):
                return self.find_address(Address(normalised(original.host), original.port))
            if self.requested is None:
                return None
            if original.host in self.requested.unidentified:
                return UNIDENTIFIED
            return UNANSWERED if original.host in self.requested.hosts else None
        return Target(None, (pod.at(original),))

    def resolve(self, original: Address) -> Target:
        """The destination of a connection to `original`. Never raises."""
        return self.find_address(original) or itself(original)

    def find_service(self, host: str, namespace: str) -> Service | None:
        """The service that the name `host` means for a pod in `namespace`, in this or another
        cluster. See dns/service.py."""
        return self._names.find(host, namespace)

    def remote(self, cluster: str, namespace: str, name: str) -> Service | None:
        """A service of another cluster."""
        return self._names.remote(name, namespace, cluster)

    def authority(self, authority: bytes, namespace: str, dialled: str) -> Target | None:
        """The target that a request's authority names, if it names a port of a known service
        exactly. It has the endpoints of the address family of `dialled` (an IP literal), if there
        are any. Returns the same object for the same service, port and family. UNANSWERED: the
        meaning of the name is not known."""
        parts = split_authority(authority)
        if parts is not None and self._unanswered(parts[0], namespace):
            return UNANSWERED
        service = self._names.find(parts[0], namespace) if parts is not None else None
        target = (
            service.targets.get(parts[1] or HTTP_PORT)
            if parts is not None and service is not None
            else None
        )
        if target is None:
            return None
        key = id(target), ":" in dialled
        made = self._by_family.get(key)
        if made is None:
            made = self._by_family[key] = of_family(target, dialled)
        return made

    def _unanswered(self, host: str, namespace: str) -> bool:
        requested = self.requested
        return requested is not None and not requested.answered(self._names.local(host, namespace))

    def exported(self, authority: bytes) -> Target | None:
        """The target that this cluster's gateway serves under this name: a port of an exported
        service of this cluster. The name must include the namespace, because the client has no
        namespace here. UNANSWERED: the meaning of the name is not known."""
        parts = split_authority(authority)
        if parts is not None and self._unanswered(parts[0], ""):
            return UNANSWERED
        service = self._names.find(parts[0], "") if parts is not None else None
        if parts is None or service is None or service.cluster or not service.exported:
            return None
        return service.targets.get(parts[1] or HTTP_PORT)

    @property
    def domain(self) -> str:
        """The domain of this cluster, without a trailing dot."""
        return self._names.domain

    @property
    def endpoint_count(self) -> int:
        """The number of known pods."""
        return len(self.pods)


# The control plane has not said yet where this goes.
UNANSWERED = Target(None, ())
# The control plane does not know which identity this has. It gets no clear text.
UNIDENTIFIED = Target(None, ())


def itself(original: Address) -> Target:
    """The target for exactly this address: one endpoint in clear text."""
    return Target(None, (Endpoint(original),))


def normalised(host: str) -> str:
    """The canonical form of an IP literal, with IPv4-mapped IPv6 as IPv4. Any other text is
    unchanged."""
    try:
        literal = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(literal, ipaddress.IPv6Address) and literal.ipv4_mapped is not None:
        literal = literal.ipv4_mapped
    return str(literal)


def of_family(target: Target, host: str) -> Target:
    """The target with the endpoints of the address family of `host`, as without a proxy: an
    application may listen on that family only. If there is none, all endpoints: the proxy can then
    connect where the application could not. A target of gateways is unchanged, because each gateway
    can reach the service."""
    if target.remote is not None:
        return target
    same = (
        tuple(
            endpoint for endpoint in target.endpoints if endpoint.address.is_ipv6 == (":" in host)
        )
        or target.endpoints
    )
    plan = target.plan
    if plan is not None:
        plan = Plan(
            tuple(
                replace(backend, target=of_family(backend.target, host))
                for backend in plan.backends
            )
        )
    elif len(same) == len(target.endpoints):
        return target
    return replace(target, endpoints=same, plan=plan)
