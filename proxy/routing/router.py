"""Which target a request, or an opaque connection, goes to.

Three questions, asked for each request (and for each connection of which nothing but bytes is known):

*What was meant?* The address that the application dialled decides: a service's cluster address, a virtual address, an endpoint. The
authority of a request chooses a service at two kinds of address only: at the gateway of another cluster, among the services of that
cluster, and in the networks that the operator names (`outbound.authority_networks`). Everything else goes to its original destination,
unchanged, in the form that it came in. An application often copies the authority from a request of an outsider, as each reverse proxy
does that keeps the client's Host. If the authority could choose at any address, the outsider would choose among the internal services,
and the request would arrive there with this pod's identity (docs/decisions/17-address-before-authority.md).

*Which service?* If the service is split, chance draws one of its backends by weight. One of which no endpoint can be used gets
nothing; its share goes to the others, in proportion to their weights.

*Where is that service served?* Here, as long as enough of its endpoints can be used. If not, in the first of its failover clusters that
has a gateway which can be used. It comes back when enough of its own have been usable for `settle` seconds on end, so that a service
that dies again and again does not take its clients along each time. Whether an endpoint that was broken is back, only a request can find
out: so while a service is away one is sent home each time that a penalty is over (balancing/circuit_breaker.py). If that does not do, its
further attempts ask here again and go where the others go; nothing else changes by it.

Where nothing at all can be used, each of these places is tried as soon as its breakers let anybody try.

What a gateway has received asks none of this: it goes to an endpoint of its own cluster (proxy/flows/gateway.py). So a request is split and
failed over once for each time that an application sends it, and clusters whose splits name each other do not play ball with it.

Nothing here waits. The directory may change between two calls; each call sees one snapshot.
"""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

from proxy.config.units import Network
from proxy.directory import Backend, Directory, Endpoint, Plan, Target, itself
from proxy.errors import NoEndpoint
from proxy.net.address import Address
from proxy.net.socket_stream import SocketStream
from proxy.net.tls.handshake import TLSStream


class Source(Protocol):
    """Where the directory is looked up: the snapshot changes under it, whole, so take it once for one decision."""

    @property
    def current(self) -> Directory: ...


class Virtual(Protocol):
    """Addresses that stand for services of other clusters (proxy/dns/virtual_addresses.py)."""

    def lookup(self, host: str) -> tuple[str, str, str] | None:
        """(cluster, namespace, name) of the service that an address stands for, or stood for; None: it has been given to nobody."""
        ...

    def covers(self, host: str) -> bool:
        """Whether an address is of the virtual ranges."""
        ...

    def held(self, host: str) -> AbstractContextManager[None]:
        """As long as this is open, the address goes on meaning what it means now."""
        ...


class KnownGateways(Protocol):
    """The ways into other clusters as they are now (proxy/routing/remote_gateways.py)."""

    def through(self, target: Target) -> Target:
        """A target, by the gateways that can be used now if it is another cluster's."""
        ...

    def why(self, cluster: str) -> str:
        """Why no gateway of a cluster can be used."""
        ...

    def cluster(self, address: Address) -> str | None:
        """The cluster whose gateway has this address; None: it is not the address of a gateway."""
        ...

    def connected(self, endpoint: Endpoint, stream: SocketStream | TLSStream) -> None:
        """There is a new connection to `endpoint`, which may be a gateway."""
        ...


class Health(Protocol):
    """What is known of endpoints."""

    def usable(self, target: Target) -> int:
        """How many endpoints of a target can be used."""
        ...

    def trial(self, target: Target, *, alone: bool = False) -> bool:
        """Whether a request would find out about an endpoint that could not be used. `alone`: nothing else can be used either."""
        ...


class Books(Protocol):
    """What is counted."""

    def sent_away(self, cluster: str, why: str) -> None:
        """A request or connection goes by way of another cluster's gateway."""
        ...

    def failed_over(self, service: str, away: bool) -> None:
        """A service is served by another cluster from now on, or at home again."""
        ...


_NOTHING_HELD = nullcontext()
# An application dials few destinations, each of them often. The kernel and the configuration give IP literals only.
_literal = lru_cache(maxsize=1024)(ipaddress.ip_address)


@dataclass(slots=True)
class _Absence:
    """A service is served elsewhere. `back`: since when enough of its own endpoints have been usable again."""

    back: float | None = None


