"""The contents of entries, computed once for all proxies that see the same.

A topic is an entry that at least one proxy follows. Its content depends on the place of the proxy
only if the service has topology hints or internalTrafficPolicy Local. So nearly all topics have one
content for all proxies, and proxies of one zone or node share the others. The content is encoded
with its frame, and all connections send the same bytes.

A slice may list an address that belongs to no pod. Then the content of this bare address depends on
the namespace of the proxy: the tenant must not change what proxies of other namespaces get.

A topic knows which services its contents depend on. When one of them changes, its contents are
dropped, and computed again when a follower is to be sent something.

While discovery is cut off from the API server, what it does not have may exist. So such an answer
is withheld, and given when discovery is current again.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from control.contract import LABEL, Hint, normalised
from control.discovery.catalog import Catalog, Changes
from control.discovery.entries import EndpointEntry, PortEntry, ServiceEntry
from control.discovery.usable_endpoints import Place, usable
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
    """The content of a topic for some places: its version, and the frame that all of them get."""

    version: bytes
    frame: bytes


@dataclass(slots=True, eq=False)
class Topic:
    """One entry. `followers` in order of arrival. `services`: those that the contents depend on."""

    key: str
    followers: dict[Follower, None] = field(default_factory=dict)
    variants: dict[Place, Variant] = field(default_factory=dict)
    services: tuple[Key, ...] = ()


class Views:
    """All topics. `computed` counts the contents that were made, for metrics."""

    def __init__(self, catalog: Catalog) -> None:
        self.topics: dict[str, Topic] = {}
        self.computed = 0
        self._catalog = catalog
        # topics by the services that they depend on
        self._dependents: dict[Key, dict[Topic, None]] = {}
        self.is_current: Callable[[], bool] = lambda: True
        self._withheld: dict[Topic, None] = {}

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

    def withholds(self, topic: Topic) -> bool:
        """Whether the answer is withheld now. Its followers are told when it is known."""
        if self.is_current() or self._exists(topic.key):
            return False
        self._withheld[topic] = None
        return True

    def answer_withheld(self) -> None:
        """Discovery is current again."""
        withheld, self._withheld = self._withheld, {}
        for topic in withheld:
            self._tell(topic)

    def _exists(self, key: str) -> bool:
        """Whether discovery knows something about an entry, even that it is not in the mesh."""
        kind, _, name = key.partition("/")
        catalog = self._catalog
        if kind == "s":
            namespace, _, service = name.partition("/")
            return (namespace, service) in catalog.services
        return (
            name in catalog.pods
            or name in catalog.unknown
            or catalog.owner(name) is not None
            or catalog.holder(name) is not None
            or any(True for _ in catalog.listing(name))
        )

    @staticmethod
    def _tell(topic: Topic) -> None:
        topic.variants.clear()
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
        place = self._seen_from(topic, place)
        variant = topic.variants.get(place)
        if variant is None:
            if len(topic.variants) >= _MOST_VARIANTS:  # also places of proxies that are gone
                topic.variants.clear()
            content, sort = self._content(topic, place)
            variant = topic.variants.get(sort)
            if variant is None:
                variant = topic.variants[sort] = self._encoded(topic, content)
            topic.variants[place] = variant
        return variant

    def _encoded(self, topic: Topic, content: Content | None) -> Variant:
        self.computed += 1
        data = encode(content) if content is not None else b""
        version = version_of(data)
        # Two places may see the same although the rules for them differ.
        for other in topic.variants.values():
            if other.version == version:
                return other
        return Variant(version, frame(Update(topic.key, version, data)))

    def _content(self, topic: Topic, place: Place) -> tuple[Content | None, Place]:
        """The content, and the part of the place that it depends on."""
        kind, _, name = topic.key.partition("/")
        if kind == "s":
            namespace, _, service = name.partition("/")
            key = (namespace, service)
            self._depend_on(topic, (key,))
            entry = self._catalog.services.get(key)
            return self._service(entry, place)
        owner = self._catalog.owner(name)
        if owner is not None:
            self._depend_on(topic, (owner.key,))
            return self._service(owner, place)
        listed = list(self._catalog.listing(name))
        self._depend_on(topic, [entry.key for entry in listed])
        return self._pod(name, listed, place)

    def _seen_from(self, topic: Topic, place: Place) -> Place:
        """The part of a place that a content of this topic may depend on."""
        kind, _, name = topic.key.partition("/")
        if kind == "a" and self._catalog.owner(name) is None:
            return Place(namespace=place.namespace)
        return Place(place.node, place.zone)

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
    def _service(entry: ServiceEntry | None, place: Place) -> tuple[Content | None, Place]:
        if entry is None or not entry.ports:
            return None, Place()
        sort = relevant(entry, place)
        return service_view(entry, sort), sort

    def _pod(
        self, address: str, listed: Sequence[ServiceEntry], place: Place
    ) -> tuple[PodView | UnknownView | None, Place]:
        namespace = place.namespace
        pod = self._catalog.pods.get(address)
        unknown = self._catalog.unknown.get(address)
        every = [
            (entry, endpoint)
            for entry in listed
            for endpoint in entry.endpoints
            if endpoint.address == address
        ]
        found = [
            (entry, endpoint)
            for entry, endpoint in every
            if not endpoint.outside or entry.key[0] == namespace
        ]
        same_for_all = len(every) == len(found) and not any(end.outside for _, end in every)
        sort = Place() if same_for_all and unknown is None else place
        if unknown is not None:
            here = namespace in unknown.pending or namespace in unknown.refused
            if here or unknown.everywhere:
                soon = bool(unknown.pending) and namespace not in unknown.refused
                return UnknownView(pending=soon), sort
        if pod is None and not found:
            return None, sort
        known = pod or found[0][1]
        identity = str(known.identity) if known.identity is not None else ""
        ports = tuple(_pod_ports(found))
        skipped = tuple(sorted(known.skip_ports)) if identity else ()
        vouched = pod is not None or not found[0][1].outside
        return PodView(address, identity, skipped, known.zone, ports, vouched), sort


def _check(key: str) -> None:
    """Raises ValueError if it is not the key of an entry."""
    kind, _, name = key.partition("/")
    if kind == "a" and normalised(name) == name and "%" not in name:
        ipaddress.ip_address(name)
    elif kind != "s" or name.count("/") != 1 or not all(map(LABEL.match, name.split("/"))):
        raise ValueError(f"{key!r} is not a key")


def relevant(entry: ServiceEntry, place: Place) -> Place:
    """The part of a place that decides which endpoints of a service may be used there."""
    if entry.local:
        return Place(place.node)
    node = place.node if any(endpoint.nodes for endpoint in entry.endpoints) else ""
    zone = place.zone if any(endpoint.zones for endpoint in entry.endpoints) else ""
    return Place(node, zone)


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
