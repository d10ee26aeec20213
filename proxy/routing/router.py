"""The router: it decides the target of a request or of an opaque connection.

It answers three questions for each request, and for each opaque connection.

*What is the destination?* The address that the application connected to decides: a service's
cluster address, a virtual address, or an endpoint. The authority of a request selects a service
only at two kinds of address. One is the gateway of another cluster, for the services of that
cluster. The other is the networks that the operator configures (`outbound.authority_networks`). All
other traffic goes to its original destination, unchanged. Applications often copy the authority
from an external request, for example reverse proxies that keep the client's Host. If the authority
could select a service at any address, an external client could select internal services, and the
request would arrive there with this pod's identity (docs/decisions/17-address-before-authority.md).

*Which service?* If the service is split, the router draws one of its backends by weight. A backend
without a usable endpoint gets no requests. Its share goes to the others, in proportion to their
weights.

*Where is that service served?* In this cluster, as long as enough of its endpoints are usable.
Otherwise in the first of its failover clusters that has a usable gateway. The service returns to
this cluster when enough of its own endpoints have been usable for `settle` seconds without
interruption. So a service that fails repeatedly does not affect its clients each time. Only a
request can show whether an endpoint has recovered. So during a failover the router sends one
request to this cluster each time a penalty ends (balancing/circuit_breaker.py). If it fails, its
further attempts ask the router again, and go where the others go. The trial has no other effect.

If no endpoint is usable anywhere, the router tries each place as soon as its circuit breakers allow
a trial.

Requests that a gateway received do not pass the router. They go to an endpoint of the gateway's own
cluster (proxy/flows/gateway.py). So a request is split and failed over once each time that an
application sends it, and clusters whose splits name each other cannot send it to and fro.

Nothing here waits. The directory may change between two calls. Each call uses one snapshot."""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

from proxy.directory import (
    UNANSWERED,
    UNIDENTIFIED,
    Backend,
    Directory,
    Endpoint,
    Plan,
    Target,
    itself,
)
from proxy.errors import DirectoryUnavailable, IdentityUnknown, NoEndpoint
from proxy.net.address import Address
from proxy.net.socket_stream import SocketStream
from proxy.net.tls.handshake import TLSStream
from proxy.settings.units import Network


class CurrentDirectory(Protocol):
    """The source of the directory. The snapshot is replaced as a whole, so read it once per
    decision."""

    @property
    def current(self) -> Directory: ...


class Virtual(Protocol):
    """Virtual addresses of services in other clusters (proxy/dns/virtual_addresses.py)."""

    def lookup(self, host: str) -> tuple[str, str, str] | None:
        """(cluster, namespace, name) of the service that an address stands for, or stood for. None:
        the address is not assigned."""
        ...

    def covers(self, host: str) -> bool:
        """Whether an address is in the virtual ranges."""
        ...

    def held(self, host: str) -> AbstractContextManager[None]:
        """While this context is open, the address keeps its current meaning."""
        ...


class KnownGateways(Protocol):
    """The current gateways of other clusters (proxy/routing/remote_gateways.py)."""

    def through(self, target: Target) -> Target:
        """The target with the gateways that are usable now, if it is in another cluster. Otherwise
        `target`."""
        ...

    def why(self, cluster: str) -> str:
        """The reason why no gateway of a cluster is usable."""
        ...

    def cluster(self, address: Address) -> str | None:
        """The cluster whose gateway has this address. None: not a gateway's address."""
        ...

    def connected(self, endpoint: Endpoint, stream: SocketStream | TLSStream) -> None:
        """Register a new connection to `endpoint`, which may be a gateway."""
        ...


class Health(Protocol):
    """The health of endpoints."""

    def usable(self, target: Target) -> int:
        """The number of usable endpoints of a target."""
        ...

    def trial(self, target: Target, *, alone: bool = False) -> bool:
        """Whether a request now would be the trial of an endpoint that was not usable. `alone`: no
        other target is usable either."""
        ...


class RouterMetrics(Protocol):
    """The metrics of the router."""

    def count_remote_attempt(self, cluster: str, why: str) -> None:
        """Count a request or connection that goes through the gateway of another cluster."""
        ...

    def set_failover(self, service: str, away: bool) -> None:
        """Count that a service now fails over to another cluster, or has returned."""
        ...


_NOTHING_HELD = nullcontext()
# An application connects to few destinations, each of them often. The kernel and the configuration
# provide IP literals only.
_literal = lru_cache(maxsize=1024)(ipaddress.ip_address)


@dataclass(slots=True)
class _Absence:
    """A service that has failed over. `back`: the time since when enough of its own endpoints are
    usable again."""

    back: float | None = None


