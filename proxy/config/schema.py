"""The schema of the configuration: every section, and the settings that are in none.

The sections are in schema_*.py, by subject. Each setting has its type, meaning, limits and default
there (proxy/settings/declare.py). docs/configuration.md is generated from it, and a test compares
the two. Parsed durations are seconds (float), parsed sizes are bytes (int). Comments above the
sections give the reasons for the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from proxy.config.schema_clusters import ClustersConfig, DnsConfig
from proxy.config.schema_connections import MemoryConfig, PoolConfig, TcpConfig
from proxy.config.schema_files import DirectoryConfig, IdentityConfig
from proxy.config.schema_http import Http2Config, HttpConfig, LoopsConfig
from proxy.config.schema_process import AdminConfig, LogConfig, PodConfig, ShutdownConfig
from proxy.config.schema_tracing import TracingConfig
from proxy.config.schema_traffic import (
    GatewayConfig,
    InboundConfig,
    InterceptConfig,
    OutboundConfig,
)
from proxy.net.address import Address
from proxy.settings.declare import Section, described, number


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
