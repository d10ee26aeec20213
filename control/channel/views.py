"""The contents of entries, computed once for all proxies that see the same.

A topic is an entry that at least one proxy follows. Its content depends on the place of the proxy
only if the service has topology hints or internalTrafficPolicy Local. So nearly all topics have one
content for all proxies, and proxies of one zone or node share the others. The content is encoded
with its frame, and all connections send the same bytes.

A slice may list an address that belongs to no pod. Then the content of this bare address depends on
the namespace of the proxy: the tenant must not change what proxies of other namespaces get.

A topic knows which services and which parts of a place its contents depend on. When one of the
services changes, its contents are dropped, and computed again when a follower is to be sent
something.

Clients send clear text to an address that the mesh does not have. So this answer is withheld in two
cases. While discovery is cut off from the API server, what it does not have may exist: the answer
is given when discovery is current again. That a slice lists the address does not matter, because a
tenant can list any address. And discovery may have facts about the address that are not in its
entries yet: the answer is given after the next flush. The second case also holds for the address of
a pod without a sidecar, which the next pod may have already.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from control.contract import LABEL, Hint, normalised
from control.discovery.catalog import Catalog, Changes
from control.discovery.entries import EndpointEntry, PortEntry, ServiceEntry
from control.discovery.usable_endpoints import NOWHERE, Place, usable
from control.kube.resources import Key
from proxy.directory.channel.messages import Update, frame, version_of
from proxy.directory.channel.views import (
    Content,
    EndpointView,
    PodPort,
    PodView,
    PortView,
    ServiceView,
    UnknownView,
    encode,
)

# Contents of one topic that are kept, by place.
_MOST_VARIANTS = 1024


class Follower(Protocol):
    """A proxy that follows topics."""

    def stale(self, topic: Topic) -> None:
        """The topic may have a new content."""
        ...


@dataclass(frozen=True, slots=True)
class Variant:
    """The content of a topic for some places: its version, and the frame that all of them get.
    `empty`: it is that the mesh does not have the entry. `plain`: a client that connects to the
    address of the topic sends clear text there."""

    version: bytes
    frame: bytes
    empty: bool
    plain: bool


@dataclass(frozen=True, slots=True)
class _Scope:
    """The parts of a place that the contents of a topic depend on."""

    node: bool = False
    zone: bool = False
    namespace: bool = False

    def of(self, place: Place) -> Place:
        """These parts of `place`."""
        if not (self.node or self.zone or self.namespace):
            return NOWHERE
        return Place(
            place.node if self.node else "",
            place.zone if self.zone else "",
            place.namespace if self.namespace else "",
        )


_EVERYWHERE = _Scope()


@dataclass(slots=True, eq=False)
class Topic:
    """One entry. `followers` in order of arrival. `services`: those that the contents depend on.
    `scope` None: not known yet."""

    key: str
    followers: dict[Follower, None] = field(default_factory=dict)
    variants: dict[Place, Variant] = field(default_factory=dict)
    services: tuple[Key, ...] = ()
    scope: _Scope | None = None


class Views:
    """All topics. `computed` counts the contents that were made, for metrics."""

    def __init__(self, catalog: Catalog) -> None:
        self.topics: dict[str, Topic] = {}
        self.computed = 0
        self._catalog = catalog
        # topics by the services that they depend on
        self._dependents: dict[Key, dict[Topic, None]] = {}
        self.is_current: Callable[[], bool] = lambda: True
        self._withheld: dict[Topic, None] = {}  # until discovery is current
        self._settling: dict[Topic, None] = {}  # until its next flush

    def follow(self, key: str, follower: Follower) -> Topic:
        """The topic of a key. Raises ValueError if it is not a key."""
        topic = self.topics.get(key)
        if topic is None:
            _check(key)
            topic = self.topics[key] = Topic(key)
        topic.followers[follower] = None
        return topic

    def unfollow(self, topic: Topic, follower: Follower) -> None:
        """Follow a topic no longer."""
        topic.followers.pop(follower, None)
        if not topic.followers and self.topics.pop(topic.key, None) is not None:
            self._depend_on(topic, ())
            self._withheld.pop(topic, None)
            self._settling.pop(topic, None)

    def is_settling(self, topic: Topic, variant: Variant) -> bool:
        """Whether the answer has to wait for the next flush. Then followers are told."""
        if not variant.plain:
            return False
        kind, _, name = topic.key.partition("/")
        settling = (
            self._catalog.is_settling_service(_service_key(name))
            if kind == "s"
            else self._catalog.is_settling(name)
        )
        if settling:
            self._settling[topic] = None
        return settling

    def withholds(self, topic: Topic, variant: Variant) -> bool:
        """Whether the answer is withheld because discovery is not current. Followers are told when
        it is."""
        if not variant.empty or self.is_current() or self._is_certain(topic.key):
            return False
        self._withheld[topic] = None
        return True

    def answer_withheld(self) -> None:
        """Discovery is current again."""
        withheld, self._withheld = self._withheld, {}
        for topic in withheld:
            self._tell(topic)

    def answer_settled(self) -> None:
        """Discovery has used all facts that it has."""
        settled, self._settling = self._settling, {}
        for topic in settled:
            self._tell(topic)

    def _is_certain(self, key: str) -> bool:
        """Whether discovery knows that an entry is empty, and what it is: a service without ports,
        or a node."""
        kind, _, name = key.partition("/")
        if kind == "s":
            return _service_key(name) in self._catalog.services
        return self._catalog.owner(name) is not None or self._catalog.is_host(name)

    @staticmethod
    def _tell(topic: Topic) -> None:
        topic.variants.clear()
        topic.scope = None
        for follower in topic.followers:
            follower.stale(topic)

    def changed(self, changes: Changes) -> None:
        """Discovery has new entries."""
        found: dict[Topic, None] = {}
        for key, entry in changes.services.items():
            found.update(self._dependents.get(key, {}))
            names = [f"s/{key[0]}/{key[1]}"]
            if entry is not None:
                names += (f"a/{address}" for address in entry.addresses)
                names += (f"a/{endpoint.address}" for endpoint in entry.endpoints)
            found.update((self.topics[name], None) for name in names if name in self.topics)
        for address in (*changes.pods, *changes.unknown):
            if (topic := self.topics.get(f"a/{address}")) is not None:
                found[topic] = None
        for topic in found:
            self._tell(topic)

    def variant(self, topic: Topic, place: Place) -> Variant:
        """The content of a topic for a proxy at `place`."""
        if topic.scope is None:
            topic.scope = self._scope(topic)
        place = topic.scope.of(place)
        variant = topic.variants.get(place)
        if variant is None:
            if len(topic.variants) >= _MOST_VARIANTS:  # also places of proxies that are gone
                topic.variants.clear()
            variant = topic.variants[place] = self._encoded(topic, self._content(topic, place))
        return variant

    def _encoded(self, topic: Topic, content: Content | None) -> Variant:
        self.computed += 1
        data = encode(content) if content is not None else b""
        version = version_of(data)
        # Two places may see the same although the rules for them differ.
        for other in topic.variants.values():
            if other.version == version:
                return other
        empty = content is None
        plain = empty or (isinstance(content, PodView) and not content.identity)
        return Variant(version, frame(Update(topic.key, version, data)), empty, plain)

    def _scope(self, topic: Topic) -> _Scope:
        """The parts of a place that the contents depend on. Also notes the services."""
        kind, _, name = topic.key.partition("/")
        if kind == "s":
            key = _service_key(name)
            self._depend_on(topic, (key,))
            entry = self._catalog.services.get(key)
            return _scope_of(entry) if entry is not None else _EVERYWHERE
        owner = self._catalog.owner(name)
        if owner is not None:
            self._depend_on(topic, (owner.key,))
            return _scope_of(owner)
        listed = list(self._catalog.listing(name))
        self._depend_on(topic, [entry.key for entry in listed])
        outside = any(endpoint.outside for _, endpoint in _at(name, listed))
        return _Scope(namespace=outside or name in self._catalog.unknown)

    def _content(self, topic: Topic, place: Place) -> Content | None:
        kind, _, name = topic.key.partition("/")
        if kind == "s":
            return self._service(self._catalog.services.get(_service_key(name)), place)
        owner = self._catalog.owner(name)
        return self._service(owner, place) if owner is not None else self._pod(name, place)

    def _depend_on(self, topic: Topic, keys: Iterable[Key]) -> None:
        for key in topic.services:
            topics = self._dependents.get(key)
            if topics is not None:
                topics.pop(topic, None)
                if not topics:
                    del self._dependents[key]
        topic.services = tuple(keys)
        for key in topic.services:
            self._dependents.setdefault(key, {})[topic] = None

    @staticmethod
    def _service(entry: ServiceEntry | None, place: Place) -> ServiceView | None:
        return service_view(entry, place) if entry is not None and entry.ports else None

    def _pod(self, address: str, place: Place) -> PodView | UnknownView | None:
        namespace = place.namespace
        pod = self._catalog.pods.get(address)
        unknown = self._catalog.unknown.get(address)
        if unknown is not None:
            here = namespace in unknown.pending or namespace in unknown.refused
            if here or unknown.everywhere:
                soon = bool(unknown.pending) and namespace not in unknown.refused
                return UnknownView(pending=soon)
        found = [
            (entry, endpoint)
            for entry, endpoint in _at(address, self._catalog.listing(address))
            if not endpoint.outside or entry.key[0] == namespace
        ]
        if pod is None and not found:
            return None
        known = pod or found[0][1]
        identity = str(known.identity) if known.identity is not None else ""
        ports = tuple(_pod_ports(found))
        skipped = tuple(sorted(known.skip_ports)) if identity else ()
        vouched = pod is not None or not found[0][1].outside
        return PodView(address, identity, skipped, known.zone, ports, vouched)


def _service_key(name: str) -> Key:
    namespace, _, service = name.partition("/")
    return namespace, service


def _at(
    address: str, listed: Iterable[ServiceEntry]
) -> Iterator[tuple[ServiceEntry, EndpointEntry]]:
    """The endpoints with this address."""
    for entry in listed:
        endpoint = entry.endpoint(address)
        if endpoint is not None:
            yield entry, endpoint


def _check(key: str) -> None:
    """Raises ValueError if it is not the key of an entry."""
    kind, _, name = key.partition("/")
    if kind == "a" and normalised(name) == name and "%" not in name:
        ipaddress.ip_address(name)
    elif kind != "s" or name.count("/") != 1 or not all(map(LABEL.match, name.split("/"))):
        raise ValueError(f"{key!r} is not a key")


def _scope_of(entry: ServiceEntry) -> _Scope:
    """What decides which endpoints of a service may be used."""
    if entry.local:
        return _Scope(node=True)
    return _Scope(
        any(endpoint.nodes for endpoint in entry.endpoints),
        any(endpoint.zones for endpoint in entry.endpoints),
    )


def service_view(entry: ServiceEntry, place: Place) -> ServiceView:
    """A service as proxies at `place` see it."""
    may = usable(entry, place)
    identities: dict[str, int] = {}
    skipped: dict[tuple[int, ...], int] = {}
    usual = {port.port: port.target for port in entry.ports}
    endpoints = tuple(
        _endpoint(endpoint, usual, ready=endpoint.address in may, tables=(identities, skipped))
        for endpoint in entry.endpoints
    )
    return ServiceView(
        entry.key[0],
        entry.key[1],
        entry.addresses,
        tuple(PortView(port.port, port.target, port.protocol) for port in entry.ports),
        tuple(identities),
        tuple(skipped),
        endpoints,
        entry.exported,
    )


def _endpoint(
    endpoint: EndpointEntry,
    usual: dict[int, int],
    *,
    ready: bool,
    tables: tuple[dict[str, int], dict[tuple[int, ...], int]],
) -> EndpointView:
    identities, skipped = tables
    identity = skip_ports = -1
    if endpoint.identity is not None:
        identity = identities.setdefault(str(endpoint.identity), len(identities))
        skip_ports = skipped.setdefault(tuple(sorted(endpoint.skip_ports)), len(skipped))
    served = dict(endpoint.ports)
    ports = tuple(
        (port, served.get(port, 0)) for port, target in usual.items() if served.get(port) != target
    )
    return EndpointView(
        endpoint.address, identity, skip_ports, ports, ready, endpoint.zone, not endpoint.outside
    )


def _pod_ports(found: Iterable[tuple[ServiceEntry, EndpointEntry]]) -> Iterator[PodPort]:
    """The ports of a pod that services use. If several use one, none of them is meant."""
    claims: dict[int, list[tuple[str, Hint]]] = {}
    for entry, endpoint in found:
        hints = {port.port: port for port in entry.ports}
        for port, own in endpoint.ports:
            known: PortEntry | None = hints.get(port)
            if known is not None:
                claims.setdefault(own, []).append(("/".join(entry.key), known.protocol))
    for own, claim in sorted(claims.items()):
        services, protocols = {name for name, _ in claim}, {hint for _, hint in claim}
        one = len(services) == 1 and len(protocols) == 1
        hint = claim[0][1] if len(protocols) == 1 else Hint.DETECT
        yield PodPort(own, hint, claim[0][0] if one else "")
