"""The pod's DNS resolvers, from /etc/resolv.conf or the settings.

Kubernetes gives every container of a pod the same /etc/resolv.conf and does not change it while the
pod runs. So the init container that installs the rules and the proxy that runs later read the same
file and need not communicate.

A redirected datagram does not carry its original destination. SO_ORIGINAL_DST works for TCP and
SCTP only; IP_RECVORIGDSTADDR and IP_PKTINFO give the address after the redirection; conntrack's
netlink and TPROXY need capabilities that a sidecar does not have. So the port identifies the
resolver: each has its own, starting at `listen.port` and counting up, and the rules redirect its
datagrams to it. Over TCP one port is enough.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass

from proxy import files
from proxy.config.schema_clusters import DnsConfig
from proxy.net.address import Address
from proxy.settings.sources import ConfigError

# The maximum of glibc (MAXNS) and musl; programs never ask a fourth.
MOST = 3
_PORT = 53
_MOST_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Resolvers:
    """The resolvers that the pod asks, and its search domains."""

    upstreams: tuple[Address, ...]
    search: tuple[str, ...]

    @classmethod
    def of(cls, config: DnsConfig) -> Resolvers:
        """Raises ConfigError if there are none: then nothing could be captured or forwarded."""
        configured = cls(config.upstreams, config.search)
        if configured.upstreams and configured.search:
            return configured
        try:
            found = parse(files.read_text(config.resolv_conf, _MOST_BYTES))
        except files.FileUnusable as error:
            if configured.upstreams:
                return configured
            raise ConfigError(str(config.resolv_conf), [error.reason]) from error
        if not configured.upstreams and not found.upstreams:
            raise ConfigError(
                str(config.resolv_conf), ["lists no usable resolver: set dns.upstreams"]
            )
        return cls(configured.upstreams or found.upstreams, configured.search or found.search)

    def listen_addresses(self, config: DnsConfig) -> Iterator[tuple[Address, Address]]:
        """(our address, resolver): where datagrams for each resolver arrive. Leaves out address
        families without a listener.
        """
        for index, upstream in enumerate(self.upstreams):
            for address in config.listen:
                if address.is_ipv6 == upstream.is_ipv6:
                    yield (
                        Address(address.host, address.port + index if address.port else 0),
                        upstream,
                    )
                    break


def parse(text: str) -> Resolvers:
    """Parse resolv.conf(5). The last `search` or `domain` line counts. Skips invalid lines, as the
    C library does.

    A link-local resolver (`fe80::1%eth0`) is left out: link-local addresses are not redirected.
    """
    servers: dict[Address, None] = {}
    search: tuple[str, ...] = ()
    for line in text.splitlines():
        match line.split():
            case ["nameserver", host, *_]:
                try:
                    literal = ipaddress.ip_address(host)
                except ValueError:
                    continue
                if not (literal.version == 6 and literal.is_link_local):
                    servers[Address(str(literal), _PORT)] = None
            case ["search" | "domain", *domains]:
                search = tuple(domain.rstrip(".") for domain in domains)
    return Resolvers(tuple(servers)[:MOST], tuple(domain for domain in search if domain))
