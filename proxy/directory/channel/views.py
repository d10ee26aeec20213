"""The content of an entry, as the control plane encodes it and the proxy decodes it.

The control plane computes an entry once for all proxies that see the same, so an entry has nothing
about its reader. Lists of strings and sets that repeat are in tables: an endpoint refers to its
identity and to its ports without an identity by their numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Annotated

import msgspec

from proxy.directory.channel.messages import ChannelError
from proxy.directory.snapshot import Endpoint, Hint, Pod, Port, Service, Target
from proxy.identity.spiffe import SpiffeId, SpiffeIdError
from proxy.net.address import Address

PortNumber = Annotated[int, msgspec.Meta(ge=1, le=65535)]
# The number of a table row; -1: none.
Row = Annotated[int, msgspec.Meta(ge=-1)]


class View(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The base of all contents."""


class PortView(View, frozen=True):
    """A port of a service. `target`: the usual port of its endpoints."""

    port: PortNumber
    target: PortNumber
    protocol: Hint


class EndpointView(View, frozen=True):
    """An endpoint. `ports`: pairs of a service port and its own one, where that is not the usual
    one; 0: it does not serve that port. `ready`: whether this proxy may use it. `pod`: the control
    plane knows a pod with this address.
    """

    address: str
    identity: Row
    skip_ports: Row
    ports: tuple[tuple[PortNumber, Annotated[int, msgspec.Meta(ge=0, le=65535)]], ...]
    ready: bool
    zone: str
    pod: bool = False


class ServiceView(View, frozen=True, tag="service"):
    """A service, found by a cluster address or by its name. `exported`: the gateway of this cluster
    serves it."""

    namespace: str
    name: str
    addresses: tuple[str, ...]
    ports: tuple[PortView, ...]
    identities: tuple[str, ...]
    skip_ports: tuple[tuple[PortNumber, ...], ...]
    endpoints: tuple[EndpointView, ...]
    exported: bool = False


class PodPort(View, frozen=True):
    """A port at which a pod serves `service` ("namespace/name"; "": several services)."""

    port: PortNumber
    protocol: Hint
    service: str


class PodView(View, frozen=True, tag="pod"):
    """An endpoint, found by its own address. `identity` "": clear text. `pod`: see EndpointView."""

    address: str
    identity: str
    skip_ports: tuple[PortNumber, ...]
    zone: str
    ports: tuple[PodPort, ...]
    pod: bool = False


class UnknownView(View, frozen=True, tag="unknown"):
    """An address at which an identity may be expected, but the control plane does not know which
    one. `pending`: it may know it soon, because a pod is new."""

    pending: bool


Content = ServiceView | PodView | UnknownView

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Content] = msgspec.msgpack.Decoder(Content)
_identity = functools.lru_cache(maxsize=4096)(SpiffeId.parse)


def encode(view: Content) -> bytes:
    """The view as bytes. Equal views give equal bytes."""
    return _encoder.encode(view)


def decode(content: bytes) -> Content | None:
    """The view; None for b"". Raises ChannelError."""
    if not content:
        return None
    try:
        view = _decoder.decode(content)
        if isinstance(view, ServiceView):
            _check(view)
        elif isinstance(view, PodView) and view.identity:
            _identity(view.identity)
    except (msgspec.MsgspecError, UnicodeDecodeError, SpiffeIdError, RecursionError) as error:
        raise ChannelError(f"an entry cannot be decoded: {error}") from None
    return view


def _check(view: ServiceView) -> None:
    """Raises ChannelError, SpiffeIdError."""
    for identity in view.identities:
        _identity(identity)
    for endpoint in view.endpoints:
        if endpoint.identity >= len(view.identities) or endpoint.skip_ports >= len(view.skip_ports):
            raise ChannelError(f"an endpoint of {view.name} refers to a row that does not exist")


def service_of(view: ServiceView) -> Service:
    """The service for a snapshot."""
    skipped = [frozenset(ports) for ports in view.skip_ports]
    pods = [(endpoint, _pod(endpoint, view.identities, skipped)) for endpoint in view.endpoints]
    ports = tuple(Port(port.port, port.target, port.protocol) for port in view.ports)
    qualified = f"{view.namespace}/{view.name}"
    targets = {port.port: _target(qualified, port, pods) for port in ports}
    return Service(
        view.name, view.namespace, view.addresses, ports, targets, exported=view.exported
    )


def _pod(endpoint: EndpointView, identities: tuple[str, ...], skipped: list[frozenset[int]]) -> Pod:
    identity = _identity(identities[endpoint.identity]) if endpoint.identity >= 0 else None
    ports = skipped[endpoint.skip_ports] if endpoint.skip_ports >= 0 else frozenset[int]()
    known = Endpoint(
        Address(endpoint.address, 0), identity, Hint.DETECT, endpoint.ready, 1, endpoint.zone
    )
    return Pod(known, ports)


def _target(service: str, port: Port, pods: Iterable[tuple[EndpointView, Pod]]) -> Target:
    endpoints = []
    for endpoint, pod in pods:
        number = port.target_port
        for of, own in endpoint.ports:
            if of == port.port:
                number = own
        if number:
            endpoints.append(pod.at(Address(endpoint.address, number), port.protocol))
    return Target(service, tuple(endpoints), port.protocol)


def pod_of(view: PodView) -> tuple[Pod, dict[Address, Target]]:
    """The pod, and the targets at its ports."""
    identity = _identity(view.identity) if view.identity else None
    endpoint = Endpoint(Address(view.address, 0), identity, zone=view.zone)
    pod = Pod(endpoint, frozenset(view.skip_ports))
    targets = {}
    for port in view.ports:
        address = Address(view.address, port.port)
        targets[address] = Target(
            port.service or None, (pod.at(address, port.protocol),), port.protocol
        )
    return pod, targets
