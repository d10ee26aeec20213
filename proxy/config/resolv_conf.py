"""The pod's resolvers: whom its programs ask for names, as /etc/resolv.conf or the settings say.

Kubernetes gives every container of a pod the same /etc/resolv.conf, and does not change it while the pod lives. So the init container
that installs the rules and the proxy that runs later read the same, and need not tell each other.

A redirected datagram does not say where it was going. The kernel tells that of TCP and SCTP alone (SO_ORIGINAL_DST);
IP_RECVORIGDSTADDR and IP_PKTINFO give the address after the redirection; conntrack's netlink and TPROXY want capabilities that a
sidecar does not have. So the way in says it: each resolver has a port of its own, the first `listen.port`, the second one more, and the
rules send to it what was going to that resolver. Over TCP one port is enough.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass

from proxy import files
from proxy.config.load import ConfigError
from proxy.config.schema import DnsConfig
from proxy.net.address import Address

# What glibc (MAXNS) and musl look at; programs do not ask a fourth.
MOST = 3
_PORT = 53
_MOST_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Resolvers:
    """Whom the pod asks, and which domains its resolver puts behind a name."""

    upstreams: tuple[Address, ...]
    search: tuple[str, ...]

    @classmethod
    def of(cls, config: DnsConfig) -> Resolvers:
        """Raises ConfigError if there are none: nothing could be captured, and nothing forwarded."""
        told = cls(config.upstreams, config.search)
        if told.upstreams and told.search:
            return told
        try:
            found = parse(files.read_text(config.resolv_conf, _MOST_BYTES))
        except files.FileUnusable as error:
            if told.upstreams:
                return told
            raise ConfigError(str(config.resolv_conf), [error.reason]) from error
        if not told.upstreams and not found.upstreams:
            raise ConfigError(str(config.resolv_conf), ["names no resolver that can be asked: set dns.upstreams"])
        return cls(told.upstreams or found.upstreams, told.search or found.search)

    def ways_in(self, config: DnsConfig) -> Iterator[tuple[Address, Address]]:
        """(our address, resolver): where datagrams for each resolver arrive. One whose address family is not listened on is left out."""
        for index, upstream in enumerate(self.upstreams):
            for address in config.listen:
                if address.is_ipv6 == upstream.is_ipv6:
                    yield Address(address.host, address.port + index if address.port else 0), upstream
                    break


def parse(text: str) -> Resolvers:
    """What resolv.conf(5) says; the last `search` or `domain` counts. Lines that nobody understands are skipped, as the C library does.

    A link-local resolver (`fe80::1%eth0`) is left out: interception leaves link-local addresses alone.
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


