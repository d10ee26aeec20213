"""All facts and the entries that they make, updated incrementally by key.

A fact that comes, changes or goes makes some services stale: its own service, the services with
endpoints at its addresses, and the services that share an address with it. `flush` recomputes the
entries of stale services and returns those that are different now. The order in which facts come
does not matter: a slice may come before its service, and an endpoint before its pod.

Addresses are indexed by their holders: pods by their addresses, services by their cluster
addresses, slices by the addresses of their endpoints. Pods on the host network have the address of
their node and do not count as its holder. While an address moves, two objects may have it. Then the
newer one is its holder.

Addresses outside. A slice may list any address, also one that belongs to no pod: a database, or
8.8.8.8. Its tenant may say how clients of its service and of its namespace reach it. Others, who
connect to the bare address for their own reasons, must not notice.

Addresses whose identity is unknown. Slices, Services and pods are watched separately. So a slice
may name a pod that is not known yet, and clients find its address by DNS at once. Such an address
must not look like one that the mesh does not have, or it would get clear text. `unknown` has these
addresses. Connections to them fail for clients of the slice's namespace. For all other clients they
fail only in networks where nothing but pods has addresses. Otherwise a tenant could block any
address, by a slice that names a pod that does not exist. These networks are the cluster's networks
as configured. If none are configured, they are the networks of known pods: /24 for IPv4, /64 for
IPv6.

A slice may also name the next pod at the address of a pod without a sidecar that is gone already.
Then the address is unknown for clients of the slice's namespace, and for all others only if it is
also that of the pod.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from control.contract import SpiffeId, SpiffeIdError, check_trust_domain
from control.discovery.entries import PodEntry, ServiceEntry, UnknownEntry
from control.discovery.facts import PodFact, ServiceFact, SliceFact, Target
from control.discovery.index import Index
from control.discovery.pod_networks import PodNetworks
from control.discovery.resolve import resolve
from control.kube.resources import Key

K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class Changes:
    """What has changed: services by key; pods and unknown identities by address. None: it is
    gone."""

    services: dict[Key, ServiceEntry | None] = field(default_factory=dict)
    pods: dict[str, PodEntry | None] = field(default_factory=dict)
    unknown: dict[str, UnknownEntry | None] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.services or self.pods or self.unknown)


class Catalog:
    """Holds all facts and entries. `services`, `pods` and `unknown` are the entries as of the last
    `flush`. `meshed`: how many of `pods` have an identity. `problems`: what is wrong with services,
    as texts for people. `networks`: of the pods and services of the cluster, as CIDR; empty: they
    are not configured.
    """

    def __init__(self, trust_domain: str, networks: Sequence[str] = ()) -> None:
        """Raises SpiffeIdError if `trust_domain` is not a valid trust domain, ValueError if
        `networks` are not."""
        check_trust_domain(trust_domain)
        self.services: dict[Key, ServiceEntry] = {}
        self.pods: dict[str, PodEntry] = {}
        self.meshed = 0
        self.unknown: dict[str, UnknownEntry] = {}
        self.problems: dict[Key, tuple[str, ...]] = {}
        self.identity = functools.lru_cache(maxsize=4096)(
            functools.partial(_identity, trust_domain)
        )
        self._services: dict[Key, ServiceFact] = {}
        self._slices: dict[Key, SliceFact] = {}
        # The slices of a service, in order of arrival.
        self._parts: dict[Key, dict[Key, None]] = {}
        self._pods: dict[Key, PodFact] = {}
        self._zones: dict[str, str] = {}
        self._holders: Index[Key] = Index()
        self._hosts: Index[Key] = Index()  # pods of the host network
        self._owners: Index[Key] = Index()
        self._listed: Index[Key] = Index()  # slices
        # Slices, by the nodes of their endpoints that have no zone.
        self._unplaced: Index[Key] = Index()
        # Slices, by the addresses of their endpoints that name no pod.
        self._unnamed: Index[Key] = Index()
        # The entries as of the last `flush`, by their cluster addresses, and by their endpoints.
        self._owned: Index[Key] = Index()
        self._serving: Index[Key] = Index()
        # Services, by the pods that their endpoints name but that do not have the endpoint's
        # address: the pod is not known, or has other addresses. And the reverse.
        self._misnamed: Index[Key] = Index()
        self._misnames: dict[Key, tuple[str, ...]] = {}
        self._stale: dict[Key, None] = {}
        self._moved: dict[str, None] = {}
        # Addresses whose meaning has changed: the services that list them are stale.
        self._touched: dict[str, None] = {}
        # `external`, during a flush
        self._externals: dict[tuple[str, str], SpiffeId | None] = {}
        # `_targets`, during a flush
        self._targets_of: dict[Key, dict[str, list[Target | None]]] = {}
        self._networks = PodNetworks(networks)

    @property
    def stale(self) -> bool:
        """Whether `flush` has something to do."""
        return bool(self._stale or self._moved or self._touched)

    def is_settling(self, address: str) -> bool:
        """Whether the next `flush` may change what is known about an address."""
        return address in self._touched or address in self._moved

    def is_settling_service(self, key: Key) -> bool:
        """Whether the next `flush` may change what is known about a service."""
        return key in self._stale

    # Facts that come, change or go (None). The old value is looked up here.

    def service(self, key: Key, fact: ServiceFact | None) -> None:
        """Set or remove a service."""
        before = _swap(self._services, key, fact)
        old, new = (
            before.addresses if before is not None else (),
            fact.addresses if fact is not None else (),
        )
        for address in self._owners.move(key, old, new):
            self._stale.update(dict.fromkeys(self._owners.at(address)))
            self._touch(address)
        if (
            before is not None
            and fact is not None
            and (before.uid, before.created) != (fact.uid, fact.created)
        ):
            self._stale.update(
                (other, None) for address in new for other in self._owners.at(address)
            )
        if (
            before is None
            or fact is None
            or (before.identity, before.identity_unreadable, before.created, before.uid)
            != (fact.identity, fact.identity_unreadable, fact.created, fact.uid)
        ):
            for part in self._parts.get(key, ()):
                self._touch_shared(self._slices[part])
        self._stale[key] = None

    def slice(self, key: Key, fact: SliceFact | None) -> None:
        """Set or remove a slice: a part of a service's endpoints."""
        before = _swap(self._slices, key, fact)
        if before is not None and (fact is None or fact.service != before.service):
            del self._parts[before.service][key]
            if not self._parts[before.service]:
                del self._parts[before.service]
            self._stale[before.service] = None
        if fact is not None:
            self._parts.setdefault(fact.service, {})[key] = None
            self._stale[fact.service] = None
        self._listed.move(key, _addresses(before), _addresses(fact))
        self._unplaced.move(key, _unplaced(before), _unplaced(fact))
        self._unnamed.move(key, _unnamed(before), _unnamed(fact))
        for part in (before, fact):
            if part is not None:
                self._touch_shared(part)

    def pod(self, key: Key, fact: PodFact | None) -> None:
        """Set or remove a pod."""
        before = _swap(self._pods, key, fact)
        self._stale.update(dict.fromkeys(self._misnamed.at("/".join(key))))
        self._holders.move(key, _held(before), _held(fact))
        self._hosts.move(key, _held(before, host=True), _held(fact, host=True))
        for address in self._networks.move(_held(before), _held(fact)):
            self._touch(address)
        for part in (before, fact):
            for address in part.ips if part is not None else ():
                self._touch(address)
                self._moved[address] = None

    def node(self, name: str, zone: str | None) -> None:
        """Set or remove a node's zone."""
        if zone is None:
            self._zones.pop(name, None)
        else:
            self._zones[name] = zone
        for part in self._unplaced.at(name):
            self._stale[self._slices[part].service] = None
        self._moved.update(
            (address, None) for address, entry in self.pods.items() if entry.node == name
        )

    def _touch(self, address: str) -> None:
        """Mark the services that list `address` as stale. The next flush finds them: many slices
        may list an address, and each may change."""
        self._touched[address] = None

    def _touch_shared(self, part: SliceFact) -> None:
        """Mark the services that list one of the slice's addresses as stale."""
        for address in _addresses(part):
            self._touch(address)

    # Entries

    def flush(self) -> Changes:
        """Recompute stale entries. Returns the entries that are different now."""
        changes = Changes()
        touched, self._touched = self._touched, {}
        for address in touched:
            for part in self._listed.at(address):
                self._stale[self._slices[part].service] = None
        stale, self._stale = self._stale, {}
        moved, self._moved = self._moved, {}
        for key in stale:
            entry = self._entry(key)
            if entry != self.services.get(key):
                changes.services[key] = entry
                before = _swap(self.services, key, entry)
                self._owned.move(key, _clustered(before), _clustered(entry))
                served = self._serving.move(key, _served(before), _served(entry))
                fact = self._services.get(key)
                if fact is not None and (fact.identity_unreadable or fact.identity is not None):
                    moved.update(dict.fromkeys(served))
        for address in moved:
            pod = self._pod_entry(address)
            if pod != self.pods.get(address):
                changes.pods[address] = pod
                was = _swap(self.pods, address, pod)
                self.meshed += _is_meshed(pod) - _is_meshed(was)
        for address in {**touched, **moved}:
            unknown = self._unknown_entry(address)
            if unknown != self.unknown.get(address):
                changes.unknown[address] = unknown
                _swap(self.unknown, address, unknown)
                self._networks.note_unknown(address, unknown=unknown is not None)
        self._externals.clear()
        self._targets_of.clear()
        return changes

    def _entry(self, key: Key) -> ServiceEntry | None:
        fact = self._services.get(key)
        if fact is None:
            self.problems.pop(key, None)
            self._set_misnames(key, ())
            return None
        addresses = tuple(address for address in fact.addresses if self._owner(address) == key)
        parts = [self._slices[part] for part in self._parts.get(key, ())]
        self._set_misnames(key, tuple(self._find_misnames(parts)))
        entry, problems = resolve(key, fact, addresses, parts, self)
        _swap(self.problems, key, problems or None)
        return entry

    def _find_misnames(self, parts: Iterable[SliceFact]) -> Iterator[str]:
        for part in parts:
            for endpoint in part.endpoints:
                if endpoint.target is not None:
                    namespace, name, _ = endpoint.target
                    pod = self._pods.get((namespace, name))
                    if pod is None or endpoint.address not in pod.ips:
                        yield f"{namespace}/{name}"

    def _set_misnames(self, key: Key, names: tuple[str, ...]) -> None:
        before = self._misnames.pop(key, ())
        if names:
            self._misnames[key] = names
        self._misnamed.move(key, before, names)

    def _pod_entry(self, address: str) -> PodEntry | None:
        holder = self.holder(address)
        if holder is None:
            return None
        (namespace, _), pod = holder
        if not pod.meshed:
            return PodEntry(address, None, _NO_PORTS, self.zone(pod.node), pod.node)
        identity = self.identity(namespace, pod.account)
        return (
            None
            if identity is None
            else PodEntry(address, identity, pod.skip_ports, self.zone(pod.node), pod.node)
        )

    def _unknown_entry(self, address: str) -> UnknownEntry | None:
        holder = self.holder(address)
        if holder is not None:
            (namespace, name), pod = holder
            if not pod.meshed:
                return self._successor(address, (namespace, name, pod.uid))
            if self.identity(namespace, pod.account) is not None:
                return None
            return UnknownEntry(_NOWHERE, frozenset((namespace,)), everywhere=True)
        if self.is_cluster_address(address):
            return None
        pending: set[str] = set()
        refused: set[str] = set()
        serving = {key[0] for key in self._serving.at(address)}
        for part in self._listed.at(address):
            fact, namespace = self._slices[part], part[0]
            if namespace in pending:
                continue
            service = self._services.get(fact.service)
            wants = service is not None and (
                service.identity_unreadable or service.identity is not None
            )
            for target in self._targets(part)[address]:
                if target is None:
                    if service is None:
                        pending.add(namespace)
                    elif wants and namespace not in serving:
                        refused.add(namespace)
                elif target[0] == namespace and not self.is_host(address):
                    pending.add(namespace)
        if not pending and not refused:
            return None
        named = bool(pending) and self._networks.covers(address)
        return UnknownEntry(frozenset(pending), frozenset(refused), everywhere=named)

    def _successor(self, address: str, holder: Target) -> UnknownEntry | None:
        """Slices name another pod than `holder`, which has the address and no sidecar."""
        pending = {
            part[0]
            for part in self._listed.at(address)
            for target in self._targets(part)[address]
            if target is not None
            and target[0] == part[0]
            and (target[:2] != holder[:2] or target[2] not in ("", holder[2]))
        }
        if not pending:
            return None
        return UnknownEntry(frozenset(pending), _NOWHERE, everywhere=holder[0] in pending)

    def _targets(self, part: Key) -> dict[str, list[Target | None]]:
        """The pods that a slice names at each of its addresses."""
        found = self._targets_of.get(part)
        if found is None:
            found = self._targets_of[part] = {}
            for endpoint in self._slices[part].endpoints:
                found.setdefault(endpoint.address, []).append(endpoint.target)
        return found

    def _owner(self, address: str) -> Key | None:
        """The service that has this cluster address. If several have it, the newest one."""
        return max(
            self._owners.at(address),
            key=lambda key: (self._services[key].created, self._services[key].uid, key),
            default=None,
        )

    # Lookups by address, in the entries as of the last `flush`

    def owner(self, address: str) -> ServiceEntry | None:
        """The service with this cluster address."""
        for key in self._owned.at(address):
            return self.services[key]
        return None

    def listing(self, address: str) -> Iterator[ServiceEntry]:
        """The services with an endpoint at this address, each once, in the order of their keys."""
        for key in sorted(self._serving.at(address)):
            yield self.services[key]

    # Lookups for judge.py (the ClusterView protocol)

    def pod_of(self, key: Key) -> PodFact | None:
        """See judge.ClusterView."""
        return self._pods.get(key)

    def holder(self, address: str) -> tuple[Key, PodFact] | None:
        """See judge.ClusterView."""
        keys = self._holders.at(address)
        if not keys:
            return None
        key = (
            keys[0]
            if len(keys) == 1
            else max(keys, key=lambda key: (self._pods[key].created, self._pods[key].uid, key))
        )
        return key, self._pods[key]

    def is_cluster_address(self, address: str) -> bool:
        """See judge.ClusterView."""
        return bool(self._owners.at(address))

    def is_host(self, address: str) -> bool:
        """See judge.ClusterView."""
        return bool(self._hosts.at(address))

    def external(self, address: str, namespace: str) -> SpiffeId | None:
        """See judge.ClusterView."""
        key = address, namespace
        if key in self._externals:
            return self._externals[key]
        oldest = min(
            self._claims(address, namespace),
            key=lambda service: (service.created, service.uid, str(service.identity)),
            default=None,
        )
        found = self._externals[key] = oldest.identity if oldest is not None else None
        return found

    def _claims(self, address: str, namespace: str) -> Iterator[ServiceFact]:
        """The services of a namespace that list an address without naming a pod."""
        parts = (part for part in self._unnamed.at(address) if part[0] == namespace)
        for key in {self._slices[part].service: None for part in parts}:
            service = self._services.get(key)
            if (
                service is None
                or service.identity_unreadable
                or (service.identity is not None and self.is_host(address))
            ):
                continue
            yield service

    def zone(self, node: str) -> str:
        """See judge.ClusterView."""
        return self._zones.get(node, "")


