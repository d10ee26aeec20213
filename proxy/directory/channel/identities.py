"""Which addresses have an identity in the known entries, and which of them lose it by a change.

An address may be in several entries: in a service's under its cluster address and under its name,
in another service's, and in its own. It has left when the last of them no longer has it. An
endpoint without an identity in an entry that gave it one has lost it in place, whatever the others
say.

The cluster address of a service keeps its identity while the service has no endpoints: connections
to it fail, and the identity must still be known when the service leaves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from proxy.directory.channel.views import Content, EndpointView, PodView, ServiceView
from proxy.directory.downgrades import Former
from proxy.net.address import Address

Known = dict[str | Address, Former]

_NO_PORTS: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class IdentityChange:
    """See assembly.Losses."""

    former: Mapping[str | Address, Former]
    meshed: frozenset[str]
    plain: frozenset[str]


class Identities:
    """The identities in the known entries, by key."""

    def __init__(self) -> None:
        self._known: dict[str, Known] = {}
        self._entries: Counter[str | Address] = Counter()  # that have the address

    def apply(self, contents: Mapping[str, Content | None]) -> IdentityChange:
        """Use these contents from now on."""
        gone: Known = {}
        lost: Known = {}
        meshed: set[str] = set()
        plain: set[str] = set()
        for key, view in contents.items():
            before = self._known.get(key, {})
            after, stated, pods = _identities(key, view, before)
            self._replace(key, before, after)
            for what in before.keys() - after.keys():
                if what not in stated:
                    gone[what] = before[what]
                elif isinstance(what, str):
                    lost[what] = replace(before[what], in_place=True)
            lost |= _skipped(before, after)
            meshed.update(what for what in after if isinstance(what, str))
            plain |= pods - after.keys()
        former = {what: entry for what, entry in gone.items() if what not in self._entries}
        return IdentityChange(former | lost, frozenset(meshed), frozenset(plain))

    def drop(self, keys: Collection[str]) -> Known:
        """Forget these entries. Returns the addresses that no other entry has."""
        dropped: Known = {}
        for key in keys:
            before = self._known.get(key, {})
            self._replace(key, before, {})
            dropped |= before
        return {what: entry for what, entry in dropped.items() if what not in self._entries}

    def count(self, key: str) -> int:
        """The number of addresses with an identity in an entry."""
        return len(self._known.get(key, ()))

    def losing(self, contents: Mapping[str, Content | None]) -> dict[str, int]:
        """The entries in `contents` that have fewer addresses with an identity now: how many."""
        found = {}
        for key, view in contents.items():
            before = self._known.get(key)
            if before:
                after, _, _ = _identities(key, view, before)
                count = len(before.keys() - after.keys()) + len(_skipped(before, after))
                if count:
                    found[key] = count
        return found

    def services(self, keys: Iterable[str]) -> frozenset[str]:
        """The services with identities that these entries are about."""
        found: set[str] = set()
        for key in keys:
            kind, _, name = key.partition("/")
            known = self._known.get(key, {})
            if kind == "s":
                found.update((name,) if known else ())
                continue
            for what in reversed(known):  # cluster addresses come last
                if not isinstance(what, Address):
                    break
                found |= known[what].services
        return frozenset(found)

    def _replace(self, key: str, before: Known, after: Known) -> None:
        for what in before.keys() - after.keys():
            self._entries[what] -= 1
            if not self._entries[what]:
                del self._entries[what]
        for what in after.keys() - before.keys():
            self._entries[what] += 1
        if after:
            self._known[key] = after
        else:
            self._known.pop(key, None)


def _identities(
    key: str, view: Content | None, before: Known
) -> tuple[Known, set[str | Address], set[str]]:
    """The addresses with an identity in a content, all that the content is about, and the hosts
    that belong to a pod by it."""
    kind, _, name = key.partition("/")
    if isinstance(view, PodView):
        services = frozenset(port.service for port in view.ports if port.service)
        skipped = frozenset(view.skip_ports)
        found: Known = {name: Former(view.identity, services, skipped)} if view.identity else {}
        return found, {name}, {name} if view.pod else set()
    if not isinstance(view, ServiceView):
        return {}, set(), set()
    found = _endpoints(view)
    stated: set[str | Address] = {endpoint.address for endpoint in view.endpoints}
    service = frozenset((f"{view.namespace}/{view.name}",))
    for port in view.ports:
        identity, served = _identity_of_port(view, port.port, port.target)
        for host in (name,) if kind == "a" else view.addresses:
            address = Address(host, port.port)
            stated.add(address)
            if identity:
                found[address] = Former(identity, service)
            elif not served and address in before:
                found[address] = before[address]
    return found, stated, {endpoint.address for endpoint in view.endpoints if endpoint.pod}


def _endpoints(view: ServiceView) -> Known:
    service = frozenset((f"{view.namespace}/{view.name}",))
    made: dict[tuple[int, int], Former] = {}
    found: Known = {}
    for endpoint in view.endpoints:
        if endpoint.identity >= 0:
            row = endpoint.identity, endpoint.skip_ports
            former = made.get(row)
            if former is None:
                former = made[row] = Former(
                    view.identities[endpoint.identity], service, _skip_ports(view, endpoint)
                )
            found[endpoint.address] = former
    return found


def _skip_ports(view: ServiceView, endpoint: EndpointView) -> frozenset[int]:
    return (
        frozenset(view.skip_ports[endpoint.skip_ports]) if endpoint.skip_ports >= 0 else _NO_PORTS
    )


def _identity_of_port(view: ServiceView, port: int, usual: int) -> tuple[str, bool]:
    """An identity through which a port of a service is reached, or "", and whether an endpoint
    serves the port."""
    served = False
    for endpoint in view.endpoints:
        number = dict(endpoint.ports).get(port, usual) if endpoint.ports else usual
        served = served or number > 0
        if number and endpoint.identity >= 0 and number not in _skip_ports(view, endpoint):
            return view.identities[endpoint.identity], True
    return "", served


def _skipped(before: Known, after: Known) -> Known:
    """The ports of hosts at which the identity does not apply any more."""
    found: Known = {}
    for host in before.keys() & after.keys():
        had, has = before[host], after[host]
        if isinstance(host, str) and had.skip_ports != has.skip_ports:
            for port in has.skip_ports - had.skip_ports:
                found[Address(host, port)] = Former(
                    had.identity, had.services, frozenset(), in_place=True
                )
    return found
