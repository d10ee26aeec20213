"""The known entries as a snapshot of the directory.

Each answer makes a new snapshot. It shares everything that has not changed with the snapshot
before. The indexes are copied, which takes microseconds for the entries of one proxy. Only the
changed entries are built.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from proxy.directory.channel.identities import Identities
from proxy.directory.channel.views import (
    Content,
    PodView,
    ServiceView,
    UnknownView,
    pod_of,
    service_of,
)
from proxy.directory.downgrades import Former
from proxy.directory.service_names import ServiceNames
from proxy.directory.snapshot import Directory, Pod, Requested, Service, Target, of_family
from proxy.net.address import Address


@dataclass(frozen=True, slots=True)
class Losses:
    """What new contents change about identities. `former`: addresses that had an identity, and have
    left or have none now. `services`: those with identities that have left. `meshed` and `plain`:
    hosts that the new contents state with an identity, and pods without one."""

    former: Mapping[str | Address, Former]
    services: frozenset[str]
    meshed: frozenset[str]
    plain: frozenset[str]


class Assembly:
    """Builds snapshots. `current` is the newest."""

    def __init__(self) -> None:
        self.requested = Requested()
        self.domain = "cluster.local"
        self.current = Directory(requested=self.requested)
        self._addresses: dict[str, list[Address]] = {}  # by key: those in `clustered` or `served`
        self._services: dict[str, Service] = {}  # by key
        self._named: dict[str, Service] = {}  # "name.namespace"
        self._identities = Identities()
        self.pending: set[str] = set()  # of `requested.unidentified`: known soon

    def apply(self, contents: Mapping[str, Content | None]) -> Losses:
        """Use these entries from now on. None: the mesh does not have it."""
        old = self.current
        clustered, served, pods = dict(old.clustered), dict(old.served), dict(old.pods)
        with_identities = self._identities.services(contents)
        change = self._identities.apply(contents)
        for key, view in contents.items():
            kind, _, name = key.partition("/")
            if kind == "a":
                self._forget(key, name, clustered, served, pods)
                self._put(key, name, view, (clustered, served, pods))
            else:
                self._name(name, view)
        self._publish(clustered, served, pods)
        left = with_identities.difference(service.qualified for service in self.current.services)
        return Losses(change.former, left, change.meshed, change.plain)

    def drop(self, keys: Collection[str]) -> Mapping[str | Address, Former]:
        """These entries are unknown from now on. Returns the addresses whose last known identity
        was in them."""
        old = self.current
        clustered, served, pods = dict(old.clustered), dict(old.served), dict(old.pods)
        former = self._identities.drop(keys)
        for key in keys:
            kind, _, name = key.partition("/")
            if kind == "a":
                self.requested.hosts.discard(name)
                self.requested.unidentified.discard(name)
                self.pending.discard(name)
                self._forget(key, name, clustered, served, pods)
            else:
                self._named.pop(_short(name), None)
                self.requested.names.discard(_short(name))
        self._publish(clustered, served, pods)
        return former

    def identity_count(self, key: str) -> int:
        """How many addresses `drop` of this entry may return."""
        return self._identities.count(key)

    def losing(self, contents: Mapping[str, Content | None]) -> Mapping[str, int]:
        """The entries in `contents` with which addresses would lose their identity: how many, or a
        few more."""
        return self._identities.losing(contents)

    def rename(self, domain: str) -> None:
        """The domain of the cluster."""
        if domain != self.domain:
            self.domain = domain
            old = self.current
            self._publish(old.clustered, old.served, old.pods)

    def _forget(
        self,
        key: str,
        host: str,
        clustered: dict[Address, Target],
        served: dict[Address, Target],
        pods: dict[str, Pod],
    ) -> None:
        for address in self._addresses.pop(key, ()):
            clustered.pop(address, None)
            served.pop(address, None)
        pods.pop(host, None)
        self._services.pop(key, None)

    def _put(
        self,
        key: str,
        host: str,
        view: Content | None,
        into: tuple[dict[Address, Target], dict[Address, Target], dict[str, Pod]],
    ) -> None:
        clustered, served, pods = into
        self.requested.hosts.discard(host)
        self.requested.unidentified.discard(host)
        self.pending.discard(host)
        if isinstance(view, UnknownView):
            self.requested.unidentified.add(host)
            if view.pending:
                self.pending.add(host)
        elif isinstance(view, ServiceView):
            service = service_of(view)
            found = {
                Address(host, port): of_family(target, host)
                for port, target in service.targets.items()
            }
            clustered.update(found)
            self._services[key] = service
            self._addresses[key] = list(found)
        elif isinstance(view, PodView):
            pod, targets = pod_of(view)
            pods[host] = pod
            served.update(targets)
            self._addresses[key] = list(targets)

    def _name(self, name: str, view: Content | None) -> None:
        short = _short(name)
        self.requested.names.add(short)
        if isinstance(view, ServiceView):
            self._named[short] = service_of(view)
        else:
            self._named.pop(short, None)

    def _publish(
        self,
        clustered: Mapping[Address, Target],
        served: Mapping[Address, Target],
        pods: Mapping[str, Pod],
    ) -> None:
        names: ServiceNames[Service] = ServiceNames(self.domain)
        for service in self._named.values():
            names.add(service.name, service.namespace, service)
        services = {
            service.qualified: service
            for service in (*self._services.values(), *self._named.values())
        }
        self.current = Directory(
            tuple(services.values()),
            clustered=clustered,
            served=served,
            pods=pods,
            _names=names,
            requested=self.requested,
        )


def _short(name: str) -> str:
    """ "name.namespace" of "namespace/name"."""
    namespace, _, service = name.partition("/")
    return f"{service}.{namespace}"