def _identity(trust_domain: str, namespace: str, account: str) -> SpiffeId | None:
    try:
        return SpiffeId(trust_domain, namespace, account)
    except SpiffeIdError:
        return None


_NOWHERE: frozenset[str] = frozenset()
_NO_PORTS: frozenset[int] = frozenset()


def _is_meshed(pod: PodEntry | None) -> bool:
    return pod is not None and pod.identity is not None


V = TypeVar("V")


def _swap(into: dict[K, V], key: K, value: V | None) -> V | None:
    """Set or remove a value. Returns the old one."""
    before = into.get(key)
    if value is not None:
        into[key] = value
    elif before is not None:
        del into[key]
    return before


def _addresses(fact: SliceFact | None) -> list[str]:
    return [endpoint.address for endpoint in fact.endpoints] if fact is not None else []


def _unnamed(fact: SliceFact | None) -> list[str]:
    return (
        [endpoint.address for endpoint in fact.endpoints if endpoint.target is None]
        if fact is not None
        else []
    )


def _clustered(entry: ServiceEntry | None) -> tuple[str, ...]:
    return entry.addresses if entry is not None else ()


def _served(entry: ServiceEntry | None) -> list[str]:
    return [endpoint.address for endpoint in entry.endpoints] if entry is not None else []


def _unplaced(fact: SliceFact | None) -> list[str]:
    return (
        [endpoint.node for endpoint in fact.endpoints if endpoint.node and not endpoint.zone]
        if fact is not None
        else []
    )


def _held(fact: PodFact | None, *, host: bool = False) -> tuple[str, ...]:
    return fact.ips if fact is not None and fact.host_network is host else ()
