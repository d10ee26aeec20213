"""What an operator can decide: every setting, typed, with its meaning, its limits and its default.

The type of a field says everything about it, and docs/configuration.md repeats it (a test holds the two together). Durations are
seconds (float), sizes are bytes (int) once parsed. The reasons behind the numbers stand above the sections.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from proxy.mesh.spiffe import IdentityPattern, SpiffeId, SpiffeIdError
from proxy.net.address import Address
from proxy.sections_files import DirectoryConfig, IdentityConfig
from proxy.sections_tracing import TracingConfig
from proxy.settings import Section, described, number, octets, ratio, seconds
from proxy.units import IP, Network, PortSwitch

_HOUR, _DAY, _WEEK = 3600, 86400, 7 * 86400

Port = Annotated[int, number(1, 65535, "a port")]
Ports = tuple[Port, ...]
# Protocols in which the server speaks first, or that look like nothing known: SMTP, MySQL, Galera, PostgreSQL, Redis, Elasticsearch's
# transport, memcached. The same list as Linkerd's, so that nobody has to learn a second one.
OPAQUE_PORTS = (25, 587, 3306, 4444, 5432, 6379, 9300, 11211)


class PodConfig(Section, frozen=True):
    """Who this pod is. In Kubernetes all of it comes from the downward API."""

    name: Annotated[str, described("the pod's name; from POD_NAME")] = ""
    namespace: Annotated[str, described("its namespace; from POD_NAMESPACE")] = "default"
    uid: Annotated[str, described("its unique id; from POD_UID")] = ""
    ip: Annotated[IP | None, described("its main address; from POD_IP")] = None
    node: Annotated[str, described("the node it runs on; from NODE_NAME")] = ""
    zone: Annotated[str, described("the zone of that node, whose endpoints come first; from POD_ZONE", 63)] = ""
    service_account: Annotated[str, described("its service account; from SERVICE_ACCOUNT")] = "default"
    addresses: Annotated[
        tuple[IP, ...], described("all addresses of the pod, by which it knows itself; from POD_IPS; empty: asked from the system", 64)
    ] = ()


_KNOWN = "open connections whose peer is known; above, the least valuable one is closed, or a new one refused"
_PENDING = "open connections whose peer is not known yet, beside these; above, the oldest is closed"
_RESERVE = "the part of `max_connections` that is kept for peers with a verified identity that may come in"


# An HTTP client speaks as soon as it is connected, so three seconds of silence mean a server that speaks first on a port that nobody
# declared, or a connection opened in advance; both work as opaque. Ten seconds, Linkerd's value, is as long as MySQL and many
# clients are willing to wait for a greeting: they would fail where they now are slow.
class OutboundConfig(Section, frozen=True):
    """From the application to the mesh."""

    listen: Annotated[tuple[Address, ...], described("where redirected connections of the application arrive; empty: off", 16)] = (
        Address("127.0.0.1", 4140),
        Address("::1", 4140),
    )
    opaque_ports: Annotated[Ports, described("destination ports whose bytes are not looked at", 1024)] = OPAQUE_PORTS
    fixed_destination: Annotated[
        Address | None, described("where a connection goes that was not redirected (standalone use, measuring); none: it is refused")
    ] = None
    authority_networks: Annotated[
        tuple[Network, ...], described("destinations outside of the directory at which a request's authority chooses the service", 1024)
    ] = ()
    detect_timeout: Annotated[float, seconds(0.05, 60, "how long a client may be silent until it is connected as opaque")] = 3.0
    max_connections: Annotated[
        int, number(1, 1_000_000, "open connections; above, one that waits for a request is closed, or new ones wait in the backlog")
    ] = 10_000


# A pod has few callers, and each of them many requests.
_spiffe_id = functools.lru_cache(maxsize=1024)(SpiffeId.parse)


def _matches(patterns: tuple[IdentityPattern, ...], identity: SpiffeId | str) -> bool:
    try:
        who = _spiffe_id(identity) if isinstance(identity, str) else identity
    except SpiffeIdError:
        return False
    return any(pattern.matches(who) for pattern in patterns)


class InboundConfig(Section, frozen=True):
    """From the mesh to the application."""

    listen: Annotated[tuple[Address, ...], described("where redirected connections to the pod arrive; empty: off", 16)] = (
        Address("0.0.0.0", 4143),
        Address("::", 4143),
    )
    opaque_ports: Annotated[Ports, described("ports whose bytes are not looked at on connections without TLS", 1024)] = OPAQUE_PORTS
    http_ports: Annotated[Ports, described("ports that take HTTP and nothing else: what is opaque ends there", 1024)] = ()
    fixed_destination: Annotated[
        Address | None, described("where a connection goes that was not redirected (standalone use, measuring); none: it is refused")
    ] = None
    detect_timeout: Annotated[float, seconds(0.05, 60, "how long a client may be silent until it is connected as opaque")] = 3.0
    hello_timeout: Annotated[
        float, seconds(0.05, 60, "how long a client may be silent on an opaque port that is open to all, before it is one without TLS")
    ] = 0.5
    require_identity: Annotated[
        PortSwitch,
        described("whether a peer must prove who it is: for all ports, a list of ports, or a mapping of ports (and `default`)"),
    ] = PortSwitch(False, {})
    allow: Annotated[
        dict[int, Annotated[tuple[IdentityPattern, ...], described("", 1024)]],
        described("who may use a port: SPIFFE identities, exact or ending with `/*`; other ports are open to all", 1024),
    ] = msgspec.field(default_factory=dict)
    trusted_gateways: Annotated[
        tuple[IdentityPattern, ...],
        described("gateways that are believed who sent a request (`isthmus-client-id`): SPIFFE identities, exact or ending with `/*`", 64),
    ] = ()
    max_connections: Annotated[int, number(1, 1_000_000, _KNOWN)] = 10_000
    max_pending: Annotated[int, number(2, 1_000_000, _PENDING)] = 1024
    member_reserve: Annotated[float, ratio(0, 0.9, _RESERVE)] = 0.1

    def requires_identity(self, port: int) -> bool:
        """Whether a peer must prove its identity on `port`; a port with an allow-list always asks for it."""
        return port in self.allow or self.require_identity.at(port)

    def allows(self, port: int, identity: SpiffeId | str | None) -> bool:
        """Whether the peer with this verified identity (None: it has shown none) may use `port`. Asked for every request."""
        if identity is None:
            return not self.requires_identity(port)
        patterns = self.allow.get(port)
        return patterns is None or _matches(patterns, identity)

    def trusts(self, identity: str) -> bool:
        """Whether the peer with this verified identity may say who sent its requests."""
        return bool(self.trusted_gateways) and _matches(self.trusted_gateways, identity)


class GatewayConfig(Section, frozen=True):
    """A gateway, for services that other clusters may use (`isthmus run --gateway`). It is a process of its own, beside no application."""

    enabled: Annotated[bool, described("whether this is a gateway; then there is neither an inbound nor an outbound side")] = False
    listen: Annotated[tuple[Address, ...], described("where proxies of other clusters connect to", 16)] = (
        Address("0.0.0.0", 4143),
        Address("::", 4143),
    )
    allow: Annotated[
        tuple[IdentityPattern, ...], described("who may use it: SPIFFE identities, exact or ending with `/*`; others get 403", 1024)
    ] = (IdentityPattern("", exact=False),)
    detect_timeout: Annotated[float, seconds(0.05, 60, "how long a client may take to begin a TLS handshake")] = 3.0
    max_connections: Annotated[int, number(1, 1_000_000, _KNOWN)] = 10_000
    max_pending: Annotated[int, number(2, 1_000_000, _PENDING)] = 1024
    member_reserve: Annotated[float, ratio(0, 0.9, _RESERVE)] = 0.1

    def admits(self, identity: SpiffeId | str) -> bool:
        """Whether a peer with this verified identity may use the gateway."""
        return _matches(self.allow, identity)


# A probe comes every few seconds and gives up after one. Prometheus asks every 15 s or so, and keeps its connection. stall_timeout is
# longer than any load should stop the event loop for, and shorter than the half minute in which three probes fail.
class AdminConfig(Section, frozen=True):
    """Probes and metrics."""

    listen: Annotated[tuple[Address, ...], described("where /live, /ready and /metrics are served; empty: off", 16)] = (
        Address("0.0.0.0", 4191),
        Address("::", 4191),
    )
    max_connections: Annotated[int, number(1, 10_000, "open connections; above, the one that has been idle longest is closed")] = 64
    max_per_source: Annotated[int, number(1, 10_000, "of these, from one address; above, one of that address is closed")] = 16
    request_timeout: Annotated[float, seconds(0.05, 60, "from accepting a connection to the end of its first request")] = 2.0
    idle_timeout: Annotated[float, seconds(1, _HOUR, "how long a connection may stay open between requests")] = 60.0
    metrics_max_age: Annotated[float, seconds(0, 60, "how long one text of metrics is given to all who ask")] = 1.0
    stall_timeout: Annotated[float, seconds(1, _HOUR, "how long the event loop, or a worker, may stand still; above: not live")] = 15.0


# A service that is back for ten seconds is likely to stay. A tunnel is open when the gateway has reached the service, which may take it
# three endpoints.
class ClustersConfig(Section, frozen=True):
    """Services of other clusters, and failing over to them."""

    settle: Annotated[float, seconds(0, _HOUR, "how long a service must be usable at home again before its requests come back")] = 10.0
    probe_interval: Annotated[float, seconds(0, _HOUR, "how often a gateway that is in use is asked whether it is alive; 0: never")] = 5.0
    probe_timeout: Annotated[float, seconds(0.05, 300, "how long it may take to answer, connecting included")] = 3.0
    probe_failures: Annotated[int, number(1, 100, "probes that must fail in a row until it gets no requests")] = 2
    resolve_interval: Annotated[float, seconds(0.1, _DAY, "how often a gateway's DNS name is looked up again")] = 30.0
    tunnel_timeout: Annotated[float, seconds(0.1, _HOUR, "how long a gateway may take to open a tunnel for bytes that are not HTTP")] = 15.0


# idle_timeout is longer than the pools of common clients keep a connection (Go 90 s), so that it is the client who closes first and
# no request meets a closing connection. For clients without an identity that would be too long, since anything that can connect could
# hold a slot for it; theirs is three times that of common servers (Node.js 5 s). body_min_rate cuts a body that trickles in order to hold
# a connection.
class HttpConfig(Section, frozen=True):
    """Limits of HTTP messages, on both sides of the proxy."""

    max_head_bytes: Annotated[int, octets(1024, 2**20, "start line and header fields together; above: 431")] = 64 * 1024
    max_target_bytes: Annotated[int, octets(256, 2**16, "the request target; above: 414")] = 16 * 1024
    max_headers: Annotated[int, number(8, 10_000, "header fields in one head; above: 431")] = 200
    head_timeout: Annotated[float, seconds(0.1, _HOUR, "from the first byte of a request's head to its end; above: 408")] = 10.0
    idle_timeout: Annotated[float, seconds(1, _DAY, "how long a client's connection may stay open without a request")] = 120.0
    plain_idle_timeout: Annotated[
        float, seconds(1, _DAY, "the same for clients from outside of the pod that have shown no identity, if it is shorter")
    ] = 15.0
    body_timeout: Annotated[float, seconds(0.1, _DAY, "longest pause within the body of a request; above: 408")] = 60.0
    body_min_rate: Annotated[
        int, number(0, 2**30, "lowest average rate of a request's body, once `body_timeout` has passed; 0: any", "bytes/s")
    ] = 16
    write_timeout: Annotated[float, seconds(1, _DAY, "how long a client may take nothing of what it is sent")] = 300.0
    linger_timeout: Annotated[
        float, seconds(0.1, 300, "how long the rest of a request is read and dropped that was answered early; above 1 MiB, at 4 MiB/s")
    ] = 10.0
    response_timeout: Annotated[float, seconds(0.1, _DAY, "from the end of a request to the head of its response; above: 504")] = 300.0
    response_body_timeout: Annotated[float, seconds(1, _DAY, "longest pause within the body of a response (event streams pause)")] = 3600.0


# One window for a stream is what it may be ahead of a slow consumer; the connection's holds several of them. A connection ends after
# max_age so that new endpoints get their share and what a burst has taken is given back.
class Http2Config(Section, frozen=True):
    """HTTP/2 connections, which many requests share."""

    max_streams: Annotated[int, number(1, 100_000, "requests that a client may have open on one connection")] = 256
    stream_window: Annotated[int, octets(65536, 2**30, "bytes of one request or response that may wait for a slow consumer")] = 256 * 1024
    connection_window: Annotated[int, octets(65536, 2**30, "the same for all of a connection together")] = 4 * 1024 * 1024
    idle_timeout: Annotated[float, seconds(1, _DAY, "how long a connection to an endpoint is kept without a request")] = 60.0
    frame_budget: Annotated[
        int, number(100, 10**9, "what a peer may spend on resets of young streams (2 each), PING, empty DATA and the like", "frames")
    ] = 1000
    mesh_frame_budget: Annotated[
        int, number(100, 10**9, "the same for a peer with a verified identity, whose connection carries the requests of many", "frames")
    ] = 20_000
    reset_rate: Annotated[
        int, number(1, 10**6, "cancellations a second that go to a server at once, four times as many in a row; others wait", "streams/s")
    ] = 25
    ping_interval: Annotated[float, seconds(1, _DAY, "silence after which a peer that owes an answer is asked whether it is there")] = 20.0
    ping_timeout: Annotated[float, seconds(0.1, _HOUR, "how long it may take to answer")] = 10.0


# The base was measured: 52 MiB after the start, and what the allocator keeps for itself under load. The reserve for members is a quarter
# of the budget, and of the streams.
class MemoryConfig(Section, frozen=True):
    """How much may be buffered, for all connections together."""

    budget: Annotated[int | None, octets(16 * 2**20, 2**44, "bytes that one process may buffer; none: by the cgroup's limit")] = None
    base: Annotated[int, octets(0, 2**40, "bytes kept out of a budget that follows the limit, for each process itself")] = 88 * 2**20
    patience: Annotated[float, seconds(1, _HOUR, "how long a connection may hold more than its share before it is closed")] = 10.0
    max_streams: Annotated[int, number(1, 10_000_000, "HTTP/2 streams that all clients together may open", "streams")] = 10_000


# idle_timeout lies below the 5 s of Node.js, the shortest among common servers, so that the server seldom closes a connection that
# is just being used again.
class PoolConfig(Section, frozen=True):
    """Connections kept open to endpoints for the next request."""

    max_connections_per_endpoint: Annotated[int, number(1, 100_000, "open connections to one endpoint")] = 1024
    max_idle_per_endpoint: Annotated[int, number(0, 100_000, "of these, kept while idle; 0: none is used twice")] = 128
    idle_timeout: Annotated[float, seconds(0.1, _HOUR, "how long an idle connection is kept; keep it below the servers' own")] = 3.0
    max_age: Annotated[float, seconds(1, _WEEK, "after which a connection is not used again")] = 600.0
    max_waiting_per_endpoint: Annotated[int, number(0, 100_000, "requests that wait for a connection or a stream; above: 503")] = 10_000
    wait_timeout: Annotated[
        float, seconds(0.01, _HOUR, "how long one without a deadline waits while no request is served; above: 503")
    ] = 3.0


# connect_timeout lets a lost first packet be sent again (after 1 s), and still leaves time for another endpoint.
class TcpConfig(Section, frozen=True):
    """Sockets, and connections that are relayed byte for byte."""

    connect_timeout: Annotated[float, seconds(0.01, 300, "how long opening a connection may take")] = 2.0
    handshake_timeout: Annotated[float, seconds(0.05, 300, "how long a TLS handshake may take")] = 5.0
    idle_timeout: Annotated[float, seconds(1, _WEEK, "how long a relayed connection may be silent in both directions")] = 3600.0
    keepalive: Annotated[float, seconds(0, 2 * _HOUR, "silence after which TCP keep-alive probes begin; 0: none")] = 10.0
    user_timeout: Annotated[
        float, seconds(0, _HOUR, "how long a peer may acknowledge neither data nor keep-alive probes; 0: as long as the system allows")
    ] = 30.0


# Reverse proxies copy our tokens and programs that answer from their own state do not, so a request that returns has nearly always gone
# round; four times are for those that call themselves on purpose. Few requests pass more than a dozen proxies.
class LoopsConfig(Section, frozen=True):
    """What the loop guard lets pass."""

    max_returns: Annotated[
        int, number(0, 1000, "how often the same request may come back to a sidecar (an application may call itself); above: 508", "times")
    ] = 4
    max_hops: Annotated[int, number(4, 255, "proxies that a request may pass, both sides of a sidecar counted; above: 508", "proxies")] = 64

    max_nesting: Annotated[
        int, number(0, 100, "how often a connection of the proxy's own may come back to it before it is refused", "times")
    ] = 2
    max_self_calls: Annotated[
        int, number(1, 100_000, "calls of the pod to one of its own ports that may wait for an answer at a time; above: 508", "calls")
    ] = 256


class LogConfig(Section, frozen=True):
    """What is written to standard error."""

    level: Annotated[Literal["debug", "info", "warning", "error"], described("the least important line written")] = "info"
    format: Annotated[Literal["text", "json"], described("how lines look")] = "text"
    access: Annotated[bool, described("whether every request gets a line")] = False
    query: Annotated[bool, described("whether these lines show query strings")] = False
    queue: Annotated[int, number(16, 1_000_000, "lines that may wait to be written; more are dropped and counted", "lines")] = 8192


# Kubernetes kills a pod 30 s after asking it to stop. The minimum is for an application that is told to stop together with the proxy, and
# opens its last connections after a pause; a native sidecar is told later, and can do without.
class ShutdownConfig(Section, frozen=True):
    """The end."""

    grace: Annotated[float, seconds(0, _HOUR, "how long open connections may go on after SIGTERM")] = 25.0
    outbound_minimum: Annotated[
        float, seconds(0, _HOUR, "how long the application may open connections after SIGTERM, at least, within `shutdown.grace`")
    ] = 3.0


class InterceptConfig(Section, frozen=True):
    """What `isthmus intercept` leaves alone. The proxy's own listeners, the admin port included, are always left alone."""

    uid: Annotated[int, number(1, 2**32 - 2, "user id of the proxy, whose connections are not redirected", "user id")] = 2102
    skip_inbound_ports: Annotated[Ports, described("ports of the pod that are reached without the proxy", 1024)] = ()
    skip_outbound_ports: Annotated[Ports, described("destination ports that the application reaches without the proxy", 1024)] = ()
    skip_inbound_subnets: Annotated[tuple[Network, ...], described("sources that reach the pod without the proxy", 1024)] = ()
    skip_outbound_subnets: Annotated[
        tuple[Network, ...], described("destinations that the application reaches without the proxy", 1024)
    ] = ()


