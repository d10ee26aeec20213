"""The schema of the configuration: every setting with its type, meaning, limits and default.

The annotation of a field is the only source: docs/configuration.md is generated from it, and a test
compares the two. Parsed durations are seconds (float), parsed sizes are bytes (int). Comments above
the sections give the reasons for the numbers.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from proxy.config.decode import Section, described, number, octets, ratio, seconds
from proxy.config.schema_files import DirectoryConfig, IdentityConfig
from proxy.config.schema_tracing import TracingConfig
from proxy.config.units import IP, Network, PortSwitch
from proxy.identity.spiffe import IdentityPattern, SpiffeId, SpiffeIdError
from proxy.net.address import Address

_HOUR, _DAY, _WEEK = 3600, 86400, 7 * 86400

Port = Annotated[int, number(1, 65535, "a port")]
Ports = tuple[Port, ...]
# Protocols in which the server speaks first, or that detection does not know: SMTP, MySQL, Galera,
# PostgreSQL, Redis, Elasticsearch's transport, memcached. It is Linkerd's list, so that operators
# need to know only one.
OPAQUE_PORTS = (25, 587, 3306, 4444, 5432, 6379, 9300, 11211)


class PodConfig(Section, frozen=True):
    """The identity of this pod. In Kubernetes, all values come from the downward API."""

    name: Annotated[str, described("name of the pod; from POD_NAME")] = ""
    namespace: Annotated[str, described("namespace of the pod; from POD_NAMESPACE")] = "default"
    uid: Annotated[str, described("unique id of the pod; from POD_UID")] = ""
    ip: Annotated[IP | None, described("primary IP address of the pod; from POD_IP")] = None
    node: Annotated[str, described("node that the pod runs on; from NODE_NAME")] = ""
    zone: Annotated[
        str, described("zone of the node; endpoints in this zone are preferred; from POD_ZONE", 63)
    ] = ""
    service_account: Annotated[
        str, described("service account of the pod; from SERVICE_ACCOUNT")
    ] = "default"
    addresses: Annotated[
        tuple[IP, ...],
        described(
            "all IP addresses of the pod; from POD_IPS; empty: read from the network interfaces", 64
        ),
    ] = ()


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


# A probe arrives every few seconds and times out after one second. Prometheus scrapes about every
# 15 s and keeps its connection. stall_timeout is longer than any load should stop the event loop,
# and shorter than the 30 s in which three probes fail.
class AdminConfig(Section, frozen=True):
    """Probes and metrics."""

    listen: Annotated[
        tuple[Address, ...],
        described("listen addresses for /live, /ready and /metrics; empty: disabled", 16),
    ] = (
        Address("0.0.0.0", 4191),
        Address("::", 4191),
    )
    max_connections: Annotated[
        int,
        number(
            1,
            10_000,
            "maximum open connections; above: the proxy closes the connection with the longest idle"
            " time",
        ),
    ] = 64
    max_per_source: Annotated[
        int,
        number(
            1,
            10_000,
            "maximum open connections from one address; above: the proxy closes one from that"
            " address",
        ),
    ] = 16
    request_timeout: Annotated[
        float,
        seconds(
            0.05, 60, "maximum time from accepting a connection to the end of its first request"
        ),
    ] = 2.0
    idle_timeout: Annotated[
        float, seconds(1, _HOUR, "maximum idle time of a connection between requests")
    ] = 60.0
    metrics_max_age: Annotated[
        float,
        seconds(0, 60, "how long the proxy serves the same rendered metrics text to all clients"),
    ] = 1.0
    stall_timeout: Annotated[
        float,
        seconds(
            1,
            _HOUR,
            "maximum time without progress of the event loop or of a worker; above: not live",
        ),
    ] = 15.0


# A service that has been back for ten seconds is likely to stay. A gateway opens a tunnel after it
# has reached the service, for which it may try three endpoints.
class ClustersConfig(Section, frozen=True):
    """Services of other clusters, and failover to them."""

    settle: Annotated[
        float,
        seconds(
            0,
            _HOUR,
            "how long the local endpoints of a service must be usable before its requests return"
            " from another cluster",
        ),
    ] = 10.0
    probe_interval: Annotated[
        float,
        seconds(
            0, _HOUR, "interval between health probes of a gateway that is in use; 0: no probes"
        ),
    ] = 5.0
    probe_timeout: Annotated[
        float, seconds(0.05, 300, "maximum time for a probe, including the connection setup")
    ] = 3.0
    probe_failures: Annotated[
        int, number(1, 100, "consecutive probe failures after which a gateway gets no requests")
    ] = 2
    resolve_interval: Annotated[
        float, seconds(0.1, _DAY, "interval between DNS lookups of a gateway's name")
    ] = 30.0
    tunnel_timeout: Annotated[
        float,
        seconds(
            0.1, _HOUR, "maximum time for a gateway to open a tunnel for traffic that is not HTTP"
        ),
    ] = 15.0


# idle_timeout is longer than the idle timeout of common client pools (Go: 90 s). So the client
# closes first, and no request is sent on a closing connection. For clients without an identity this
# is too long, because any host that can connect could hold a slot for that time. Their timeout is
# three times that of common servers (Node.js: 5 s). body_min_rate ends a body that trickles in
# order to hold a connection.
class HttpConfig(Section, frozen=True):
    """Limits of HTTP messages, on both sides of the proxy."""

    max_head_bytes: Annotated[
        int,
        octets(
            1024, 2**20, "maximum size of the start line and the header fields together; above: 431"
        ),
    ] = 64 * 1024
    max_target_bytes: Annotated[
        int, octets(256, 2**16, "maximum size of the request target; above: 414")
    ] = 16 * 1024
    max_headers: Annotated[
        int, number(8, 10_000, "maximum number of header fields in a head; above: 431")
    ] = 200
    head_timeout: Annotated[
        float,
        seconds(
            0.1, _HOUR, "maximum time from the first byte of a request head to its end; above: 408"
        ),
    ] = 10.0
    idle_timeout: Annotated[
        float, seconds(1, _DAY, "maximum idle time of a client connection between requests")
    ] = 120.0
    plain_idle_timeout: Annotated[
        float,
        seconds(
            1,
            _DAY,
            "the same for clients outside the pod that presented no client certificate, if it is"
            " shorter",
        ),
    ] = 15.0
    body_timeout: Annotated[
        float, seconds(0.1, _DAY, "maximum pause within a request body; above: 408")
    ] = 60.0
    body_min_rate: Annotated[
        int,
        number(
            0,
            2**30,
            "minimum average rate of a request body, checked after `body_timeout`; 0: no minimum",
            "bytes/s",
        ),
    ] = 16
    write_timeout: Annotated[
        float,
        seconds(
            1, _DAY, "maximum time in which a client reads none of the data that the proxy sends"
        ),
    ] = 300.0
    linger_timeout: Annotated[
        float,
        seconds(
            0.1,
            300,
            "how long the proxy reads and discards the rest of a request that was answered early;"
            " above 1 MiB: at 4 MiB/s",
        ),
    ] = 10.0
    response_timeout: Annotated[
        float,
        seconds(
            0.1,
            _DAY,
            "maximum time from the end of a request to the head of its response; above: 504",
        ),
    ] = 300.0
    response_body_timeout: Annotated[
        float, seconds(1, _DAY, "maximum pause within a response body (event streams have pauses)")
    ] = 3600.0


# The stream window is how far a sender may be ahead of a slow consumer. The connection window holds
# several stream windows. A connection ends after max_age, so that new endpoints get their share and
# connections from a burst are closed.
class Http2Config(Section, frozen=True):
    """HTTP/2 connections. Many requests share one connection."""

    max_streams: Annotated[
        int, number(1, 100_000, "maximum concurrent streams of a client on one connection")
    ] = 256
    stream_window: Annotated[
        int,
        octets(
            65536,
            2**30,
            "flow-control window of one stream: bytes that may wait for a slow consumer",
        ),
    ] = 256 * 1024
    connection_window: Annotated[
        int,
        octets(
            65536,
            2**30,
            "flow-control window of a connection: bytes of all its streams that may wait",
        ),
    ] = 4 * 1024 * 1024
    idle_timeout: Annotated[
        float, seconds(1, _DAY, "maximum idle time of a connection to an endpoint")
    ] = 60.0
    frame_budget: Annotated[
        int,
        number(
            100,
            10**9,
            "budget of a peer for resets of new streams (2 each), PING, empty DATA and similar"
            " frames",
            "frames",
        ),
    ] = 1000
    mesh_frame_budget: Annotated[
        int,
        number(
            100,
            10**9,
            "frame budget of a peer with a verified identity; its connection carries the requests"
            " of many clients",
            "frames",
        ),
    ] = 20_000
    reset_rate: Annotated[
        int,
        number(
            1,
            10**6,
            "stream resets per second that are sent to a server without delay, with bursts of four"
            " times as many; more are delayed",
            "streams/s",
        ),
    ] = 25
    ping_interval: Annotated[
        float,
        seconds(
            1,
            _DAY,
            "time without data after which the proxy sends a PING to a peer that owes a response",
        ),
    ] = 20.0
    ping_timeout: Annotated[float, seconds(0.1, _HOUR, "maximum time for the answer to a PING")] = (
        10.0
    )


# The base was measured: 52 MiB after the start, plus what the allocator keeps for itself under
# load. A quarter of the budget, and of the streams, is reserved for members.
class MemoryConfig(Section, frozen=True):
    """How much data the proxy may buffer, for all connections together."""

    budget: Annotated[
        int | None,
        octets(
            16 * 2**20,
            2**44,
            "maximum bytes that one process may buffer; none: derived from the memory limit of the"
            " cgroup",
        ),
    ] = None
    base: Annotated[
        int,
        octets(
            0,
            2**40,
            "bytes per process that are not part of a derived budget; they are for the process"
            " itself",
        ),
    ] = 88 * 2**20
    patience: Annotated[
        float,
        seconds(
            1,
            _HOUR,
            "how long a connection may hold more than its share before the proxy closes it",
        ),
    ] = 10.0
    max_streams: Annotated[
        int, number(1, 10_000_000, "maximum open HTTP/2 streams of all clients together", "streams")
    ] = 10_000


# idle_timeout is below the 5 s of Node.js, the shortest timeout of common servers. So the server
# rarely closes a connection at the moment when it is reused.
class PoolConfig(Section, frozen=True):
    """Pooled connections to endpoints."""

    max_connections_per_endpoint: Annotated[
        int, number(1, 100_000, "maximum open connections to one endpoint")
    ] = 1024
    max_idle_per_endpoint: Annotated[
        int,
        number(
            0, 100_000, "maximum idle connections to one endpoint; 0: connections are not reused"
        ),
    ] = 128
    idle_timeout: Annotated[
        float,
        seconds(
            0.1,
            _HOUR,
            "maximum idle time of a pooled connection; must be shorter than the keep-alive timeout"
            " of the servers",
        ),
    ] = 3.0
    max_age: Annotated[
        float, seconds(1, _WEEK, "maximum age of a connection; an older connection is not reused")
    ] = 600.0
    max_waiting_per_endpoint: Annotated[
        int,
        number(0, 100_000, "maximum requests that wait for a connection or a stream; above: 503"),
    ] = 10_000
    wait_timeout: Annotated[
        float,
        seconds(
            0.01,
            _HOUR,
            "maximum wait of a request without a deadline while no waiting request is served;"
            " above: 503",
        ),
    ] = 3.0


# connect_timeout allows one retransmission of a lost SYN (after 1 s) and leaves time for another
# endpoint.
class TcpConfig(Section, frozen=True):
    """Sockets, and connections that are relayed byte for byte."""

    connect_timeout: Annotated[float, seconds(0.01, 300, "maximum time to open a connection")] = 2.0
    handshake_timeout: Annotated[float, seconds(0.05, 300, "maximum time for a TLS handshake")] = (
        5.0
    )
    idle_timeout: Annotated[
        float,
        seconds(1, _WEEK, "maximum time without data in both directions of a relayed connection"),
    ] = 3600.0
    keepalive: Annotated[
        float,
        seconds(0, 2 * _HOUR, "idle time before the first TCP keep-alive probe; 0: no probes"),
    ] = 10.0
    user_timeout: Annotated[
        float,
        seconds(
            0,
            _HOUR,
            "maximum time in which a peer acknowledges neither data nor keep-alive probes; 0: the"
            " default of the system",
        ),
    ] = 30.0


# Reverse proxies copy the tokens. Programs that answer from their own state do not. So a request
# that returns is nearly always a loop. Four returns are allowed for applications that call
# themselves on purpose. Few requests pass more than a dozen proxies.
class LoopsConfig(Section, frozen=True):
    """Limits of the loop guard."""

    max_returns: Annotated[
        int,
        number(
            0,
            1000,
            "how often the same request may return to a sidecar (an application may call itself);"
            " above: 508",
            "times",
        ),
    ] = 4
    max_hops: Annotated[
        int,
        number(
            4,
            255,
            "maximum proxies that a request may pass; both sides of a sidecar count; above: 508",
            "proxies",
        ),
    ] = 64

    max_nesting: Annotated[
        int,
        number(
            0,
            100,
            "how often a connection that the proxy opened may return to it; above: refused",
            "times",
        ),
    ] = 2
    max_self_calls: Annotated[
        int,
        number(
            1,
            100_000,
            "maximum concurrent calls of the pod to one of its own ports that wait for a response;"
            " above: 508",
            "calls",
        ),
    ] = 256


class LogConfig(Section, frozen=True):
    """The log, which is written to standard error."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"],
        described("minimum level of the lines that are written"),
    ] = "info"
    format: Annotated[Literal["text", "json"], described("format of the lines")] = "text"
    access: Annotated[bool, described("whether the proxy logs each request")] = False
    query: Annotated[bool, described("whether these lines include query strings")] = False
    queue: Annotated[
        int,
        number(
            16,
            1_000_000,
            "maximum lines that wait to be written; more are dropped and counted",
            "lines",
        ),
    ] = 8192


