"""The settings of the listeners for traffic: outbound, inbound, gateway, and what is redirected to
them."""

from __future__ import annotations

import functools
from typing import Annotated

import msgspec

from proxy.identity.spiffe import IdentityPattern, SpiffeId, SpiffeIdError
from proxy.net.address import Address
from proxy.settings.declare import Section, described, number, ratio, seconds
from proxy.settings.units import Network, PortSwitch

Port = Annotated[int, number(1, 65535, "a port")]


Ports = tuple[Port, ...]


# Protocols in which the server speaks first, or that detection does not know: SMTP, MySQL, Galera,
# PostgreSQL, Redis, Elasticsearch's transport, memcached. It is Linkerd's list, so that operators
# need to know only one.
OPAQUE_PORTS = (25, 587, 3306, 4444, 5432, 6379, 9300, 11211)


_KNOWN = (
    "maximum open connections whose peer is known; above: the proxy evicts the least valuable one"
    " or refuses the new one"
)


_PENDING = (
    "maximum open connections whose peer is not known yet, in addition to `max_connections`; above:"
    " the proxy evicts the oldest"
)


_RESERVE = (
    "fraction of `max_connections` that is reserved for authorized peers with a verified identity"
)


# An HTTP client sends data as soon as it is connected. Three seconds of silence mean that the
# server speaks first on a port that is not declared opaque, or that the client opened the
# connection in advance. Both work as opaque. Linkerd waits ten seconds. MySQL and many clients do
# not wait longer than that for a greeting, so they would fail instead of being slow.
class OutboundConfig(Section, frozen=True):
    """Traffic from the application to the mesh."""

    listen: Annotated[
        tuple[Address, ...],
        described(
            "listen addresses for redirected connections of the application; empty: disabled", 16
        ),
    ] = (
        Address("127.0.0.1", 4140),
        Address("::1", 4140),
    )
    opaque_ports: Annotated[
        Ports, described("destination ports without protocol detection", 1024)
    ] = OPAQUE_PORTS
    fixed_destination: Annotated[
        Address | None,
        described(
            "destination of connections that were not redirected (for standalone use and"
            " benchmarks); none: such connections are refused"
        ),
    ] = None
    authority_networks: Annotated[
        tuple[Network, ...],
        described(
            "destinations that are not in the directory, for which the authority of a request"
            " selects the service",
            1024,
        ),
    ] = ()
    detect_timeout: Annotated[
        float,
        seconds(
            0.05,
            60,
            "maximum wait for the first bytes of a client; then the connection is treated as"
            " opaque",
        ),
    ] = 3.0
    max_connections: Annotated[
        int,
        number(
            1,
            1_000_000,
            "maximum open connections; above: the proxy closes an idle connection, or new"
            " connections wait in the backlog",
        ),
    ] = 10_000


# A pod has few callers, and each of them sends many requests.
_spiffe_id = functools.lru_cache(maxsize=1024)(SpiffeId.parse)


def _matches(patterns: tuple[IdentityPattern, ...], identity: SpiffeId | str) -> bool:
    try:
        who = _spiffe_id(identity) if isinstance(identity, str) else identity
    except SpiffeIdError:
        return False
    return any(pattern.matches(who) for pattern in patterns)


