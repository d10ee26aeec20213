"""The settings for services of other clusters: failover, gateways, and DNS names."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated

from proxy.net.address import Address
from proxy.settings.declare import Section, described, number, seconds
from proxy.settings.units import Network

_HOUR, _DAY, _WEEK = 3600, 86400, 7 * 86400


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