@dataclass(slots=True)
class Router:
    """The router of one proxy. `settle` in seconds of `clock`. `namespace`: the pod's own, for
    short names. `networks`: where the authority may select a service."""

    source: CurrentDirectory
    health: Health
    metrics: RouterMetrics
    namespace: str
    settle: float
    clock: Callable[[], float]
    chance: random.Random = field(default_factory=random.Random)
    virtual: Virtual | None = None
    remote_gateways: KnownGateways | None = None
    networks: Sequence[Network] = ()
    _absences: dict[tuple[str | None, int], _Absence] = field(default_factory=dict, init=False)

    # The destination.

    def find_address(self, original: Address) -> Target | None:
        """The target of an address. None: the directory does not have the address. UNANSWERED and
        UNIDENTIFIED: see Directory.find_address."""
        directory = self.source.current
        target = directory.find_address(original)
        virtual = self.virtual
        if target is not None or virtual is None or not virtual.covers(original.host):
            return target
        name = virtual.lookup(original.host)
        if name is None:
            return Target(None, ())
        service = directory.remote(*name)
        found = service.targets.get(original.port) if service is not None else None
        return found or Target("/".join(name), ())

    def holding(self, original: Address) -> AbstractContextManager[None]:
        """Keeps the meaning of this address while a connection to it is open."""
        return self.virtual.held(original.host) if self.virtual is not None else _NOTHING_HELD

    def find_target(self, original: Address, authority: Callable[[], bytes | None]) -> Target:
        """The target of a request to `original`. Calls `authority` only if the authority may select
        a service."""
        target = self.find_address(original)
        if target is None and (self.networks or self.remote_gateways is not None):
            target = self._named(original, authority)
        return target or itself(original)

    def _named(self, original: Address, authority: Callable[[], bytes | None]) -> Target | None:
        """The service that the authority names, if the authority may select one at this address."""
        anywhere = bool(self.networks) and self._trusted(original.host)
        cluster = (
            self.remote_gateways.cluster(original)
            if self.remote_gateways is not None and not anywhere
            else None
        )
        if cluster is None and not anywhere:
            return None
        name = authority()
        target = (
            self.source.current.authority(name, self.namespace, original.host) if name else None
        )
        if target is None or anywhere:
            return target
        return target if target.remote is not None and target.remote.cluster == cluster else None

    def _trusted(self, host: str) -> bool:
        """Whether the operator allows the authority to select a service at this address."""
        literal = _literal(host)
        return any(literal in network for network in self.networks)

    # The service, and where it is served.

    def choose(self, target: Target) -> Target:
        """The target to send a request for `target` to. Raises NoEndpoint if the service is split
        and no backend is usable, or if it is in another cluster and no gateway of that cluster is
        usable. Raises DirectoryUnavailable for UNANSWERED, IdentityUnknown for UNIDENTIFIED."""
        plan = target.plan
        if plan is None:
            if target is UNANSWERED:
                raise DirectoryUnavailable(
                    "the directory is unavailable: the control plane has not answered"
                )
            if target is UNIDENTIFIED:
                raise IdentityUnknown(
                    "the control plane does not know which identity to expect there: the pod is"
                    " new, or a Service has an identity that cannot be used"
                )
            return (
                target
                if target.remote is None
                else self._sent(target, target.remote.cluster, "name")
            )
        chosen = (
            self._place(plan.backends[0])
            if len(plan.backends) == 1
            else self._split(target.service, plan)
        )
        if chosen.remote is None:
            return chosen
        named = any(chosen.service == backend.target.service for backend in plan.backends)
        return self._sent(chosen, chosen.remote.cluster, "split" if named else "failover")

    def _sent(self, target: Target, cluster: str, why: str) -> Target:
        """A target in another cluster, with its usable gateways. Raises NoEndpoint if there is
        none."""
        self.metrics.count_remote_attempt(cluster, why)
        found = self._through(target)
        if not found.endpoints and self.remote_gateways is not None:
            raise NoEndpoint(self.remote_gateways.why(cluster))
        return found

    def _through(self, target: Target) -> Target:
        return (
            target
            if self.remote_gateways is None or target.remote is None
            else self.remote_gateways.through(target)
        )

    def _split(self, service: str | None, plan: Plan) -> Target:
        drawn = self._draw(plan.backends)
        target = self._place(drawn)
        if self._serves(target):
            return target
        others = [
            backend
            for backend in plan.backends
            if backend.weight and backend is not drawn and self._serves(self._place(backend))
        ]
        if not others:
            weighty = [self._place(backend) for backend in plan.backends if backend.weight]
            for place in (target, *weighty):
                if self._trial(place, alone=True):
                    return place
            states = ", ".join(
                f"{b.target.service} none of {len(self._through(b.target).endpoints)}"
                for b in plan.backends
                if b.weight
            )
            raise NoEndpoint(f"no backend of {service} has a usable endpoint: {states}")
        return self._place(self._draw(others))

    def _draw(self, backends: Sequence[Backend]) -> Backend:
        """Draw a backend by weight. At least one weight is above zero."""
        left = self.chance.random() * sum(backend.weight for backend in backends)
        for backend in backends:
            left -= backend.weight
            if left < 0:
                return backend
        return next(
            backend for backend in reversed(backends) if backend.weight
        )  # a rounding error at the end of the range

    def _place(self, backend: Backend) -> Target:
        """The target that serves a backend now."""
        home = backend.target
        if not backend.elsewhere or not self._away(backend) or self.health.trial(home):
            return home
        for other in backend.elsewhere:
            if self._serves(other):
                return other
        if self._usable(home) or self._trial(home, alone=True):
            return home
        return next((other for other in backend.elsewhere if self._trial(other, alone=True)), home)

    def _away(self, backend: Backend) -> bool:
        """Whether a service is failed over now: too few endpoints are usable, or they have not been
        usable for long enough."""
        home, remote = backend.target, backend.elsewhere[0].remote
        key = home.service, remote.port if remote is not None else 0
        absence = self._absences.get(key)
        if self._usable(home) < backend.below:
            if absence is None:
                self._absences[key] = _Absence()
                self.metrics.set_failover(home.service or "", True)
            else:
                absence.back = None
            return True
        if absence is None:
            return False
        now = self.clock()
        if absence.back is None:
            absence.back = now
        if now - absence.back < self.settle:
            return True
        del self._absences[key]
        self.metrics.set_failover(home.service or "", False)
        return False

    def _usable(self, target: Target) -> int:
        return self.health.usable(self._through(target))

    def _trial(self, target: Target, *, alone: bool) -> bool:
        return self.health.trial(self._through(target), alone=alone)

    def _serves(self, target: Target) -> bool:
        """Whether a target gets requests although others are usable: it is usable, or is due for a
        trial."""
        return bool(self._usable(target)) or self._trial(target, alone=False)