class InboundConfig(Section, frozen=True):
    """Traffic from the mesh to the application."""

    listen: Annotated[
        tuple[Address, ...],
        described("listen addresses for redirected connections to the pod; empty: disabled", 16),
    ] = (
        Address("0.0.0.0", 4143),
        Address("::", 4143),
    )
    opaque_ports: Annotated[
        Ports, described("ports without protocol detection on connections without TLS", 1024)
    ] = OPAQUE_PORTS
    http_ports: Annotated[
        Ports,
        described(
            "ports that accept only HTTP; opaque connections to these ports are closed", 1024
        ),
    ] = ()
    fixed_destination: Annotated[
        Address | None,
        described(
            "destination of connections that were not redirected (for standalone use and"
            " benchmarks); none: such connections are refused"
        ),
    ] = None
    detect_timeout: Annotated[
        float,
        seconds(
            0.05,
            60,
            "maximum wait for the first bytes of a client; then the connection is treated as"
            " opaque",
        ),
    ] = 3.0
    hello_timeout: Annotated[
        float,
        seconds(
            0.05,
            60,
            "maximum wait for a ClientHello on an opaque port that does not require an identity;"
            " then the connection is treated as not TLS",
        ),
    ] = 0.5
    require_identity: Annotated[
        PortSwitch,
        described(
            "whether a peer must present a verified identity: for all ports, a list of ports, or a"
            " mapping of ports (and `default`)"
        ),
    ] = PortSwitch(False, {})
    allow: Annotated[
        dict[int, Annotated[tuple[IdentityPattern, ...], described("", 1024)]],
        described(
            "SPIFFE identities that may use a port, exact or ending with `/*`; ports that are not"
            " listed accept all peers",
            1024,
        ),
    ] = msgspec.field(default_factory=dict)
    trusted_gateways: Annotated[
        tuple[IdentityPattern, ...],
        described(
            "gateways whose `isthmus-client-id` (the sender of a request) is trusted: SPIFFE"
            " identities, exact or ending with `/*`",
            64,
        ),
    ] = ()
    max_connections: Annotated[int, number(1, 1_000_000, _KNOWN)] = 10_000
    max_pending: Annotated[int, number(2, 1_000_000, _PENDING)] = 1024
    member_reserve: Annotated[float, ratio(0, 0.9, _RESERVE)] = 0.1

    def requires_identity(self, port: int) -> bool:
        """Whether a peer must prove its identity on `port`; a port with an allow-list always asks
        for it."""
        return port in self.allow or self.require_identity.at(port)

    def allows(self, port: int, identity: SpiffeId | str | None) -> bool:
        """Whether a peer with this verified identity may use `port`; None: it presented no
        certificate. Called for every request."""
        if identity is None:
            return not self.requires_identity(port)
        patterns = self.allow.get(port)
        return patterns is None or _matches(patterns, identity)

    def trusts(self, identity: str) -> bool:
        """Whether the peer with this verified identity may say who sent its requests."""
        return bool(self.trusted_gateways) and _matches(self.trusted_gateways, identity)


class GatewayConfig(Section, frozen=True):
    """A gateway for services that other clusters may use (`isthmus run --gateway`). It is a
    separate process without an application.
    """

    enabled: Annotated[
        bool,
        described(
            "whether the proxy is a gateway; a gateway has neither an inbound nor an outbound side"
        ),
    ] = False
    listen: Annotated[
        tuple[Address, ...], described("listen addresses for proxies of other clusters", 16)
    ] = (
        Address("0.0.0.0", 4143),
        Address("::", 4143),
    )
    allow: Annotated[
        tuple[IdentityPattern, ...],
        described(
            "SPIFFE identities that may use the gateway, exact or ending with `/*`; other peers"
            " get 403",
            1024,
        ),
    ] = (IdentityPattern("", exact=False),)
    detect_timeout: Annotated[
        float, seconds(0.05, 60, "maximum wait for the start of the TLS handshake of a client")
    ] = 3.0
    max_connections: Annotated[int, number(1, 1_000_000, _KNOWN)] = 10_000
    max_pending: Annotated[int, number(2, 1_000_000, _PENDING)] = 1024
    member_reserve: Annotated[float, ratio(0, 0.9, _RESERVE)] = 0.1

    def admits(self, identity: SpiffeId | str) -> bool:
        """Whether a peer with this verified identity may use the gateway."""
        return _matches(self.allow, identity)


class InterceptConfig(Section, frozen=True):
    """What `isthmus intercept` does not redirect. It never redirects connections to the proxy's own
    listeners, including the admin port.
    """

    uid: Annotated[
        int,
        number(
            1,
            2**32 - 2,
            "user id of the proxy; connections of this user are not redirected",
            "user id",
        ),
    ] = 2102
    skip_inbound_ports: Annotated[
        Ports, described("ports of the pod whose inbound connections are not redirected", 1024)
    ] = ()
    skip_outbound_ports: Annotated[
        Ports, described("destination ports whose outbound connections are not redirected", 1024)
    ] = ()
    skip_inbound_subnets: Annotated[
        tuple[Network, ...],
        described("source subnets whose inbound connections are not redirected", 1024),
    ] = ()
    skip_outbound_subnets: Annotated[
        tuple[Network, ...],
        described("destination subnets whose outbound connections are not redirected", 1024),
    ] = ()
