"""What proxies are told: services with their ports and endpoints, and pods by their address."""

from __future__ import annotations

import msgspec

from control.contract import Hint, SpiffeId
from control.discovery.facts import State
from control.kube.resources import Key


class Entry(msgspec.Struct, frozen=True, gc=False):
    """The base of all. Equal entries mean the same to a proxy."""


class EndpointEntry(Entry, frozen=True):
    """A place that serves. `identity` None: clear text; else only this peer is accepted there,
    except on `skip_ports`. `ports`: for each port of the service that it serves, its own one. The
    rest is for views.py."""

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


class PortEntry(Entry, frozen=True):
    """A port of a service."""

    port: int
    target: int
    protocol: Hint


class ServiceEntry(Entry, frozen=True):
    """A service, which is this one only as long as `uid` is the same: names and addresses are used
    again. `local`: it is served on the client's node only."""

    key: Key
    uid: str
    addresses: tuple[str, ...]
    ports: tuple[PortEntry, ...]
    endpoints: tuple[EndpointEntry, ...]
    local: bool = False


class PodEntry(Entry, frozen=True):
    """A pod that is meshed, at one of its addresses."""

    address: str
    identity: SpiffeId
    skip_ports: frozenset[int]
    zone: str = ""
    node: str = ""