# 240.0.0.0/4 has been reserved since 1989 and is nobody's; the IPv6 prefix is a unique local one that spells "isthmus". The timeout is
# that of the C library for one attempt. Quarantine is for applications that keep an address for longer than they were told.
class DnsConfig(Section, frozen=True):
    """Names of other clusters' services for every program of the pod. Without this section DNS is left alone; `dns: {}` switches it on."""

    listen: Annotated[
        tuple[Address, ...], described("where redirected questions arrive, those for the n-th further resolver at the port + n", 2)
    ] = (Address("127.0.0.1", 4153), Address("::1", 4153))
    upstreams: Annotated[tuple[Address, ...], described("the pod's resolvers; empty: those of `resolv_conf`", 3)] = ()
    search: Annotated[tuple[str, ...], described("the domains that programs put behind names; empty: those of `resolv_conf`", 32)] = ()
    resolv_conf: Annotated[Path, described("the file that tells the pod's programs about both")] = Path("/etc/resolv.conf")
    ttl: Annotated[float, seconds(1, _DAY, "how long our answers may be kept")] = 30.0
    timeout: Annotated[float, seconds(0.05, 60, "how long a resolver may take to answer; above: SERVFAIL")] = 5.0
    max_in_flight: Annotated[int, number(1, 10_000, "questions that may wait for resolvers; above: SERVFAIL", "questions")] = 512
    max_connections: Annotated[int, number(1, 10_000, "open TCP connections; above, an idle one is closed, or new ones wait")] = 64
    idle_timeout: Annotated[float, seconds(1, _HOUR, "how long a TCP connection may stay open between questions")] = 10.0
    ranges: Annotated[tuple[Network, ...], described("where virtual addresses come from: one network of each family, or of one", 2)] = (
        ipaddress.IPv4Network("240.0.0.0/4"),
        ipaddress.IPv6Network("fd69:7374:686d:7573::/64"),
    )
    max_names: Annotated[int, number(1, 1_000_000, "services of other clusters that have virtual addresses", "services")] = 65536
    quarantine: Annotated[
        float, seconds(1, _WEEK, "how long the address of a service that is gone stays its own; not below `ttl`")
    ] = 600.0


class Config(Section, frozen=True):
    """Everything."""

    cluster: Annotated[str, described("the name of this cluster: lower-case letters, digits, dashes", 63)] = "local"
    trust_domain: Annotated[str, described("the SPIFFE trust domain of this mesh", 255)] = "cluster.local"
    mark: Annotated[
        int | None, number(1, 2**32 - 1, "packet mark of the proxy's own connections, where user ids cannot be told apart", "packet mark")
    ] = None
    fast_path: Annotated[bool, described("whether plain HTTP exchanges and relays take the fast road, for less processor time")] = True
    workers: Annotated[int, number(1, 256, "processes that share the connections; 1: the proxy is one process", "processes")] = 1
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
        sides = (("gateway", self.gateway),) if self.gateway.enabled else (("outbound", self.outbound), ("inbound", self.inbound))
        for name, section in (*sides, ("admin", self.admin), ("dns", self.dns)):
            for index, address in enumerate(section.listen if section is not None else ()):
                yield f"{name}.listen[{index}]", address

    @property
    def admin_ports(self) -> frozenset[int]:
        return frozenset(address.port for address in self.admin.listen if address.port)