# Kubernetes kills a pod 30 s after SIGTERM. The minimum is for an application that gets SIGTERM
# together with the proxy and opens its last connections after a pause. A native sidecar gets
# SIGTERM after the application has ended, and does not need it.
class ShutdownConfig(Section, frozen=True):
    """Graceful shutdown."""

    grace: Annotated[
        float, seconds(0, _HOUR, "maximum time that open connections may continue after SIGTERM")
    ] = 25.0
    outbound_minimum: Annotated[
        float,
        seconds(
            0,
            _HOUR,
            "minimum time in which the application may open connections after SIGTERM; limited by"
            " `shutdown.grace`",
        ),
    ] = 3.0


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


# 240.0.0.0/4 has been reserved since 1989, and no host uses it. The IPv6 prefix is a unique local
# one that spells "isthmus". The timeout is that of the C library for one attempt. Quarantine is for
# applications that keep an address for longer than its TTL.
class DnsConfig(Section, frozen=True):
    """DNS names of other clusters' services, for all programs of the pod. Without this section the
    proxy does not handle DNS; `dns: {}` enables it.
    """

    listen: Annotated[
        tuple[Address, ...],
        described(
            "listen addresses for redirected queries; queries for the n-th additional resolver"
            " arrive at port + n",
            2,
        ),
    ] = (Address("127.0.0.1", 4153), Address("::1", 4153))
    upstreams: Annotated[
        tuple[Address, ...], described("resolvers of the pod; empty: those in `resolv_conf`", 3)
    ] = ()
    search: Annotated[
        tuple[str, ...], described("search domains of the pod; empty: those in `resolv_conf`", 32)
    ] = ()
    resolv_conf: Annotated[
        Path, described("file with the resolvers and search domains of the pod")
    ] = Path("/etc/resolv.conf")
    ttl: Annotated[float, seconds(1, _DAY, "TTL of the proxy's own answers")] = 30.0
    timeout: Annotated[
        float, seconds(0.05, 60, "maximum time for the answer of a resolver; above: SERVFAIL")
    ] = 5.0
    max_in_flight: Annotated[
        int,
        number(1, 10_000, "maximum queries that wait for resolvers; above: SERVFAIL", "questions"),
    ] = 512
    max_connections: Annotated[
        int,
        number(
            1,
            10_000,
            "maximum open TCP connections; above: the proxy closes an idle one, or new connections"
            " wait",
        ),
    ] = 64
    idle_timeout: Annotated[
        float, seconds(1, _HOUR, "maximum idle time of a TCP connection between queries")
    ] = 10.0
    ranges: Annotated[
        tuple[Network, ...],
        described(
            "networks for virtual addresses: one for each address family, or for one family only", 2
        ),
    ] = (
        ipaddress.IPv4Network("240.0.0.0/4"),
        ipaddress.IPv6Network("fd69:7374:686d:7573::/64"),
    )
    max_names: Annotated[
        int,
        number(
            1,
            1_000_000,
            "maximum services of other clusters that have virtual addresses",
            "services",
        ),
    ] = 65536
    quarantine: Annotated[
        float,
        seconds(
            1,
            _WEEK,
            "how long the virtual address of a removed service is not reused; not below `ttl`",
        ),
    ] = 600.0


