"""Finds what a new directory would send in clear text although the current one uses mutual TLS.

A truncated directory file can be valid and shorter. If it ends before `identity:`, a meshed
endpoint loses its identity. If it ends between two services, the second is missing, and connections
to it would go to their original destination in clear text. A generator that has lost its input
writes `services: []`. So the proxy compares the new directory with the current one. It
distinguishes everyday changes from changes that only accidents cause:

    an address that had an identity is still there, without it                        refused
    a port of such an address is now in `skip_ports`                                  refused
    a port of a service whose endpoints all had identities has one without            refused
    a cluster address of such a service belongs to a service with endpoints without   refused
    services with identities are missing, at least the fraction `max_loss`            refused
    other services with identities are missing                                        accepted
    endpoints of a service are missing, even all of them                              accepted

Connections to a service without endpoints fail. A document permits what would be refused if it
names it (`allow_identity_loss`). The proxy remembers what it accepted without permission
(proxy/directory/former_identities.py): for a while it sends no clear text to the missing
addresses. The log names missing services, and a counter counts them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from proxy.directory.snapshot import Directory, Pod, Service, Target
from proxy.net.address import Address

# Maximum number of names in one sentence.
_NAMED = 5
# Maximum number of sentences in one refusal.
_MOST_SAID = 20


@dataclass(frozen=True, slots=True)
class Former:
    """The identity and the services that an address had. `in_place`: the directory still has the
    address, without the identity."""

    identity: str
    services: frozenset[str]
    skip_ports: frozenset[int] = frozenset()
    in_place: bool = False


@dataclass(frozen=True, slots=True)
class Downgrades:
    """The result of a comparison. `refusals`: reasons to refuse the new directory, as sentences. If
    there are none, it is accepted. `former`: addresses that are missing in the new directory, or
    have lost their identity without permission. The keys are the hosts of pods and the cluster
    addresses of services. Services without endpoints are included, because they may leave next.
    `missing`: services with identities that are missing without permission."""

    refusals: tuple[str, ...] = ()
    former: Mapping[str | Address, Former] = field(default_factory=dict)
    missing: tuple[str, ...] = ()


def compare(old: Directory, new: Directory, max_loss: float) -> Downgrades:
    """Compare two directories. `max_loss`: refuse if this fraction of the services with identities
    is missing. The time is proportional to the size of both."""
    comparison = _Comparison(old, new)
    refusals = comparison.refusals(max_loss) if not new.allowance.everything else []
    more = [f"and {len(refusals) - _MOST_SAID} more"] if len(refusals) > _MOST_SAID else []
    if refusals:
        return Downgrades((*refusals[:_MOST_SAID], *more))
    return Downgrades((), comparison.former(), comparison.missing())


class _Comparison:
    def __init__(self, old: Directory, new: Directory) -> None:
        self._old = old
        self._new = new
        self._allows = new.allowance.covers
        self._after = {service.qualified: service for service in new.services}
        self._memberships: dict[str, set[str]] | None = None
        self._named: set[str] = set()  # hosts that a sentence already names

    def refusals(self, max_loss: float) -> list[str]:
        return [*self._pods(), *self._services(), *self._cluster_addresses(), *self._gone(max_loss)]

    def former(self) -> dict[str | Address, Former]:
        found: dict[str | Address, Former] = {}
        for host, pod in self._meshed_pods():
            after = self._new.pods.get(host)
            if (after is None or after.endpoint.identity is None) and not self._allows(
                (host, *self._services_of(host))
            ):
                found[host] = Former(
                    str(pod.endpoint.identity), frozenset(self._services_of(host)), pod.skip_ports
                )
        for address, target in self._old.clustered.items():
            identity, service = _identity(target), target.service or ""
            if (
                identity
                and not _leads_somewhere(self._new.clustered.get(address))
                and not self._allows((address.host, service))
            ):
                found[address] = Former(identity, frozenset((service,)))
        return found

    def _meshed_pods(self) -> Iterator[tuple[str, Pod]]:
        return (
            (host, pod) for host, pod in self._old.pods.items() if pod.endpoint.identity is not None
        )

    def _services_of(self, host: str) -> set[str]:
        """The services that a pod belonged to. The first call builds an index of all services."""
        if self._memberships is None:
            self._memberships = {}
            for service in self._old.services:
                for member in _hosts(service):
                    self._memberships.setdefault(member, set()).add(service.qualified)
        return self._memberships.get(host, set())

    def _pods(self) -> Iterator[str]:
        for host, pod in self._meshed_pods():
            after = self._new.pods.get(host)
            if after is None:
                continue
            skipped = after.skip_ports - pod.skip_ports
            if after.endpoint.identity is not None and not skipped:
                continue
            if not self._allows((host, *self._services_of(host))):
                self._named.add(host)
                who = f"{host} had the identity {pod.endpoint.identity}"
                yield (
                    f"{who} and has none"
                    if after.endpoint.identity is None
                    else f"{who} at {sorted(skipped)}, now in skip_ports"
                )

    def _services(self) -> Iterator[str]:
        for service in self._old.services:
            after = self._after.get(service.qualified)
            for host in sorted(self._plain(service, after)) if after is not None else ():
                if not self._allows((host, service.qualified)):
                    yield (
                        f"all endpoints of {service.qualified} had identities, and {host} has none"
                    )

    def _plain(self, service: Service, after: Service) -> set[str]:
        """The hosts without an identity at a port of a service whose endpoints all had identities,
        except those that a sentence already names."""
        found = set()
        for port, target in service.targets.items():
            if (
                target.endpoints
                and all(endpoint.identity for endpoint in target.endpoints)
                and port in after.targets
            ):
                plain = {
                    endpoint.address.host
                    for endpoint in after.targets[port].endpoints
                    if endpoint.identity is None
                }
                found |= plain - self._named
        return found

    def _cluster_addresses(self) -> Iterator[str]:
        for address, target in self._old.clustered.items():
            after = self._new.clustered.get(address)
            if (
                after is None
                or after.service == target.service
                or not all(endpoint.identity for endpoint in target.endpoints)
            ):
                continue
            plain = next(
                (
                    endpoint.address.host
                    for endpoint in after.endpoints
                    if endpoint.identity is None
                ),
                None,
            )
            if (
                _identity(target)
                and plain
                and not self._allows(
                    (address.host, plain, target.service or "", after.service or "")
                )
            ):
                yield (
                    f"{address} was {target.service}, whose endpoints had identities, and is"
                    f" {after.service}, where {plain} has none"
                )

    def _meshed(self) -> list[str]:
        return [
            service.qualified
            for service in self._old.services
            if any(map(_identity, service.targets.values()))
        ]

    def missing(self) -> tuple[str, ...]:
        return tuple(
            name for name in self._meshed() if name not in self._after and not self._allows((name,))
        )

    def _gone(self, max_loss: float) -> Iterator[str]:
        meshed, gone = self._meshed(), self.missing()
        if gone and len(gone) >= max_loss * len(meshed):
            more = f" and {len(gone) - _NAMED} more" if len(gone) > _NAMED else ""
            yield (
                f"{len(gone)} of {len(meshed)} services with identities are missing"
                f" ({', '.join(gone[:_NAMED])}{more})"
            )


def _hosts(service: Service) -> set[str]:
    """The hosts of a service's endpoints. Each of its ports has the same ones."""
    target = next(iter(service.targets.values()), None)
    return (
        {endpoint.address.host for endpoint in target.endpoints}
        if target is not None and target.remote is None
        else set()
    )


def _leads_somewhere(target: Target | None) -> bool:
    return target is not None and bool(target.endpoints or target.plan is not None)


def _identity(target: Target) -> str:
    """An identity through which a target is reached, directly or through another cluster. "": it is
    reached in clear text, or has no endpoint."""
    for place in (
        target,
        *(backend.target for backend in (target.plan.backends if target.plan is not None else ())),
    ):
        if place.remote is not None:
            return f"a gateway of {place.remote.cluster}"
        for endpoint in place.endpoints:
            if endpoint.identity is not None:
                return str(endpoint.identity)
    return ""
