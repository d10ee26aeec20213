"""What the directory says, as an immutable snapshot, and the two questions that it answers: who serves an address, who has a name.

A snapshot is built whole from one document (reader.py), with every index it needs, and replaced whole by the next one
(proxy/directory/watcher.py): a connection resolves against one consistent world, and no lock is needed.

Three kinds of address are known, and tried in this order:

    a service's cluster address and port    -> the service
    an endpoint's address and target port   -> that one endpoint, with what its service says of the port
    an endpoint's address, any other port   -> that one pod, nothing is said of the protocol

An endpoint's identity holds for each port but those that its proxy does not stand before (`skip_ports`: the admin port, and what
`intercept.skip_inbound_ports` has there). Those are spoken to as they are.

Every other address is the one plain endpoint at exactly that address: it is never replaced by a guess. An endpoint with an
identity is meshed, and is spoken to by mutual TLS only; one without is spoken to as it is.

A target that is reached by way of another cluster is an ordinary one whose endpoints are that cluster's gateways; `remote` says what
a gateway has to be told. A target may have a plan: other places where its requests may go (proxy/routing/router.py decides).
"""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from proxy.directory.policy import DEFAULT_POLICY, Policy
from proxy.directory.service_names import Names, split_authority
from proxy.identity.spiffe import SpiffeId
from proxy.net.address import Address

# RFC 9110 §4.2.1; there is no TLS of the application's in a request that we can read.
HTTP_PORT = 80
# The port of a proxy's probes and metrics, which is never redirected.
ADMIN_PORT = 4191


class Hint(enum.StrEnum):
    """What is known of the protocol before a byte has been seen."""

    HTTP1 = "http1"
    HTTP2 = "http2"
    OPAQUE = "opaque"
    DETECT = "detect"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One place that serves. `identity` None: not meshed, so clear text; otherwise only this peer is accepted there."""

    address: Address
    identity: SpiffeId | None = None
    protocol: Hint = Hint.DETECT
    ready: bool = True
    weight: int = 1
    zone: str = ""

    def __hash__(self) -> int:
        """Connections are kept by endpoint, and looked for by each request. Hardly ever do two have one address."""
        return hash(self.address)


@dataclass(frozen=True, slots=True)
class Pod:
    """One pod: who it is, and on which of its ports it is not. `endpoint` has the port 0."""

    endpoint: Endpoint
    skip_ports: frozenset[int]

    def at(self, address: Address, protocol: Hint = Hint.DETECT) -> Endpoint:
        """The pod at one of its ports: `address` has its host."""
        known = self.endpoint
        identity = None if address.port in self.skip_ports else known.identity
        return Endpoint(address, identity, protocol, known.ready, known.weight, known.zone)


@dataclass(frozen=True, slots=True)
class Remote:
    """A port of a service in another cluster, in the words that its gateway understands."""

    cluster: str
    host: str  # the service's full name there
    port: int

    @property
    def authority(self) -> bytes:
        """For a request: with a port, if it is not HTTP's own."""
        return self.host.encode("ascii") if self.port == HTTP_PORT else self.tunnel

    @property
    def tunnel(self) -> bytes:
        """For CONNECT, which always names the port (RFC 9110 §9.3.6)."""
        return f"{self.host}:{self.port}".encode("ascii")


@dataclass(frozen=True, slots=True)
class Target:
    """Where a connection may go. `service` is "namespace/name", with "cluster/" before it if it is another cluster's, and None for an
    address of no service. No endpoints: nobody serves it."""

    service: str | None
    endpoints: tuple[Endpoint, ...]
    protocol: Hint = Hint.DETECT
    policy: Policy = DEFAULT_POLICY
    remote: Remote | None = None  # the endpoints are gateways
    plan: Plan | None = None


@dataclass(frozen=True, slots=True)
class Backend:
    """One of the services that requests are split between: where it is served, and where else if fewer than `below` of its endpoints
    can be used. Neither target has a plan: a split is not split again."""

    weight: int
    target: Target
    elsewhere: tuple[Target, ...] = ()
    below: int = 1


@dataclass(frozen=True, slots=True)
class Plan:
    """How the requests to a service are shared out. At least one weight is above zero."""

    backends: tuple[Backend, ...]


@dataclass(frozen=True, slots=True)
class Port:
    """A port of a service, and the port on which its endpoints serve it (unless an endpoint says otherwise)."""

    port: int
    target_port: int
    protocol: Hint


@dataclass(frozen=True, slots=True)
class Service:
    """A service, and for each of its ports where a connection to it may go. `cluster` is "" for our own."""

    name: str
    namespace: str
    addresses: tuple[str, ...]
    ports: tuple[Port, ...]
    targets: Mapping[int, Target] = field(repr=False)
    cluster: str = ""
    exported: bool = False  # to the clusters that ask our gateway for it

    @property
    def qualified(self) -> str:
        """Its one name within this snapshot: "namespace/name", with "cluster/" before it for another cluster's."""
        local = f"{self.namespace}/{self.name}"
        return f"{self.cluster}/{local}" if self.cluster else local