class Config(Section, frozen=True):
    """Everything."""

    cluster: Annotated[
        str, described("name of this cluster: lower-case letters, digits, dashes", 63)
    ] = "local"
    trust_domain: Annotated[str, described("SPIFFE trust domain of this mesh", 255)] = (
        "cluster.local"
    )
    mark: Annotated[
        int | None,
        number(
            1,
            2**32 - 1,
            "packet mark of the proxy's own connections, for systems where user ids cannot"
            " distinguish them",
            "packet mark",
        ),
    ] = None
    fast_path: Annotated[
        bool,
        described(
            "whether plain HTTP exchanges and relays use the fast path, which takes less CPU time"
        ),
    ] = True
    workers: Annotated[
        int,
        number(
            1,
            256,
            "worker processes that share the connections; 1: one process without a supervisor",
            "processes",
        ),
    ] = 1
    pod: PodConfig = PodConfig()
    outbound: OutboundConfig = OutboundConfig()
    inbound: InboundConfig = InboundConfig()
    gateway: GatewayConfig = GatewayConfig()
    admin: AdminConfig = AdminConfig()
    identity: IdentityConfig | None = None
    directory: DirectoryConfig | None = None
    clusters: ClustersConfig = ClustersConfig()
    http: HttpConfig = HttpConfig()
    http2: Http2Config = Http2Config()
    memory: MemoryConfig = MemoryConfig()
    pool: PoolConfig = PoolConfig()
    tcp: TcpConfig = TcpConfig()
    loops: LoopsConfig = LoopsConfig()
    log: LogConfig = LogConfig()
    tracing: TracingConfig = TracingConfig()
    shutdown: ShutdownConfig = ShutdownConfig()
    dns: DnsConfig | None = None
    intercept: InterceptConfig = InterceptConfig()

    def listeners(self) -> Iterator[tuple[str, Address]]:
        """(path, address) of every listener."""
        sides = (
            (("gateway", self.gateway),)
            if self.gateway.enabled
            else (("outbound", self.outbound), ("inbound", self.inbound))
        )
        for name, section in (*sides, ("admin", self.admin), ("dns", self.dns)):
            for index, address in enumerate(section.listen if section is not None else ()):
                yield f"{name}.listen[{index}]", address

    @property
    def admin_ports(self) -> frozenset[int]:
        return frozenset(address.port for address in self.admin.listen if address.port)
