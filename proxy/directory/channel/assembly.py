"""The known entries as a snapshot of the directory.

Each answer makes a new snapshot. It shares everything that has not changed with the one before:
the indexes are copied, which takes microseconds for the entries of one proxy, and only the changed
entries are built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from proxy.directory.channel.views import Content, PodView, ServiceView, pod_of, service_of
from proxy.directory.downgrades import Former
from proxy.directory.service_names import ServiceNames
from proxy.directory.snapshot import Asked, Directory, Pod, Service, Target, of_family
from proxy.net.address import Address


@dataclass(frozen=True, slots=True)
class Losses:
    """What a new snapshot no longer has: `former`, addresses that had an identity; and what it now
    has without one on the control plane's word, `plain`."""

    former: Mapping[str | Address, Former]
    plain: frozenset[str]


class Assembly:
    """Builds snapshots. `current` is the newest."""

    def __init__(self) -> None:
        self.asked = Asked()
        self.domain = "cluster.local"
        self.current = Directory(asked=self.asked)
        self._addresses: dict[str, list[Address]] = {}  # by key: those in `clustered` or `served`
        self._services: dict[str, Service] = {}  # by key
        self._named: dict[str, Service] = {}  # "name.namespace"

    def apply(self, contents: Mapping[str, Content | None]) -> Losses:
        """Use these entries from now on. None: the mesh does not have it."""
        old = self.current
        clustered, served, pods = dict(old.clustered), dict(old.served), dict(old.pods)
        touched: list[str] = []
        for key, view in contents.items():
            kind, _, name = key.partition("/")
            if kind == "a":
                touched.append(name)
                self._forget(key, name, clustered, served, pods)
                self._put(key, name, view, (clustered, served, pods))
            else:
                self._name(name, view)
        self._publish(clustered, served, pods)
        return self._losses(old, touched)

    def drop(self, keys: list[str]) -> None:
        """These entries are unknown from now on."""
        old = self.current
        clustered, served, pods = dict(old.clustered), dict(old.served), dict(old.pods)
        for key in keys:
            kind, _, name = key.partition("/")
            if kind == "a":
                self.asked.hosts.discard(name)
                self._forget(key, name, clustered, served, pods)
            else:
                self._named.pop(_short(name), None)
                self.asked.names.discard(_short(name))
        self._publish(clustered, served, pods)

    def removed_identities(self, contents: Mapping[str, Content | None]) -> frozenset[str]:
        """The keys in `contents` that are not part of the mesh any more, and had an identity."""
        return frozenset(
            key
            for key, view in contents.items()
            if view is None
            and (key in self._services or key.partition("/")[2] in self.current.pods)
        )

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
        self.asked.hosts.discard(host)
        if isinstance(view, ServiceView):
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
        self.asked.names.add(short)
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
            asked=self.asked,
        )

    def _losses(self, old: Directory, hosts: list[str]) -> Losses:
        new = self.current
        former: dict[str | Address, Former] = {}
        plain = set()
        for host in hosts:
            before, after = old.pods.get(host), new.pods.get(host)
            if after is not None and after.endpoint.identity is None:
                plain.add(host)
            if before is not None and before.endpoint.identity is not None and after is None:
                former[host] = Former(str(before.endpoint.identity), frozenset(), before.skip_ports)
        touched = set(hosts)
        for address, target in old.clustered.items():
            if address.host in touched and address not in new.clustered:
                identity = next(
                    (str(end.identity) for end in target.endpoints if end.identity is not None), ""
                )
                if identity:
                    former[address] = Former(identity, frozenset((target.service or "",)))
        return Losses(former, frozenset(plain))


def _short(name: str) -> str:
    """ "name.namespace" of "namespace/name"."""
    namespace, _, service = name.partition("/")
    return f"{service}.{namespace}"