@dataclass(frozen=True, slots=True)
class Gateway:
    """A way into another cluster: `host` is an IP literal, or a name that has to be resolved while the proxy runs."""

    host: str
    port: int
    identity: SpiffeId
    literal: bool

    def at(self, host: str) -> Endpoint:
        """The gateway as an endpoint. It is the same for all services behind it, so they share its connections; what is spoken with it
        is what the client speaks, for the directory that knows more is at the other end."""
        return Endpoint(Address(host, self.port), self.identity)


@dataclass(frozen=True, slots=True)
class Cluster:
    """Another cluster: how to get there, and what it exports."""

    name: str
    domain: str
    gateways: tuple[Gateway, ...]
    services: tuple[Service, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a document lets go over to clear text (downgrades.py): everything, or services ("namespace/name") and IP addresses."""

    everything: bool = False
    names: frozenset[str] = frozenset()

    def covers(self, names: Iterable[str]) -> bool:
        """Whether one of `names` may lose its identity."""
        return self.everything or not self.names.isdisjoint(names)


@dataclass(frozen=True, slots=True)
class Directory:
    """A snapshot. Made by `parse`; `Directory()` knows nothing, and resolves every address to itself."""

    services: tuple[Service, ...] = ()
    clusters: Mapping[str, Cluster] = field(default_factory=dict)
    name: str = ""  # of our own cluster; "": the document does not say
    clustered: Mapping[Address, Target] = field(default_factory=dict, repr=False)
    served: Mapping[Address, Target] = field(default_factory=dict, repr=False)
    pods: Mapping[str, Pod] = field(default_factory=dict, repr=False)
    _names: Names[Service] = field(default_factory=Names, repr=False)
    allowance: Allowance = Allowance()
    _by_family: dict[tuple[int, bool], Target] = field(default_factory=dict, repr=False, compare=False)

    def known(self, original: Address) -> Target | None:
        """What the directory says of an address; None: nothing. Takes the same time however much there is to know."""
        target = self.clustered.get(original) or self.served.get(original)
        if target is not None:
            return target
        pod = self.pods.get(original.host)
        if pod is None:
            if original.host.startswith("::ffff:"):
                return self.known(Address(normalised(original.host), original.port))
            return None
        return Target(None, (pod.at(original),))

    def resolve(self, original: Address) -> Target:
        """Where a connection to `original` goes. Never fails."""
        return self.known(original) or itself(original)

    def named(self, host: str, namespace: str) -> Service | None:
        """The service that the name `host` means to a pod of `namespace`: one of our own, or another cluster's. See dns/service.py."""
        return self._names.find(host, namespace)

    def remote(self, cluster: str, namespace: str, name: str) -> Service | None:
        """A service of another cluster."""
        return self._names.remote(name, namespace, cluster)

    def authority(self, authority: bytes, namespace: str, dialled: str) -> Target | None:
        """What a request's authority names, if it names a port of a known service exactly: with the endpoints that have the address
        family of `dialled`, an IP literal, if there are any. One object for each service, port and family."""
        parts = split_authority(authority)
        service = self._names.find(parts[0], namespace) if parts is not None else None
        target = service.targets.get(parts[1] or HTTP_PORT) if parts is not None and service is not None else None
        if target is None:
            return None
        key = id(target), ":" in dialled
        made = self._by_family.get(key)
        if made is None:
            made = self._by_family[key] = of_family(target, dialled)
        return made

    def exported(self, authority: bytes) -> Target | None:
        """What our own gateway may be asked for by this name: a port of a service of our own that is exported. The name has to have its
        namespace, for the one who asks has none here."""
        parts = split_authority(authority)
        service = self._names.find(parts[0], "") if parts is not None else None
        if parts is None or service is None or service.cluster or not service.exported:
            return None
        return service.targets.get(parts[1] or HTTP_PORT)

    @property
    def domain(self) -> str:
        """The domain of our own cluster, without a dot behind it."""
        return self._names.domain

    @property
    def endpoint_count(self) -> int:
        """How many pods are known."""
        return len(self.pods)


def itself(original: Address) -> Target:
    """The one plain endpoint at exactly this address."""
    return Target(None, (Endpoint(original),))


def normalised(host: str) -> str:
    """An IP literal in its one canonical form, IPv4-mapped IPv6 as IPv4; anything else unchanged."""
    try:
        literal = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(literal, ipaddress.IPv6Address) and literal.ipv4_mapped is not None:
        literal = literal.ipv4_mapped
    return str(literal)


def of_family(target: Target, host: str) -> Target:
    """The endpoints of a target that have the address family of `host`, as without a proxy: an application may listen on that one only. All
    of them, if none has it: then a proxy can help that the network could not. Gateways are not asked: any of them will do."""
    if target.remote is not None:
        return target
    same = tuple(endpoint for endpoint in target.endpoints if endpoint.address.is_ipv6 == (":" in host)) or target.endpoints
    plan = target.plan
    if plan is not None:
        plan = Plan(tuple(replace(backend, target=of_family(backend.target, host)) for backend in plan.backends))
    elif len(same) == len(target.endpoints):
        return target
    return replace(target, endpoints=same, plan=plan)
