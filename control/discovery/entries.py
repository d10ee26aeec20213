"""The entries that proxies get: services with their ports and endpoints, pods by address, and
addresses whose identity is unknown."""

from __future__ import annotations

import bisect
import operator

import msgspec

from control.contract import Hint, SpiffeId
from control.discovery.facts import State
from control.kube.resources import Key


class Entry(msgspec.Struct, frozen=True, gc=False):
    """The base of all entries. Equal entries mean the same to a proxy."""


class EndpointEntry(Entry, frozen=True):
    """An endpoint of a service.

    `identity`: the only peer that is accepted there, except on `skip_ports`; None: clear text.
    `ports`: pairs of a service port and the endpoint's own port for it. `outside`: no pod vouches
    for the address, so others than the clients of the service must not believe what it says about
    it. usable_endpoints.py uses the other fields.
    """

    address: str
    identity: SpiffeId | None
    skip_ports: frozenset[int]
    ports: tuple[tuple[int, int], ...]
    state: State
    node: str = ""
    zone: str = ""
    hostname: str = ""
    zones: frozenset[str] = frozenset()
    nodes: frozenset[str] = frozenset()
    outside: bool = False


class PortEntry(Entry, frozen=True):
    """A port of a service. `target`: the usual port of its endpoints."""

    port: int
    target: int
    protocol: Hint


class ServiceEntry(Entry, frozen=True):
    """A service. Names and addresses are reused: it is the same service only while `uid` is the
    same. `endpoints` are sorted by their addresses, which differ. `local`: clients may use only
    endpoints on their own node. `exported`: clients of other clusters may use it.
    """

    key: Key
    uid: str
    addresses: tuple[str, ...]
    ports: tuple[PortEntry, ...]
    endpoints: tuple[EndpointEntry, ...]
    local: bool = False
    exported: bool = False

    def endpoint(self, address: str) -> EndpointEntry | None:
        """The endpoint with this address."""
        at = bisect.bisect_left(self.endpoints, address, key=_address)
        found = self.endpoints[at] if at < len(self.endpoints) else None
        return found if found is not None and found.address == address else None


_address = operator.attrgetter("address")


class PodEntry(Entry, frozen=True):
    """A pod, at one of its addresses. `identity` None: it has no sidecar."""

    address: str
    identity: SpiffeId | None
    skip_ports: frozenset[int]
    zone: str = ""
    node: str = ""


class UnknownEntry(Entry, frozen=True):
    """An address at which an identity may be expected, but it is not known which one. Connections
    to it must fail.

    `pending`: the namespaces whose slices name a pod there that is not known yet, or not at this
    address. `refused`: the namespaces whose services expect an identity there that cannot be told.
    It holds for clients of these namespaces. `everywhere`: for all clients.
    """

    pending: frozenset[str]
    refused: frozenset[str]
    everywhere: bool