@dataclass(slots=True)
class Router:
    """Answers for one proxy. `settle` in seconds of `clock`; `namespace` is the pod's own, in which short names are read; `networks`
    are those in which the authority may choose a service."""

    source: Source
    health: Health
    books: Books
    namespace: str
    settle: float
    clock: Callable[[], float]
    chance: random.Random = field(default_factory=random.Random)
    virtual: Virtual | None = None
    remote_gateways: KnownGateways | None = None
    networks: Sequence[Network] = ()
    _absences: dict[tuple[str | None, int], _Absence] = field(default_factory=dict, init=False)

    # What was meant?

    def known(self, original: Address) -> Target | None:
        """What an address stands for; None: nobody knows it."""
        directory = self.source.current
        target = directory.known(original)
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
        """For as long as a connection to this address is open: what it means does not change under it."""
        return self.virtual.held(original.host) if self.virtual is not None else _NOTHING_HELD

    def meant(self, original: Address, authority: Callable[[], bytes | None]) -> Target:
        """What a request to `original` is meant for. `authority` is called only where it may choose."""
        target = self.known(original)
        if target is None and (self.networks or self.remote_gateways is not None):
            target = self._named(original, authority)
        return target or itself(original)

    def _named(self, original: Address, authority: Callable[[], bytes | None]) -> Target | None:
        """The service that the authority names, if it may choose one at this address."""
        anywhere = bool(self.networks) and self._trusted(original.host)
        cluster = self.remote_gateways.cluster(original) if self.remote_gateways is not None and not anywhere else None
        if cluster is None and not anywhere:
            return None
        name = authority()
        target = self.source.current.authority(name, self.namespace, original.host) if name else None
        if target is None or anywhere:
            return target
        return target if target.remote is not None and target.remote.cluster == cluster else None

    def _trusted(self, host: str) -> bool:
        """Whether the operator lets the authority choose at this address."""
        literal = _literal(host)
        return any(literal in network for network in self.networks)

    # Which service, and where is it served?

    def choose(self, target: Target) -> Target:
        """Where to go with what is meant for `target`. Raises NoEndpoint if it is split and none of its backends can be used, or if it is
        another cluster's, whose gateways cannot be used."""
        plan = target.plan
        if plan is None:
            return target if target.remote is None else self._sent(target, target.remote.cluster, "name")
        chosen = self._place(plan.backends[0]) if len(plan.backends) == 1 else self._split(target.service, plan)
        if chosen.remote is None:
            return chosen
        named = any(chosen.service == backend.target.service for backend in plan.backends)
        return self._sent(chosen, chosen.remote.cluster, "split" if named else "failover")

    def _sent(self, target: Target, cluster: str, why: str) -> Target:
        """What goes to another cluster, by the gateways that are there. Raises NoEndpoint if there is none."""
        self.books.sent_away(cluster, why)
        found = self._through(target)
        if not found.endpoints and self.remote_gateways is not None:
            raise NoEndpoint(self.remote_gateways.why(cluster))
        return found

    def _through(self, target: Target) -> Target:
        return target if self.remote_gateways is None or target.remote is None else self.remote_gateways.through(target)

    def _split(self, service: str | None, plan: Plan) -> Target:
        drawn = self._draw(plan.backends)
        target = self._place(drawn)
        if self._serves(target):
            return target
        others = [backend for backend in plan.backends if backend.weight and backend is not drawn and self._serves(self._place(backend))]
        if not others:
            weighty = [self._place(backend) for backend in plan.backends if backend.weight]
            for place in (target, *weighty):
                if self._trial(place, alone=True):
                    return place
            states = ", ".join(f"{b.target.service} none of {len(self._through(b.target).endpoints)}" for b in plan.backends if b.weight)
            raise NoEndpoint(f"no backend of {service} has an endpoint that can be used: {states}")
        return self._place(self._draw(others))

    def _draw(self, backends: Sequence[Backend]) -> Backend:
        """One of them, by weight; at least one has some."""
        left = self.chance.random() * sum(backend.weight for backend in backends)
        for backend in backends:
            left -= backend.weight
            if left < 0:
                return backend
        return next(backend for backend in reversed(backends) if backend.weight)  # rounding, at the very end of the range

    def _place(self, backend: Backend) -> Target:
        """Where a backend is served now."""
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
        """Whether a service is not to be served at home, for want of endpoints, or because they have not been back for long enough."""
        home, remote = backend.target, backend.elsewhere[0].remote
        key = home.service, remote.port if remote is not None else 0
        absence = self._absences.get(key)
        if self._usable(home) < backend.below:
            if absence is None:
                self._absences[key] = _Absence()
                self.books.failed_over(home.service or "", True)
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
        self.books.failed_over(home.service or "", False)
        return False

    def _usable(self, target: Target) -> int:
        return self.health.usable(self._through(target))

    def _trial(self, target: Target, *, alone: bool) -> bool:
        return self.health.trial(self._through(target), alone=alone)

    def _serves(self, target: Target) -> bool:
        """Whether it gets requests while others could have them: those that it can serve, and those that find out whether it can."""
        return bool(self._usable(target)) or self._trial(target, alone=False)
